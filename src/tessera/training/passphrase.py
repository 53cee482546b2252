"""Where the passphrase of protected keys comes from: the command line says so once, whoever opens a key asks here.

It imports nothing, so that saying it costs nothing. The source lives in a context variable: tasks and threads that a
command starts see it, another command in the same process does not.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

from tessera.core.errors import Missing

__all__ = ["PassphraseSource", "ask_passphrase", "use_passphrases"]


class PassphraseSource(Protocol):
    """Gives the passphrase for `purpose`, a phrase such as "to open account.key". Raises `Missing`, `Invalid`."""

    def __call__(self, purpose: str, /) -> str: ...


_source: ContextVar[PassphraseSource | None] = ContextVar("passphrases", default=None)


def use_passphrases(source: PassphraseSource | None) -> None:
    """Ask `source` from here on, in this context."""
    _source.set(source)


def ask_passphrase(purpose: str) -> str:
    """Raises `Missing` where nobody can be asked."""
    source = _source.get()
    if source is None:
        raise Missing(f"a passphrase is needed {purpose}, and there is nobody to ask")
    return source(purpose)

"""Where a passphrase comes from: a file, systemd's credential, or a prompt; never the command line itself.

In this order: `--passphrase-file` (`TESSERA_PASSPHRASE_FILE`, or `passphrase_file` in config.toml), the credential
`tessera-passphrase` that systemd hands to a service, a question on the terminal.
"""

from __future__ import annotations

import getpass
import os
import stat
import sys
from pathlib import Path

from tessera.cli.settings import current_settings
from tessera.core.errors import Invalid, Missing

__all__ = ["CREDENTIAL", "Passphrases", "new_passphrase"]

CREDENTIAL = "tessera-passphrase"
SIZE_LIMIT = 4096  # bytes
SHORTEST = 8  # characters of a new one


class Passphrases:
    """Asks at most once; a `passphrase.PassphraseSource`."""

    def __init__(self) -> None:
        self._known: str | None = None

    def __call__(self, purpose: str, /) -> str:
        if self._known is None:
            self._known = _from_file() or _prompt(f"Passphrase {purpose}: ")
        return self._known


def new_passphrase(purpose: str) -> str:
    """One that is typed twice, or comes from a file. Raises `Invalid` for a short one or two that differ."""
    given = _from_file()
    if given is None:
        given = _prompt(f"New passphrase {purpose}: ")
        if given != _prompt("The same again: "):
            raise Invalid("the two passphrases differ: nothing was changed")
    if len(given) < SHORTEST:
        raise Invalid(f"a passphrase has at least {SHORTEST} characters, not {len(given)}: nothing was changed")
    return given


def _from_file() -> str | None:
    chosen = current_settings().passphrase_file
    if chosen is not None:
        return _read(chosen, must_be_private=True)
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if folder and (Path(folder) / CREDENTIAL).exists():
        return _read(Path(folder) / CREDENTIAL, must_be_private=False)  # systemd saw to that
    return None


def _read(file: Path, *, must_be_private: bool) -> str:
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            data = opened.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise Missing(f"cannot read the passphrase in {file}: {error.strerror}") from error
    if must_be_private and stat.S_ISREG(mode) and mode & 0o077:
        raise Invalid(f"others may read the passphrase in {file}: chmod 600 {file}")
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError as error:
        raise Invalid(f"{file} holds no passphrase: it is not text") from error
    if len(data) > SIZE_LIMIT or len(lines) != 1 or not lines[0]:
        raise Invalid(f"{file} holds no passphrase: one line of at most {SIZE_LIMIT} bytes is expected")
    return lines[0]


def _prompt(question: str) -> str:
    if not sys.stdin.isatty():
        raise Missing(
            f"{question.rstrip(': ').lower()}: nobody is here to be asked; put it into a file of mode 600 and name "
            "that with TESSERA_PASSPHRASE_FILE"
        )
    try:
        return getpass.getpass(question)
    except EOFError as error:
        raise Missing("no passphrase was given") from error

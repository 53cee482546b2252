"""Values as a line of text that a person can copy: a prefix that says what it is, then base64 of canonical JSON."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any, TypeVar

from tessera.core import encoding
from tessera.core.errors import Invalid

__all__ = ["TEXT_LIMIT", "read_paper", "write_paper"]

TEXT_LIMIT = 16 * 1024  # characters

T = TypeVar("T")


def write_paper(prefix: str, value: dict[str, Any]) -> str:
    return prefix + base64.urlsafe_b64encode(encoding.encode(value)).decode().rstrip("=")


def read_paper(text: str, prefix: str, what: str, read: Callable[[object], T]) -> T:
    """What `read` makes of the value; white space, which mail puts in, does not matter.

    Args:
        what: the text is, with its article.
        read: checks the decoded value. Raises: Invalid.

    Raises: Invalid: a text that is foreign, too long, cut or altered.
    """
    text = "".join(text.split())
    if not text.startswith(prefix):
        raise Invalid(f"{what} starts with {prefix!r}, this one with {text[: len(prefix)]!r}")
    if len(text) > TEXT_LIMIT:
        raise Invalid(f"{what} has at most {TEXT_LIMIT} characters, this one {len(text)}")
    body = text[len(prefix) :]
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        return read(encoding.decode(data, TEXT_LIMIT))
    except (binascii.Error, Invalid, UnicodeDecodeError) as error:
        raise Invalid(f"this is {what}, damaged or cut short: {error}; copy the whole of it again") from error

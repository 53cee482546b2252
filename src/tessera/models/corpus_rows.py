"""JSON lines, one document each. A bad row is skipped and counted, and no line can make us hold more than its limit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tessera.models.corpus import Piece, Skipped, aside

__all__ = ["LINE_LIMIT", "BadRow", "JsonLines", "piece_of", "usable"]

LINE_LIMIT = 16 * 2**20  # bytes of a row


class BadRow(Exception):
    """Why a row cannot be used."""


@dataclass(frozen=True)
class JsonLines:
    """An object on each line, whose `field` is the text. An offset is a byte."""

    field: str = "text"

    def read(self, path: Path, name: str, offset: int, skipped: Skipped) -> Iterator[Piece]:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                while line := file.readline(LINE_LIMIT + 1):
                    try:
                        text = self._text(_whole(line, file))
                    except BadRow as error:
                        skipped.row(name, f"byte {offset}", str(error))
                        text = ""
                    offset = file.tell()
                    yield from piece_of(text, offset, skipped)
        except OSError as error:
            skipped.file(name, error.strerror or str(error))

    def _text(self, line: bytes) -> str:
        if not line.strip():
            return ""
        try:
            value = json.loads(line)
        except RecursionError:
            raise BadRow("nested too deep") from None
        except ValueError as error:  # of JSON or of UTF-8
            raise BadRow(f"no JSON: {str(error)[:80]}") from None
        if not isinstance(value, dict):
            raise BadRow(f"no object but a {type(value).__name__}")
        return usable(value.get(self.field), self.field)


def _whole(line: bytes, file: IO[bytes]) -> bytes:
    """`line`, unless it is longer than a row may be; then the rest of it is passed over."""
    if len(line) <= LINE_LIMIT:
        return line
    while line and not line.endswith(b"\n"):
        line = file.readline(2**20)
    raise BadRow(f"longer than {LINE_LIMIT >> 20} MB")


def usable(value: object, field: str) -> str:
    """`value` as text that can be learned from. Raises: BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"its {field!r} is {'missing' if value is None else 'no text'}")
    if "\0" in value:
        raise BadRow("its text holds a zero byte")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise BadRow("its text holds half a character (a lone surrogate)") from None
    if size > LINE_LIMIT:
        raise BadRow(f"longer than {LINE_LIMIT >> 20} MB")
    return value


def piece_of(text: str, after: int, skipped: Skipped) -> Iterator[Piece]:
    """A row's document, unless it is blank."""
    if text.strip():
        skipped.used += 1
        yield Piece(text, aside(text.encode()), True, after)

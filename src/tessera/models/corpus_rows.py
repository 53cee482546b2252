"""Files of rows, one document each: JSON lines and Parquet.

A bad row is skipped and counted. What one line, one row group or one file can make us hold is limited, whatever it
claims: a Parquet file of a few kilobytes can stand for terabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tessera.core.errors import Invalid
from tessera.models.corpus import Piece, Skipped, aside

__all__ = ["JsonLines", "Parquet"]

LINE_LIMIT = 16 * 2**20  # bytes of a row
GROUP_LIMIT = 512 * 2**20  # bytes of a row group's text, unpacked
BATCH_ROWS = 64
UNPACK_LIMIT = 1_000  # times the file's size; real text shrinks to a third, tables of it to a fiftieth
UNPACK_FREE = 64 * 2**20  # bytes that any file may unpack to
FOOTER_LIMIT = 64 * 2**20  # bytes


class _Bad(Exception):
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
                    except _Bad as error:
                        skipped.row(name, f"byte {offset}", str(error))
                        text = ""
                    offset = file.tell()
                    yield from _piece(text, offset, skipped)
        except OSError as error:
            skipped.file(name, error.strerror or str(error))

    def _text(self, line: bytes) -> str:
        if not line.strip():
            return ""
        try:
            value = json.loads(line)
        except RecursionError:
            raise _Bad("nested too deep") from None
        except ValueError as error:  # of JSON or of UTF-8
            raise _Bad(f"no JSON: {str(error)[:80]}") from None
        if not isinstance(value, dict):
            raise _Bad(f"no object but a {type(value).__name__}")
        return _usable(value.get(self.field), self.field)


@dataclass(frozen=True)
class Parquet:
    """Rows of a column `field` of text. An offset is a row. Needs pyarrow: the extra `data`."""

    field: str = "text"

    @classmethod
    def checked(cls, field: str) -> Parquet:
        """Raises `Invalid` when pyarrow is missing."""
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise Invalid("reading Parquet needs pyarrow: pip install 'tessera-network[data]'") from error
        return cls(field)

    def read(self, path: Path, name: str, offset: int, skipped: Skipped) -> Iterator[Piece]:
        import pyarrow

        try:
            yield from self._rows(path, name, offset, skipped)
        except (OSError, pyarrow.ArrowException) as error:
            raise Invalid(f"{name} is no sound Parquet file: {str(error)[:200]}") from error

    def _rows(self, path: Path, name: str, offset: int, skipped: Skipped) -> Iterator[Piece]:
        from pyarrow.parquet import ParquetFile

        limits = {"thrift_string_size_limit": FOOTER_LIMIT, "thrift_container_size_limit": 10**6}
        unpacked, allowed = 0, UNPACK_FREE + UNPACK_LIMIT * path.stat().st_size
        # As a dictionary: a batch of the same long text, which takes a few bytes on disk, must not be written out.
        with ParquetFile(path, read_dictionary=[self.field], **limits) as file:
            self._check(file, name)
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= offset:
                    row += rows
                    continue
                _check_group(file.metadata.row_group(group), self.field, name)
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[self.field]):
                    for value in batch.column(0):
                        row += 1
                        if row <= offset:
                            continue
                        text = self._text(value, name, row, skipped)
                        unpacked += len(text)
                        if unpacked > allowed:
                            raise Invalid(f"{name} unpacks to over {UNPACK_LIMIT} times its size: not read any further")
                        yield from _piece(text, row, skipped)

    def _check(self, file: Any, name: str) -> None:
        import pyarrow

        found = file.schema_arrow
        if self.field not in found.names:
            columns = ", ".join(str(column)[:40] for column in found.names[:10])
            raise Invalid(f"{name} has no column {self.field!r}: choose one of {columns}")
        kind = found.field(self.field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise Invalid(f"the column {self.field!r} of {name} holds {kind}, text expected")

    def _text(self, value: Any, name: str, row: int, skipped: Skipped) -> str:
        try:
            return _usable(_plain(value), self.field)
        except _Bad as error:
            reason = str(error)
        except UnicodeDecodeError as error:
            reason = f"no UTF-8: {error.reason}"
        skipped.row(name, f"row {row}", reason)
        return ""


def _plain(value: Any) -> object:
    """The text of a dictionary's or a plain cell; its size is known before it is copied."""
    cell = value.value if hasattr(value, "index") else value
    if cell is not None and cell.is_valid and cell.as_buffer().size > LINE_LIMIT:
        raise _Bad(f"longer than {LINE_LIMIT >> 20} MB")
    return None if cell is None else cell.as_py()


def _check_group(group: Any, field: str, name: str) -> None:
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema == field and not 0 <= column.total_uncompressed_size <= GROUP_LIMIT:
            raise Invalid(
                f"a row group of {name} unpacks to {column.total_uncompressed_size >> 20} MB, at most "
                f"{GROUP_LIMIT >> 20} expected: write it with smaller row groups"
            )


def _whole(line: bytes, file: IO[bytes]) -> bytes:
    """`line`, unless it is longer than a row may be; then the rest of it is passed over."""
    if len(line) <= LINE_LIMIT:
        return line
    while line and not line.endswith(b"\n"):
        line = file.readline(2**20)
    raise _Bad(f"longer than {LINE_LIMIT >> 20} MB")


def _usable(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise _Bad(f"its {field!r} is {'missing' if value is None else 'no text'}")
    if "\0" in value:
        raise _Bad("its text holds a zero byte")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise _Bad("its text holds half a character (a lone surrogate)") from None
    if size > LINE_LIMIT:
        raise _Bad(f"longer than {LINE_LIMIT >> 20} MB")
    return value


def _piece(text: str, after: int, skipped: Skipped) -> Iterator[Piece]:
    if text.strip():
        skipped.used += 1
        yield Piece(text, aside(text.encode()), True, after)

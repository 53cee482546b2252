"""Reads one Parquet file, alone in a process: damage can make the library that reads it abort.

A file of a kilobyte can stand for terabytes, so nothing is unpacked before its size is known: first the page headers of
the column are read (`corpus_pages`), then cells stay indexes into a dictionary until each is known to be of a size.
What remains is bounded by the process's memory.

Run as `python -m tessera.models.corpus_parquet_child PATH NAME FIELD OFFSET`. Writes frames: a kind (1 byte), a length
(4, little-endian), that many bytes. `T` is a row's text, `B` says why a row is bad, `X` why the file is, `E` ends it.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tessera.core.errors import Invalid
from tessera.models.corpus_pages import scan_pages
from tessera.models.corpus_rows import LINE_LIMIT, BadRow, usable

__all__ = ["frames"]

GROUP_LIMIT = 512 * 2**20  # bytes of a row group's text, unpacked
BATCH_ROWS = 1024
UNPACK_LIMIT = 1_000  # times the file's size; real text shrinks to a third, tables of it to a fiftieth
UNPACK_FREE = 64 * 2**20  # bytes that any file may unpack to
FOOTER_LIMIT = 64 * 2**20  # bytes
MEMORY_LIMIT = 4 * 2**30  # bytes of address space
REASON_LIMIT = 1000  # bytes


def frames(path: Path, name: str, field: str, offset: int) -> Iterator[tuple[bytes, str]]:
    """Kind and text of each row from `offset` on. Raises: Invalid, and whatever damage makes pyarrow raise."""
    unpacked, allowed = 0, UNPACK_FREE + UNPACK_LIMIT * path.stat().st_size
    for cell in _cells(path, name, field, offset):
        try:
            text = _text(cell, field)
        except BadRow as error:
            yield b"B", str(error)
            continue
        unpacked += len(text) + 1  # blank rows cost time as well
        if unpacked > allowed:
            raise Invalid(f"{name} unpacks to over {UNPACK_LIMIT} times its size: not read any further")
        yield b"T", text


def main(path: str, name: str, field: str, offset: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = sys.stdout.buffer
    try:
        for kind, text in frames(Path(path), name, field, int(offset)):
            _write(out, kind, text)
        _write(out, b"E", "")
    except Invalid as error:
        _write(out, b"X", error.message[:REASON_LIMIT])
    except Exception as error:  # noqa: BLE001  whatever the damage did, this process was made to find out
        reason = f"{type(error).__name__}: {error}"[: REASON_LIMIT // 4]
        _write(out, b"X", f"{name} is no sound Parquet file: {reason}")
    out.flush()


def _write(out: IO[bytes], kind: bytes, text: str) -> None:
    data = text.encode(errors="replace")
    out.write(kind + len(data).to_bytes(4, "little") + data)


def _cells(path: Path, name: str, field: str, offset: int) -> Iterator[Any]:
    """The cells from row `offset` on, as scalars that are not copied yet; None for a missing one."""
    from pyarrow.parquet import ParquetFile

    limits = {"thrift_string_size_limit": FOOTER_LIMIT, "thrift_container_size_limit": 10**6}
    with ParquetFile(path, **limits) as plain:
        _check_column(plain, name, field)
        # As a dictionary: the same long text in every row, a few bytes on disk, must not be written out.
        with ParquetFile(path, read_dictionary=[field], **limits) as file:
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                if offset >= facts.num_rows:
                    offset -= facts.num_rows
                    continue
                front_coded = _check_group(path, facts, name, field)
                reader, at_once = (plain, 1) if front_coded else (file, BATCH_ROWS)
                batches = reader.iter_batches(at_once, row_groups=[group], columns=[field], use_threads=False)
                for batch in batches:
                    passed = min(offset, batch.num_rows)
                    offset -= passed
                    yield from _scalars(batch.column(0), passed, name)


def _check_column(file: Any, name: str, field: str) -> None:
    import pyarrow

    found = file.schema_arrow
    if field not in found.names:
        columns = ", ".join(str(column)[:40] for column in found.names[:10])
        raise Invalid(f"{name} has no column {field!r}: choose one of {columns}")
    kind = found.field(field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise Invalid(f"the column {field!r} of {name} holds {kind}, text expected")


def _check_group(path: Path, group: Any, name: str, field: str) -> bool:
    """Whether its text is front-coded: a batch then holds more than it unpacks to, a row does not.

    Raises `Invalid` for a group that unpacks to too much.
    """
    front_coded = False
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema != field:
            continue
        start = column.data_page_offset
        if column.has_dictionary_page and column.dictionary_page_offset is not None:
            start = min(start, column.dictionary_page_offset)
        with path.open("rb") as raw:
            try:
                pages = scan_pages(raw, start, column.total_compressed_size)
            except Invalid as error:
                raise Invalid(f"{name} is no sound Parquet file: {error.message}") from error
        if pages.unpacked_bytes > GROUP_LIMIT:
            raise Invalid(
                f"a row group of {name} unpacks to {pages.unpacked_bytes >> 20} MB, at most "
                f"{GROUP_LIMIT >> 20} expected: write it with smaller row groups"
            )
        front_coded = front_coded or pages.front_coded
    return front_coded


def _scalars(column: Any, start: int, name: str) -> Iterator[Any]:
    if not hasattr(column, "indices"):
        yield from column.slice(start)
        return
    texts = column.dictionary
    for index in column.indices.slice(start).to_pylist():
        if index is not None and not 0 <= index < len(texts):
            raise Invalid(f"{name} is no sound Parquet file: it refers to text {index} of {len(texts)}")
        yield None if index is None else texts[index]


def _text(cell: Any, field: str) -> str:
    """Raises: BadRow."""
    if cell is not None and cell.is_valid and cell.as_buffer().size > LINE_LIMIT:
        raise BadRow(f"longer than {LINE_LIMIT >> 20} MB")
    try:
        return usable(None if cell is None else cell.as_py(), field)
    except UnicodeDecodeError as error:
        raise BadRow(f"no UTF-8: {error.reason}") from None


if __name__ == "__main__":
    main(*sys.argv[1:])

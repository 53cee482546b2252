"""What the pages of a Parquet column say about themselves, read before anything is unpacked.

A file's footer may claim little while a page's header claims gigabytes, and it is the page that a reader believes. So
the headers are read here first: thrift's compact protocol, of which only their shape matters.
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift (PageHeader)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

from tessera.core.errors import Invalid

__all__ = ["Pages", "scan_pages"]

HEADER_LIMIT = 2**20  # bytes of one header; statistics may lie in it
PAGES_LIMIT = 100_000
DEPTH_LIMIT = 8
FRONT_CODED = 7  # DELTA_BYTE_ARRAY: each value takes the beginning of the one before it

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
_INTEGERS = (4, 5, 6)


@dataclass(frozen=True, slots=True)
class Pages:
    """All pages of a column in one row group."""

    unpacked_bytes: int
    front_coded: bool  # a value's size is then no part of what the page unpacks to


def scan_pages(file: IO[bytes], start: int, size: int) -> Pages:
    """The pages in `size` bytes from `start` on. Raises: Invalid for what is no chain of pages that fills them."""
    unpacked, front_coded, place, end = 0, False, start, start + size
    for _ in range(PAGES_LIMIT):
        if place == end:
            return Pages(unpacked, front_coded)
        file.seek(place)
        header = _Compact(file.read(min(HEADER_LIMIT, end - place)))
        fields = header.struct(0)
        plain, packed = fields.get(2), fields.get(3)
        if type(plain) is not int or type(packed) is not int or plain < 0 or packed < 0:
            raise Invalid("a page without sizes")
        encodings = (_inner(fields, 5, 2), _inner(fields, 8, 4))  # of a data page, of version 1 or 2
        front_coded = front_coded or FRONT_CODED in encodings
        unpacked += plain
        place += header.place + packed
        if place > end:
            raise Invalid("a page that goes on beyond its column")
    raise Invalid(f"over {PAGES_LIMIT} pages in a row group")


def _inner(fields: dict[int, Any], number: int, inner: int) -> object:
    value = fields.get(number)
    return value.get(inner) if isinstance(value, dict) else None


class _Compact:
    """Values in thrift's compact protocol. Lists and maps are passed over."""

    def __init__(self, data: bytes) -> None:
        self._data, self.place = data, 0

    def struct(self, depth: int) -> dict[int, Any]:
        if depth > DEPTH_LIMIT:
            raise Invalid("a page header that is nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._signed()
            fields[number] = self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int, *, in_list: bool = False) -> Any:
        if kind in (_TRUE, _FALSE):
            return self._byte() if in_list else kind == _TRUE
        if kind in _INTEGERS:
            return self._signed()
        if kind == _BYTE:
            return self._byte()
        if kind == _DOUBLE:
            return self._skip(8)
        if kind == _BINARY:
            return self._skip(self._unsigned())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 != 15 else self._unsigned()
            return self._many(count, (head & 15,), depth)
        if kind == _MAP:
            count = self._unsigned()
            kinds = self._byte() if count else 0
            return self._many(count, (kinds >> 4, kinds & 15), depth)
        raise Invalid(f"a page header with a value of kind {kind}")

    def _many(self, count: int, kinds: tuple[int, ...], depth: int) -> None:
        if depth > DEPTH_LIMIT or count > len(self._data):  # each takes a byte at least
            raise Invalid("a page header with a list that cannot be")
        for _ in range(count):
            for kind in kinds:
                self._value(kind, depth + 1, in_list=True)

    def _byte(self) -> int:
        if self.place >= len(self._data):
            raise Invalid("a page header that is cut short")
        self.place += 1
        return self._data[self.place - 1]

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self.place:
            raise Invalid("a page header that is cut short")
        self.place += count

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise Invalid("a number of over ten bytes in a page header")

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 if value % 2 == 0 else -(value >> 1) - 1

"""Server-sent events out of bytes, as they arrive."""

from __future__ import annotations

from collections.abc import Iterator

from tessera.core.errors import Unavailable

__all__ = ["Events"]


class Events:
    """Cuts a byte stream into the data of its events. Never holds more than one event's bytes, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._line = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The data of each event that `chunk` completes. Raises: Unavailable for one that is too long."""
        *lines, self._line = (self._line + chunk).split(b"\n")
        for line in lines:
            if data := self._take(line.removesuffix(b"\r")):
                yield data
        if len(self._line) + self._size > self._limit:
            raise Unavailable(f"the upstream sent an event of more than {self._limit} bytes")

    def _take(self, line: bytes) -> bytes:
        """An empty line ends an event; comments and other fields than data say nothing to us."""
        if not line:
            data = b"\n".join(self._data)
            self._data, self._size = [], 0
            return data
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            self._size += len(line)
        return b""

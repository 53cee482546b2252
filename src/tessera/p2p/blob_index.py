"""What a blob consists of, and how it is named.

    index = canonical JSON {"chunk": 1048576, "sha256": [hex of each chunk], "size": n}
    id    = SHA-256 of the index

So an id fixes every byte, a chunk can be checked as soon as it is whole, and two machines that cut the same bytes come
to the same id. Vectors: specs/blobs.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tessera.core import encoding
from tessera.core.errors import Invalid, Missing
from tessera.core.hashing import sha256
from tessera.core.ids import BlobId, parse_blob_id

__all__ = ["CHUNK_BYTES", "INDEX_LIMIT", "MAX_CHUNKS", "BlobIndex"]

CHUNK_BYTES = 1 << 20
MAX_CHUNKS = 1 << 17  # 128 GiB
INDEX_LIMIT = 16 + 67 * MAX_CHUNKS + 64  # bytes: 64 digits, two quotes and a comma for each chunk


@dataclass(frozen=True, slots=True)
class BlobIndex:
    """The size of a blob and the hash of each of its chunks."""

    size: int  # bytes
    chunks: tuple[bytes, ...]  # SHA-256 of each

    def to_bytes(self) -> bytes:
        hashes = [chunk.hex() for chunk in self.chunks]
        return encoding.encode({"chunk": CHUNK_BYTES, "sha256": hashes, "size": self.size})

    @property
    def id(self) -> BlobId:
        return BlobId(sha256(self.to_bytes()).hex())

    def chunk_size(self, number: int) -> int:
        """Bytes of chunk `number`: all are full but the last. Raises `Missing` when there is no such chunk."""
        if not 0 <= number < len(self.chunks):
            raise Missing(f"chunk {number} of a blob of {len(self.chunks)} chunks")
        return min(CHUNK_BYTES, self.size - number * CHUNK_BYTES)

    def fits(self, number: int, data: bytes | memoryview) -> bool:
        return len(data) == self.chunk_size(number) and hashlib.sha256(data).digest() == self.chunks[number]

    @classmethod
    def parse(cls, blob: BlobId, data: bytes) -> BlobIndex:
        """Raises `Invalid` unless `data` is the index that `blob` names."""
        if len(data) > INDEX_LIMIT or sha256(data).hex() != blob:
            raise Invalid(f"these {len(data)} bytes are not the index of blob {blob[:16]}…")
        value = encoding.decode(data, INDEX_LIMIT)
        if not isinstance(value, dict) or value.keys() != {"chunk", "sha256", "size"}:
            raise Invalid("a blob's index has the fields chunk, sha256, size")
        size, hashes = value["size"], value["sha256"]
        if value["chunk"] != CHUNK_BYTES or type(size) is not int or size < 0 or not isinstance(hashes, list):
            raise Invalid(f"a blob's index has chunks of {CHUNK_BYTES} bytes, a size and a list of hashes")
        if len(hashes) != -(-size // CHUNK_BYTES) or len(hashes) > MAX_CHUNKS:
            raise Invalid(f"{size} bytes have {-(-size // CHUNK_BYTES)} chunks, the index lists {len(hashes)}")
        return cls(size, tuple(bytes.fromhex(parse_blob_id(text)) for text in hashes))

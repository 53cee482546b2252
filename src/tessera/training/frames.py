"""What crosses a boundary link: frames of 8 header bytes and a payload, in both directions of one stream.

down:  FORWARD  codes of one microbatch      EVALUATE  the same for a validation window      DONE  no more steps
up:    GRADIENT codes of one microbatch
both:  RECEIPT  digest, version (32 bytes each) and signature (64 bytes) of one step
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

from tessera.core.errors import Misbehaviour

__all__ = ["RECEIPT_BYTES", "Frame", "Kind"]

HEADER = struct.Struct(">cxHI")  # kind, padding, index, step
RECEIPT_BYTES = 32 + 32 + 64


class Kind(Enum):
    FORWARD = b"F"
    GRADIENT = b"G"
    EVALUATE = b"E"
    RECEIPT = b"R"
    DONE = b"D"


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    step: int
    index: int
    payload: bytes = b""

    def to_bytes(self) -> bytes:
        return HEADER.pack(self.kind.value, self.index, self.step) + self.payload

    @classmethod
    def parse(cls, data: bytes) -> Frame:
        """Raises `Misbehaviour` for a frame that no honest peer sends."""
        if len(data) < HEADER.size:
            raise Misbehaviour(f"a frame of {len(data)} bytes, at least {HEADER.size} expected", evidence=data.hex())
        kind, index, step = HEADER.unpack_from(data)
        try:
            return cls(Kind(kind), step, index, data[HEADER.size :])
        except ValueError as error:
            raise Misbehaviour(f"a frame of unknown kind {kind!r}", evidence=data[: HEADER.size].hex()) from error

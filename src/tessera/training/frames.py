"""What crosses a boundary link: frames of 12 header bytes and a payload, in both directions of one stream.

down:  FORWARD   codes of one microbatch      EVALUATE  the same for a validation window, which nobody answers
up:    GRADIENT  codes of one microbatch
both:  RECEIPT   microbatches, digest, version and signature of one step

A frame names the term of the lead who asked for it, so that what an earlier one asked for is never counted.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

from tessera.core.errors import Misbehaviour

__all__ = ["Frame", "Kind"]

HEADER = struct.Struct(">cxHII")  # kind, padding, index, step, term


class Kind(Enum):
    FORWARD = b"F"
    GRADIENT = b"G"
    EVALUATE = b"E"
    RECEIPT = b"R"


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    term: int
    step: int
    index: int
    payload: bytes = b""

    def to_bytes(self) -> bytes:
        return HEADER.pack(self.kind.value, self.index, self.step, self.term) + self.payload

    @classmethod
    def parse(cls, data: bytes) -> Frame:
        """Raises `Misbehaviour` for a frame that no honest peer sends."""
        if len(data) < HEADER.size:
            raise Misbehaviour(f"a frame of {len(data)} bytes, at least {HEADER.size} expected", evidence=data.hex())
        kind, index, step, term = HEADER.unpack_from(data)
        try:
            return cls(Kind(kind), term, step, index, data[HEADER.size :])
        except ValueError as error:
            raise Misbehaviour(f"a frame of unknown kind {kind!r}", evidence=data[: HEADER.size].hex()) from error

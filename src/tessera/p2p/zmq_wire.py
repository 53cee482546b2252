"""The messages of a zmq link: nine bytes of header, then the payload.

    header = kind (1) ‖ stream (8, big-endian)

Kinds under 16 concern the link and have stream 0. The dialler's streams are odd, the other end's even; each end counts
upwards, and a stream begins with its first data.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from tessera.core.errors import Misbehaviour

__all__ = ["FRAME", "HEADER_BYTES", "MAX_FRAME", "Kind", "number", "pack", "pack_number", "unpack"]

FRAME = 64 * 1024  # bytes of data in one message
_HEADER = struct.Struct(">BQ")
_NUMBER = struct.Struct(">Q")
HEADER_BYTES = _HEADER.size
MAX_FRAME = HEADER_BYTES + FRAME


class Kind(IntEnum):
    GREETING = 1  # canonical JSON, signed; each end's first message
    REFUSAL = 2  # canonical JSON, {"error": …}: no link comes of this
    BEAT = 3  # nothing: shows the sender whether the other end is still there
    BYE = 4  # nothing more follows on this link; answered in kind
    DATA = 16
    END = 17  # of the sender's half of the stream
    CREDIT = 18  # a number: how many bytes of the stream were taken in so far
    RESET = 19  # a number: the sender drops its half
    STOP = 20  # a number: the sender no longer listens


def pack(kind: Kind, stream: int = 0, payload: bytes | memoryview = b"") -> bytes:
    return b"".join((_HEADER.pack(kind, stream), payload))


def pack_number(kind: Kind, stream: int, value: int) -> bytes:
    return _HEADER.pack(kind, stream) + _NUMBER.pack(value)


def unpack(message: bytes) -> tuple[Kind, int, memoryview]:
    """Raises `Misbehaviour` for what no peer of ours would send."""
    if not HEADER_BYTES <= len(message) <= MAX_FRAME:
        raise _misbehaves(f"a link message of {len(message)} bytes, not {HEADER_BYTES} to {MAX_FRAME}", message)
    code, stream = _HEADER.unpack_from(message)
    try:
        kind = Kind(code)
    except ValueError:
        raise _misbehaves(f"a link message of the unknown kind {code}", message) from None
    if (kind < Kind.DATA) != (stream == 0):
        raise _misbehaves(f"a {kind.name.lower()} on stream {stream}", message)
    return kind, stream, memoryview(message)[HEADER_BYTES:]


def number(payload: memoryview) -> int:
    if payload.nbytes != _NUMBER.size:
        raise _misbehaves(f"a number has {_NUMBER.size} bytes, not {payload.nbytes}", bytes(payload))
    return int(_NUMBER.unpack(payload)[0])


def _misbehaves(what: str, message: bytes) -> Misbehaviour:
    return Misbehaviour(what, evidence={"fault": what, "head": message[:64].hex()})

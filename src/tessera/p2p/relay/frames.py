"""The frames of iroh's relay protocol (versions 1 and 2), as far as a relay has to read and write them.

Every frame is one binary WebSocket message; its first byte is its kind. `specs/relay.md` says each field and where the
fact comes from.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import blake3
import nacl.exceptions
import nacl.signing

from tessera.core.errors import Invalid, Misbehaviour

__all__ = [
    "CHALLENGE_BYTES",
    "MAX_FRAME",
    "PEER_BYTES",
    "SUBPROTOCOLS",
    "Kind",
    "Status",
    "challenge_frame",
    "denial_frame",
    "prove",
    "restarting_frame",
    "status_frame",
    "verify_proof",
    "ws_header",
]

SUBPROTOCOLS = ("iroh-relay-v2", "iroh-relay-v1")  # the one we like best comes first
MAX_FRAME = 64 * 1024 + 64  # bytes: 64 KiB that a client may send in one frame, its kind and its address
PEER_BYTES = 32
CHALLENGE_BYTES = 16
SIGNATURE_BYTES = 64
_CONTEXT = "iroh-relay handshake v1 challenge signature"
_PROOF = struct.Struct(f">B{PEER_BYTES}sB{SIGNATURE_BYTES}s")  # kind, peer, length of what follows, signature


class Kind(IntEnum):
    CHALLENGE = 0
    PROOF = 1
    CONFIRMED = 2
    DENIED = 3
    SEND = 4  # peer, ECN byte, datagram
    SEND_BATCH = 5  # peer, ECN byte, u16 size of each, datagrams
    DELIVER = 6
    DELIVER_BATCH = 7
    GONE = 8  # peer
    PING = 9  # 8 bytes
    PONG = 10
    HEALTH = 11  # text; version 1 only
    RESTARTING = 12  # u32 ms until one may come back, u32 ms to go on trying
    STATUS = 13  # one byte; version 2 only


class Status(IntEnum):
    HEALTHY = 0
    REPLACED = 1  # somebody else proved the same key
    LIMITED = 2


_WORDS = {
    Status.HEALTHY: "healthy again",
    Status.REPLACED: "another connection proved the same key",
    Status.LIMITED: "you send more than this relay's rate for each peer",
}


def ws_header(size: int) -> bytes:
    """The WebSocket header of an unmasked, whole binary message (RFC 6455, 5.2)."""
    if size < 126:
        return bytes((0x82, size))
    return struct.pack(">BBH", 0x82, 126, size) if size < 65_536 else struct.pack(">BBQ", 0x82, 127, size)


def challenge_frame(challenge: bytes) -> bytes:
    return bytes((Kind.CHALLENGE,)) + challenge


def denial_frame(reason: str) -> bytes:
    text = reason.encode()[:120]  # a length below 128 is one byte
    return bytes((Kind.DENIED, len(text))) + text


def status_frame(status: Status, version: int) -> bytes:
    if version == 1:
        return bytes((Kind.HEALTH,)) + _WORDS[status].encode()
    return bytes((Kind.STATUS, status))


def restarting_frame(return_in_ms: int, try_for_ms: int) -> bytes:
    return struct.pack(">BII", Kind.RESTARTING, return_in_ms, try_for_ms)


def prove(seed: bytes, challenge: bytes) -> bytes:
    """A client's answer to a challenge."""
    key = nacl.signing.SigningKey(seed)
    signature = key.sign(_digest(challenge)).signature
    return _PROOF.pack(Kind.PROOF, key.verify_key.encode(), SIGNATURE_BYTES, signature)


def verify_proof(payload: bytes, challenge: bytes) -> bytes:
    """The 32 bytes of the key that signed. Raises: Invalid for another frame, Misbehaviour for a wrong signature.

    What is signed is a key derived from the challenge, so that a relay cannot obtain a signature of its own choice.
    """
    if len(payload) != _PROOF.size:
        raise Invalid(f"a proof has {_PROOF.size} bytes, not {len(payload)}")
    kind, peer, length, signature = _PROOF.unpack(payload)
    if kind != Kind.PROOF or length != SIGNATURE_BYTES:
        raise Invalid(f"expected a proof (kind {Kind.PROOF:d}), got kind {kind}")
    try:
        nacl.signing.VerifyKey(peer).verify(_digest(challenge), signature)
    except (nacl.exceptions.BadSignatureError, ValueError, TypeError) as error:
        raise Misbehaviour("the proof is not this peer's", evidence=payload.hex()) from error
    return bytes(peer)


def _digest(challenge: bytes) -> bytes:
    return blake3.blake3(challenge, derive_key_context=_CONTEXT).digest()

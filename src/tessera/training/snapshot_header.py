"""A snapshot's header: which state it is, who holds which piece of it, and the hash of each, signed by its maker.

A header is small, and no secret. It names each holder with the hashes of his fragment and of his share of the key, so
that he can take his own piece only, and is named when he serves something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId, parse_peer_id, parse_run_id
from tessera.core.signing import PeerKey, verify_peer
from tessera.training.erasure import check_code, piece_bytes

__all__ = ["Moment", "Piece", "SnapshotHeader", "is_overtaken"]

DOMAIN = "snapshot"
STATE_LIMIT = 1 << 40  # bytes of a state
MAX_STAGES = 1024
SEGMENT = 4 << 20  # bytes of a state that are encrypted and cut at once
TAG = 16  # bytes that the encryption adds to each segment
_FIELDS = {"maker", "needed", "pieces", "run_id", "session", "signature", "size", "stage", "state", "step"}
_HEX_64, _HEX_128 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True, slots=True, order=True)
class Moment:
    """When a state was reached. A run that goes back to an earlier step starts a session with a higher number."""

    session: int
    step: int


def is_overtaken(moment: Moment, others: Iterable[Moment]) -> bool:
    """Whether the run went back and took another way: some later session was at this step, or before it.

    >>> is_overtaken(Moment(1, 150), [Moment(2, 110)])
    True
    >>> is_overtaken(Moment(1, 100), [Moment(2, 110)])
    False
    """
    return any(other.session > moment.session and other.step <= moment.step for other in others)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one holder has: a fragment of the state, and a share of the key."""

    holder: PeerId
    fragment: str  # SHA-256, 64 hex digits
    share: str  # SHA-256 of the words in UTF-8


@dataclass(frozen=True)
class SnapshotHeader:
    """One snapshot of one stage. `signature` is empty until it is signed."""

    run_id: RunId
    stage: int
    session: int
    step: int
    size: int  # bytes of the state
    state: str  # SHA-256 of the state
    needed: int
    pieces: tuple[Piece, ...]  # by number
    maker: PeerId
    signature: bytes = field(default=b"", repr=False)

    @property
    def moment(self) -> Moment:
        return Moment(self.session, self.step)

    @property
    def count(self) -> int:
        return len(self.pieces)

    @property
    def segments(self) -> int:
        return -(-self.size // SEGMENT)

    @property
    def fragment_bytes(self) -> int:
        """Bytes of each fragment: (size + 16 · segments) / k, each segment's share rounded up."""
        last = self.segment_bytes(self.segments - 1)
        whole = piece_bytes(SEGMENT + TAG, self.needed)
        return (self.segments - 1) * whole + piece_bytes(last + TAG, self.needed)

    @cached_property
    def digest(self) -> str:
        """The snapshot's name: SHA-256 of what is signed."""
        return sha256(self.message()).hex()

    def segment_bytes(self, number: int) -> int:
        """How much of the state segment `number` holds."""
        return min(SEGMENT, self.size - number * SEGMENT)

    def number_of(self, peer: PeerId) -> int:
        """Which piece is `peer`'s. Raises `Invalid` when none is."""
        for number, piece in enumerate(self.pieces):
            if piece.holder == peer:
                return number
        raise Invalid(f"no piece of this snapshot is for {peer[:16]}…")

    def core(self) -> bytes:
        """What the key is bound to: everything that says which state this is."""
        value = {"run_id": self.run_id, "stage": self.stage, "session": self.session, "step": self.step}
        return encoding.encode({**value, "size": self.size, "state": self.state, "needed": self.needed})

    def message(self) -> bytes:
        return encoding.encode({key: value for key, value in self.to_value().items() if key != "signature"})

    def signed_by(self, key: PeerKey) -> SnapshotHeader:
        """Raises `Invalid` unless `key` is the maker's, and the header one that can be read."""
        if key.id != self.maker:
            raise Invalid(f"the maker is {self.maker[:16]}…, not {key.id[:16]}…")
        signed = replace(self, signature=key.sign(DOMAIN, self.message()))
        return SnapshotHeader.from_value(signed.to_value())

    def to_value(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "stage": self.stage,
            "session": self.session,
            "step": self.step,
            "size": self.size,
            "state": self.state,
            "needed": self.needed,
            "pieces": [[piece.holder, piece.fragment, piece.share] for piece in self.pieces],
            "maker": self.maker,
            "signature": self.signature.hex(),
        }

    @classmethod
    def from_value(cls, value: object) -> SnapshotHeader:
        """From a peer. Raises `Invalid` unless every field is in its range, and the maker has signed it."""
        if not isinstance(value, dict) or value.keys() != _FIELDS:
            raise Invalid(f"a snapshot's header has the fields {', '.join(sorted(_FIELDS))}")
        rows, signature = value["pieces"], _match(_HEX_128, "signature", value["signature"])
        if not isinstance(rows, list):
            raise Invalid("a snapshot's pieces are a list")
        header = cls(
            run_id=parse_run_id(value["run_id"]),
            stage=_integer("stage", value["stage"], 0, MAX_STAGES - 1),
            session=_integer("session", value["session"], 0, 2**53 - 1),
            step=_integer("step", value["step"], 1, 2**53 - 1),
            size=_integer("size", value["size"], 1, STATE_LIMIT),
            state=_match(_HEX_64, "state", value["state"]),
            needed=_integer("needed", value["needed"], 2, len(rows)),
            pieces=tuple(_piece(row) for row in rows),
            maker=parse_peer_id(value["maker"]),
            signature=bytes.fromhex(signature),
        )
        check_code(header.needed, header.count)
        holders = {piece.holder for piece in header.pieces}
        if len(holders) != header.count or header.maker in holders:
            raise Invalid("a snapshot has one piece for each of its holders, and none for its maker")
        verify_peer(header.maker, DOMAIN, header.message(), header.signature)
        return header


def _piece(row: object) -> Piece:
    if not isinstance(row, list) or len(row) != 3:
        raise Invalid("a snapshot's piece is a holder and two hashes")
    return Piece(parse_peer_id(row[0]), _match(_HEX_64, "fragment", row[1]), _match(_HEX_64, "share", row[2]))


def _integer(name: str, value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise Invalid(f"a snapshot's {name} is a whole number from {least} to {most}, not {str(value)[:40]}")
    return value


def _match(pattern: re.Pattern[str], name: str, value: object) -> str:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise Invalid(f"a snapshot's {name} is lower-case hex, not {str(value)[:80]!r}")
    return value

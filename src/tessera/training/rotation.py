"""The secret of a boundary, and when its owners turn by it.

One owner of a boundary makes 32 random bytes and seals them for each of the others: all replicas of the stage before it
and of the stage after it. With them each derives the same rotations (`tessera.models.rotation`), and nobody else does.
The run goes on with the newest secret whose `since` has come, so that a worker who leaves knows nothing of what follows
once somebody has made another. Fingerprints are compared before a secret is used: who was given another key than the
rest would break the boundary for all.

    {"boundary", "by", "run", "sealed": 80 bytes, "signature": by's, over the rest, "since", "to"}   canonical, in hex

A turn belongs to the end of a step: whoever holds parameters of step s has turned s // every times. So a checkpoint, a
replica that joins and an audit that replays a step need not be told. Whoever goes back to an older checkpoint needs the
secrets of that time again: keep them as long as the checkpoints.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import nacl.exceptions
import nacl.public

from tessera.core import encoding
from tessera.core.errors import Invalid, Missing, Refused
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId, parse_peer_id, parse_run_id
from tessera.core.signing import PeerKey, verify_peer
from tessera.models.rotation import SECRET_BYTES, boundary_rotation
from tessera.models.trainer import StageTrainer
from tessera.p2p.zmq_keys import CurveKeys, curve_key

__all__ = ["SEALED_SECRET_LIMIT", "BoundarySecret", "turn_after_step"]

DOMAIN = "boundary-secret"
SEALED_SECRET_LIMIT = 1024  # bytes of a message
_FIELDS = {"boundary", "by", "run", "sealed", "signature", "since", "to"}
_SEALED_BYTES = SECRET_BYTES + 48  # a sealed box adds a key and a tag
_MAX_BOUNDARY, _MAX_EPOCH = 511, 2**53


@dataclass(frozen=True, slots=True)
class BoundarySecret:
    """What the owners of boundary `boundary` share from rotation epoch `since` on."""

    run: RunId
    boundary: int  # between the stages `boundary` and `boundary` + 1
    since: int
    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        for name, value, limit in (("boundary", self.boundary, _MAX_BOUNDARY), ("since", self.since, _MAX_EPOCH)):
            if type(value) is not int or not 0 <= value < limit:
                raise Invalid(f"a secret's {name} is a number from 0 to {limit - 1}, not {str(value)[:40]}")
        if len(self.key) != SECRET_BYTES:
            raise Invalid(f"a boundary's secret has {SECRET_BYTES} bytes, not {len(self.key)}")

    @classmethod
    def create(cls, run: RunId, boundary: int, since: int) -> BoundarySecret:
        return cls(run, boundary, since, secrets.token_bytes(SECRET_BYTES))

    @property
    def fingerprint(self) -> str:
        """64 hex digits that owners compare; they tell nothing about the key."""
        name = encoding.encode(["tessera/boundary-secret/1", self.run, self.boundary, self.since])
        return sha256(name, self.key).hex()

    def seal(self, to: PeerId, by: PeerKey) -> bytes:
        """A message that only `to` can open, and that proves who made it: libsodium's sealed box, signed.

        The box has a key of its own, so that taking the maker's key later opens nothing. Raises: Invalid: `to` is no
        ed25519 key.
        """
        box = nacl.public.SealedBox(nacl.public.PublicKey(curve_key(to)))
        body = self._body(by.id, to, box.encrypt(self.key))
        return encoding.encode({**body, "signature": by.sign(DOMAIN, encoding.encode(body)).hex()})

    @classmethod
    def open(cls, data: bytes, key: PeerKey, makers: Collection[PeerId]) -> BoundarySecret:
        """What somebody sealed for `key`.

        Args:
            makers: who may have made it.

        Raises: Refused: another maker.  Invalid: not such a message, meant for another, forged or changed.
        """
        value = _parse(data)
        maker = parse_peer_id(value["by"])
        if maker not in makers:
            raise Refused(f"{maker[:16]}… does not make this boundary's secrets", rule="boundary-owner")
        if value["to"] != key.id:
            raise Invalid("the boundary's secret is sealed for another peer")
        sealed, signature = (
            encoding.hex_bytes(value["sealed"], _SEALED_BYTES),
            encoding.hex_bytes(value.pop("signature"), 64),
        )
        verify_peer(maker, DOMAIN, encoding.encode(value), signature)
        try:
            secret = nacl.public.SealedBox(nacl.public.PrivateKey(CurveKeys.of(key).secret)).decrypt(sealed)
        except nacl.exceptions.CryptoError as error:
            raise Invalid("the boundary's secret is sealed with another key than ours, or damaged") from error
        return cls(parse_run_id(value["run"]), value["boundary"], value["since"], secret)

    def _body(self, by: PeerId, to: PeerId, sealed: bytes) -> dict[str, Any]:
        return {
            "boundary": self.boundary, "by": by, "run": self.run, "sealed": sealed.hex(), "since": self.since, "to": to
        }  # fmt: skip


def turn_after_step(trainer: StageTrainer, run: RunId, known: Collection[BoundarySecret], every: int) -> int | None:
    """Turns the boundaries of a stage when their time has come. Call after each `finish_step`, before anything is
    saved or sent of the step that opens.

    Args:
        known: secrets of both boundaries, old ones too.
        every: steps between two turns; 0 = never.

    Returns: the epoch that begins; None when none does.

    Raises: Missing: no secret of a boundary for this epoch; nothing has turned.  Invalid: `every` is negative, or the
        codec has nothing to turn.
    """
    if every < 0:
        raise Invalid(f"boundaries turn every so many steps, or 0 for never, not {every}")
    if not every or trainer.step % every:
        return None
    epoch, stage = trainer.step // every, trainer.stage
    turns = [
        boundary_rotation(_newest(known, run, boundary, epoch).key, run, boundary, epoch, trainer.spec.codec.k)
        if 0 <= boundary < trainer.spec.stages - 1
        else None
        for boundary in (stage.index - 1, stage.index)
    ]
    trainer.rotate(entering=turns[0], leaving=turns[1])
    return epoch


def _newest(known: Collection[BoundarySecret], run: RunId, boundary: int, epoch: int) -> BoundarySecret:
    found = [s for s in known if s.run == run and s.boundary == boundary and s.since <= epoch]
    if not found:
        raise Missing(f"no secret of boundary {boundary} for epoch {epoch} is known: ask its other owners for theirs")
    return max(found, key=lambda secret: secret.since)


def _parse(data: bytes) -> dict[str, Any]:
    value = encoding.decode(data, SEALED_SECRET_LIMIT)
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise Invalid(f"a sealed secret has the fields {', '.join(sorted(_FIELDS))}")
    return value

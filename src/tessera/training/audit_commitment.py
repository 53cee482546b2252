"""What a worker promises before anybody draws: his commitment to a step, and the receipts that count because of it.

Invariants: a receipt that its worker's commitment does not name earns nothing and proves nothing; a digest over
messages names each message's microbatch, so that messages cannot change places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId, parse_peer_id
from tessera.core.signing import PeerKey, verify_peer
from tessera.training.audit import MAX_MICROBATCHES, check_place
from tessera.training.receipts import payloads_digest

__all__ = [
    "MAX_FLOWS",
    "Commitment",
    "Direction",
    "ReceiptParser",
    "Sent",
    "SignedReceipt",
    "accepted",
    "check_microbatches",
    "check_payloads",
]

Direction = Literal["forward", "backward"]
COMMITMENT = "commitment"
MAX_FLOWS = 64  # receipts about one worker's step: four roles, sixteen neighbours for each


class SignedReceipt(Protocol):
    """`signer` says that `worker`'s output for `microbatches` arrived, and with which parameters he himself worked."""

    @property
    def run_id(self) -> RunId: ...
    @property
    def step(self) -> int: ...
    @property
    def worker(self) -> PeerId: ...
    @property
    def signer(self) -> PeerId: ...
    @property
    def direction(self) -> Direction: ...
    @property
    def microbatches(self) -> tuple[int, ...]: ...
    @property
    def digest(self) -> bytes: ...
    @property
    def version(self) -> bytes: ...
    def check(self) -> None: ...
    def to_row(self) -> list[Any]: ...


ReceiptParser = Callable[[RunId, object], SignedReceipt]


@dataclass(frozen=True, slots=True)
class Sent:
    """What went to one neighbour in one step: the digest that his receipt must have."""

    direction: Direction
    peer: PeerId
    digest: bytes


@dataclass(frozen=True, slots=True)
class Commitment:
    """What a worker says of a step himself, before anybody draws; it travels with his part of the gradient."""

    run_id: RunId
    step: int
    worker: PeerId
    version: bytes  # of the parameters that the step began with, `params_digest`
    microbatches: tuple[int, ...]  # those in his sum of gradients, ascending
    sent: tuple[Sent, ...]  # what each neighbour got
    losses: bytes  # `payloads_digest` of the packed losses on the last stage; zeros elsewhere
    update: bytes  # SHA-256 of his sum of gradients, as he sends it
    signature: bytes = b""

    def message(self) -> bytes:
        return encoding.encode([self.run_id, *self._facts()])

    def signed_by(self, key: PeerKey) -> Commitment:
        return replace(self, worker=key.id, signature=key.sign(COMMITMENT, replace(self, worker=key.id).message()))

    def check(self) -> None:
        """Raises: Misbehaviour unless the worker signed it."""
        try:
            verify_peer(self.worker, COMMITMENT, self.message(), self.signature)
        except Invalid as error:
            raise Misbehaviour(
                f"a commitment for step {self.step} is forged: {error}", evidence=self.to_row()
            ) from error

    def to_row(self) -> list[Any]:
        return [*self._facts(), self.signature.hex()]

    @classmethod
    def from_row(cls, run_id: RunId, worker: PeerId, row: object) -> Commitment:
        """Raises: Invalid for a row of another shape, or of another worker. The signature is not checked here."""
        if not isinstance(row, list) or len(row) != 8 or row[1] != worker:
            raise Invalid(f"a commitment of {worker[:16]}… is a list of 8 fields that names him")
        step, _, version, microbatches, sent, losses, update, signature = row
        check_place(step, None)
        if not isinstance(sent, list) or len(sent) > MAX_FLOWS:
            raise Invalid(f"a commitment names at most {MAX_FLOWS} neighbours")
        return cls(
            run_id, step, worker, encoding.hex_bytes(version, 32), check_microbatches(microbatches),
            tuple(map(_sent, sent)), encoding.hex_bytes(losses, 32), encoding.hex_bytes(update, 32),
            encoding.hex_bytes(signature, 64),
        )  # fmt: skip

    def names(self, receipt: SignedReceipt) -> bool:
        """Whether the worker says that he sent what the receipt says that the neighbour got."""
        place = (receipt.run_id, receipt.step, receipt.worker)
        got = Sent(receipt.direction, receipt.signer, receipt.digest)
        done = set(receipt.microbatches) <= set(self.microbatches)
        return place == (self.run_id, self.step, self.worker) and done and got in self.sent

    def _facts(self) -> list[Any]:
        sent = [[s.direction, s.peer, s.digest.hex()] for s in self.sent]
        return [
            self.step, self.worker, self.version.hex(), list(self.microbatches), sent, self.losses.hex(),
            self.update.hex(),
        ]  # fmt: skip


def accepted(receipts: Iterable[SignedReceipt], commitments: Iterable[Commitment]) -> list[SignedReceipt]:
    """The receipts that count: those that their worker's commitment names. Signatures were checked before."""
    promises = {(c.run_id, c.step, c.worker): c for c in commitments}
    named = ((r, promises.get((r.run_id, r.step, r.worker))) for r in receipts)
    return [receipt for receipt, promise in named if promise is not None and promise.names(receipt)]


def check_payloads(
    microbatches: Sequence[int], digest: bytes, hashes: Sequence[bytes], payloads: Mapping[int, bytes]
) -> None:
    """Raises: Invalid unless the hashes make up the digest, and each message is the one that its hash names."""
    if len(hashes) != len(microbatches):
        raise Invalid(f"{len(hashes)} hashes for {len(microbatches)} microbatches")
    named = dict(zip(microbatches, hashes, strict=True))
    if payloads_digest(named) != digest:
        raise Invalid("the hashes are not those that were signed")
    for index, payload in payloads.items():
        if named.get(index) != sha256(payload):
            raise Invalid(f"the message of microbatch {index} is not the one that was signed")


def check_microbatches(value: object) -> tuple[int, ...]:
    """Raises: Invalid unless these are microbatches of one step, ascending, each once."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MICROBATCHES:
        raise Invalid(f"microbatches are a list of 1 to {MAX_MICROBATCHES}")
    if any(type(i) is not int or not 0 <= i < MAX_MICROBATCHES for i in value) or value != sorted(set(value)):
        raise Invalid("microbatches are ascending numbers, each once")
    return tuple(value)


def _sent(row: object) -> Sent:
    if not isinstance(row, list) or len(row) != 3 or row[0] not in ("forward", "backward"):
        raise Invalid("what was sent is a direction, a peer and a digest")
    return Sent(row[0], parse_peer_id(row[1]), encoding.hex_bytes(row[2], 32))

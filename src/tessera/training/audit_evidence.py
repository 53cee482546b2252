"""What an audit stands on: signed receipts that fix every message, the messages, the worker's commitment.

A worker of stage s touches four messages of a microbatch, and each is fixed by somebody's signature:

    role           sent by        fixed by
    code_in        stage s - 1    the worker's receipt
    gradient_in    stage s + 1    the worker's receipt
    code_out       the worker     a receipt of stage s + 1 that the worker's commitment names
    gradient_out   the worker     a receipt of stage s - 1 that the worker's commitment names

A receipt counts, for credit and as evidence, when the worker's commitment names it (`accepted`): without that, a
neighbour could frame him by signing what he never sent. Two friends can still sign garbage for each other; then the
garbage is fixed as one's output, and does not replay. Inputs that a worker invents are receipts that their sender does
not accept. So all that a row of friends can agree on is what somebody computed from the token ids.

The last stage sends no code; the commitment fixes its losses. Stage 0 sends no gradient: its backward work shows in the
sum of gradients alone, which the commitment fixes and an audit of the whole step replays.

Invariants: the judge needs nothing but the evidence, the parameters that it names, the roster and the data; it is
deterministic up to kernels (`audit_judge`). Evidence that does not hold together is `Invalid`: it speaks against
whoever shows it.
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
from tessera.training.audit import MAX_MICROBATCHES, Draw, check_place, hex_bytes

__all__ = [
    "ROLES",
    "Commitment",
    "Evidence",
    "Flow",
    "Role",
    "Sent",
    "SignedReceipt",
    "accepted",
    "check_microbatches",
    "flow_role",
    "payloads_digest",
    "required_roles",
]

Direction = Literal["forward", "backward"]
Role = Literal["code_in", "code_out", "gradient_in", "gradient_out"]
ROLES: tuple[Role, ...] = ("code_in", "code_out", "gradient_in", "gradient_out")
COMMITMENT = "commitment"
MAX_FLOWS = 64  # receipts in one evidence: four roles, sixteen neighbours for each
HEAD_LIMIT = 8 * 2**20  # bytes


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
            run_id, step, worker, hex_bytes(version, 32), check_microbatches(microbatches), tuple(map(_sent, sent)),
            hex_bytes(losses, 32), hex_bytes(update, 32), hex_bytes(signature, 64),
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


@dataclass(frozen=True, slots=True)
class Flow:
    """One receipt, and what it fixes: the hash of every message under it, and the messages at issue."""

    receipt: SignedReceipt
    hashes: tuple[bytes, ...]  # SHA-256 of each message, in the order of the receipt's microbatches
    payloads: Mapping[int, bytes]  # by microbatch

    def check(self) -> None:
        """Raises: Misbehaviour: a forged receipt.  Invalid: hashes or messages that it does not fix."""
        self.receipt.check()
        check_payloads(self.receipt.microbatches, self.receipt.digest, self.hashes, self.payloads)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything about one audit but the parameters, which `version` names, and the token ids, which the run names.

    With a microbatch in the draw, its messages; without one, those of every microbatch in the commitment.
    """

    draw: Draw
    flows: tuple[Flow, ...]
    commitment: Commitment
    losses: tuple[bytes, ...] = ()  # packed, of every microbatch in the commitment, on the last stage
    gradient: bytes | None = None  # the worker's sum, as he sent it, for an audit of the update

    @property
    def worker(self) -> PeerId:
        return self.draw.worker

    @property
    def indices(self) -> tuple[int, ...]:
        """The microbatches at issue."""
        return self.commitment.microbatches if self.draw.index is None else (self.draw.index,)

    def digest(self) -> bytes:
        """A name for it: SHA-256 of the signed statements that fix all of it."""
        rows = [flow.receipt.to_row() for flow in self.flows]
        return sha256(encoding.encode([self.draw.run_id, self.draw.signature.hex(), rows, self.commitment.to_row()]))

    def messages(self, role: Role) -> dict[int, bytes]:
        """The messages at issue in one role, by microbatch."""
        found: dict[int, bytes] = {}
        for flow in self.flows:
            if flow_role(flow.receipt, self.worker) == role:
                found.update(flow.payloads)
        return {index: found[index] for index in self.indices if index in found}

    def check(self, stage: int, stages: int, stage_of: Callable[[PeerId], int | None]) -> None:
        """Everything but the replay.

        Args:
            stage_of: the roster, those who left included; None for strangers.

        Raises: Invalid, Misbehaviour: forged, torn, about another step, by the wrong neighbours, or incomplete.
        """
        lot, promise = self.draw, self.commitment
        lot.check()
        promise.check()
        if (promise.run_id, promise.step, promise.worker) != (lot.run_id, lot.step, lot.worker):
            raise Invalid("the commitment is of another step, worker or run than the draw")
        if stage_of(lot.worker) != stage or stage_of(lot.auditor) != stage:
            raise Invalid(f"worker and auditor both hold stage {stage}, it is said")
        if not set(self.indices) <= set(promise.microbatches):
            raise Invalid(f"microbatch {lot.index} is not in the worker's commitment")
        for flow in self.flows:
            self._check_flow(flow, stage, stage_of)
        for role in required_roles(stage, stages):
            if set(self.messages(role)) != set(self.indices):
                raise Invalid(f"the evidence lacks a {role} that a receipt fixes")
        if stage == stages - 1:
            check_payloads(promise.microbatches, promise.losses, tuple(map(sha256, self.losses)), {})
        if lot.index is None and (self.gradient is None or sha256(self.gradient) != promise.update):
            raise Invalid("an audit of the update needs the sum of gradients that was committed to")

    def _check_flow(self, flow: Flow, stage: int, stage_of: Callable[[PeerId], int | None]) -> None:
        flow.check()
        receipt, lot = flow.receipt, self.draw
        if (receipt.run_id, receipt.step) != (lot.run_id, lot.step):
            raise Invalid("a receipt is of another run or step than the draw")
        role = flow_role(receipt, lot.worker)
        if receipt.worker == lot.worker and not self.commitment.names(receipt):
            raise Invalid(f"the worker's commitment does not name a receipt for {role}")
        other = receipt.signer if receipt.worker == lot.worker else receipt.worker
        expected = stage - 1 if role in ("code_in", "gradient_out") else stage + 1
        if stage_of(other) != expected:
            raise Invalid(f"a receipt for {role} names {other[:16]}…, who does not hold stage {expected}")

    def to_bytes(self) -> bytes:
        """The form that travels: length of the head ‖ head ‖ messages, losses and gradient, one after another."""
        parts = [payload for flow in self.flows for _, payload in sorted(flow.payloads.items())]
        parts += [*self.losses, *([] if self.gradient is None else [self.gradient])]
        lot = self.draw
        head = encoding.encode(
            {
                "draw": [lot.step, lot.worker, lot.index, lot.auditor, lot.signature.hex()],
                "commitment": self.commitment.to_row(),
                "flows": [
                    [flow.receipt.to_row(), [h.hex() for h in flow.hashes], sorted(flow.payloads)]
                    for flow in self.flows
                ],
                "sizes": [len(part) for part in parts],
                "gradient": self.gradient is not None,
            }
        )
        return b"".join([len(head).to_bytes(4, "big"), head, *parts])

    @classmethod
    def from_bytes(cls, run_id: RunId, data: bytes, parse: ReceiptParser) -> Evidence:
        """The evidence in `data`, whose size the caller has limited. Nothing is checked but its form.

        Raises: Invalid: no evidence.
        """
        end = 4 + int.from_bytes(data[:4], "big")
        if len(data) < 4 or end > len(data):
            raise Invalid("evidence whose head is longer than itself")
        head = encoding.decode(data[4:end], HEAD_LIMIT)
        try:
            step, worker, index, auditor, signature = head["draw"]
            rows, sizes, has_gradient = head["flows"], head["sizes"], head["gradient"]
            check_place(step, index)
            lot = Draw(run_id, step, parse_peer_id(worker), index, parse_peer_id(auditor), hex_bytes(signature, 64))
            promise = Commitment.from_row(run_id, lot.worker, head["commitment"])
            parts = _cut(data[end:], sizes)
            if len(rows) > MAX_FLOWS or type(has_gradient) is not bool:
                raise Invalid(f"evidence has at most {MAX_FLOWS} receipts")
            flows = tuple(_flow(run_id, row, parts, parse) for row in rows)
            gradient = parts.pop() if has_gradient and parts else None
        except (KeyError, TypeError, ValueError) as error:
            raise Invalid(f"not evidence: {error!r}") from error
        return cls(lot, flows, promise, tuple(parts), gradient)


def required_roles(stage: int, stages: int) -> tuple[Role, ...]:
    """The messages of a microbatch that a receipt fixes on `stage`."""
    before: tuple[Role, ...] = ("code_in", "gradient_out") if stage > 0 else ()
    after: tuple[Role, ...] = ("code_out", "gradient_in") if stage < stages - 1 else ()
    return before + after


def flow_role(receipt: SignedReceipt, worker: PeerId) -> Role:
    """What the receipt's messages are to `worker`. Raises: Invalid: it is not about him."""
    forward = receipt.direction == "forward"
    if receipt.worker == worker:
        return "code_out" if forward else "gradient_out"
    if receipt.signer == worker:
        return "code_in" if forward else "gradient_in"
    raise Invalid(f"a receipt is not about {worker[:16]}…")


def accepted(receipts: Iterable[SignedReceipt], commitments: Iterable[Commitment]) -> list[SignedReceipt]:
    """The receipts that count: those that their worker's commitment names. Signatures were checked before."""
    promises = {(c.run_id, c.step, c.worker): c for c in commitments}
    named = ((r, promises.get((r.run_id, r.step, r.worker))) for r in receipts)
    return [receipt for receipt, promise in named if promise is not None and promise.names(receipt)]


def payloads_digest(hashes: Mapping[int, bytes]) -> bytes:
    """What a receipt's digest is: SHA-256 over index (2 bytes, big-endian) ‖ SHA-256(message), ascending."""
    return sha256(*(index.to_bytes(2, "big") + hashes[index] for index in sorted(hashes)))


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
    return Sent(row[0], parse_peer_id(row[1]), hex_bytes(row[2], 32))


def _flow(run_id: RunId, row: list[Any], parts: list[bytes], parse: ReceiptParser) -> Flow:
    """One row of the head; takes its messages from the front of `parts`."""
    receipt, hashes, indices = row
    if len(hashes) > MAX_MICROBATCHES or len(indices) > len(parts):
        raise Invalid("evidence with more hashes or messages than a step has")
    taken, parts[: len(indices)] = parts[: len(indices)], []
    return Flow(
        parse(run_id, receipt),
        tuple(hex_bytes(h, 32) for h in hashes),
        dict(zip(check_microbatches(indices), taken, strict=True)),
    )


def _cut(data: bytes, sizes: object) -> list[bytes]:
    if not isinstance(sizes, list) or any(type(size) is not int or size < 0 for size in sizes):
        raise Invalid("the sizes of messages are numbers")
    if len(sizes) > (MAX_FLOWS + 1) * MAX_MICROBATCHES or sum(sizes) != len(data):
        raise Invalid(f"messages of {len(data)} bytes in other sizes than said")
    parts, start = [], 0
    for size in sizes:
        parts.append(data[start : start + size])
        start += size
    return parts

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId, parse_peer_id
from tessera.training.audit import MAX_MICROBATCHES, Draw, check_place
from tessera.training.audit_commitment import (
    MAX_FLOWS,
    Commitment,
    ReceiptParser,
    SignedReceipt,
    check_microbatches,
    check_payloads,
)

__all__ = ["ROLES", "Evidence", "Flow", "Role", "flow_role", "required_roles"]

Role = Literal["code_in", "code_out", "gradient_in", "gradient_out"]
ROLES: tuple[Role, ...] = ("code_in", "code_out", "gradient_in", "gradient_out")
HEAD_LIMIT = 8 * 2**20  # bytes


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
            lot = Draw(
                run_id, step, parse_peer_id(worker), index, parse_peer_id(auditor), encoding.hex_bytes(signature, 64)
            )
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


def _flow(run_id: RunId, row: list[Any], parts: list[bytes], parse: ReceiptParser) -> Flow:
    """One row of the head; takes its messages from the front of `parts`."""
    receipt, hashes, indices = row
    if len(hashes) > MAX_MICROBATCHES or len(indices) > len(parts):
        raise Invalid("evidence with more hashes or messages than a step has")
    taken, parts[: len(indices)] = parts[: len(indices)], []
    return Flow(
        parse(run_id, receipt),
        tuple(encoding.hex_bytes(h, 32) for h in hashes),
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

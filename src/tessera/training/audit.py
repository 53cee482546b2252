r"""Audits: who is replayed, what came of it, and what that does to credit. Pure; see `audit_evidence` for the judging.

After the receipts of a step are exchanged, each other worker of the stage draws with his own key:

    u = SHA-256(sign("audit", run, step, worker, microbatch)) / 2^256        audited when u · auditors < rate

Nobody else can tell beforehand, he can prove it afterwards, and by then the codes, the parameters and the sum of
gradients are committed to. All auditors of a stage together replay a microbatch `rate` times on average, however many
they are. An auditor may draw a second time with another nonce; that lets him audit more, or shirk, never accuse more
lightly, because a failure is shown by evidence.

Invariants: one auditor's word takes nobody's credit where more than one could judge: it needs more than half of them.
Credit that nobody could audit is never mixed with the credit that somebody could.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId, parse_peer_id
from tessera.core.signing import PeerKey, verify_peer

__all__ = [
    "MAX_MICROBATCHES",
    "AuditConfig",
    "Credit",
    "Draw",
    "Outcome",
    "Penalty",
    "Verdict",
    "bond_lost",
    "draw",
    "settle_credit",
]

Outcome = Literal["passed", "failed", "withheld"]
Penalty = Literal["microbatch", "step", "epoch"]
Microbatch = tuple[int, int]  # step, index

MAX_MICROBATCHES = 1024  # of one step
MAX_STEPS = 10**9
REASON_CHARS = 200
WHOLE_BPS = 10_000
DRAW, VERDICT = "audit", "verdict"


class AuditConfig(BaseModel):
    """What a run's members agree on about audits."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rate_bps: Annotated[int, Field(ge=0, le=WHOLE_BPS)] = 400  # of microbatches, by all auditors together
    update_bps: Annotated[int, Field(ge=0, le=WHOLE_BPS)] = 100  # of a worker's steps, replayed whole with their update
    window_steps: Annotated[int, Field(ge=1, le=64)] = 3  # steps for which parameters and payloads are kept
    answer_s: Annotated[float, Field(gt=0, le=600)] = 20.0  # an audited worker has this long for one answer
    attempts: Annotated[int, Field(ge=1, le=10)] = 3  # unanswered, then it counts as withheld
    drift_ppm: Annotated[int, Field(ge=0, le=10**6)] = 1000  # replicas' parameters may differ by this, per tensor
    penalty: Penalty = "epoch"  # what a worker loses who fails one audit
    probe: Annotated[int, Field(ge=0, le=64)] = 4  # microbatches that a joiner replays before his work counts
    waived: bool = True  # pay what nobody could audit, and show it as unaudited; else it is owed


@dataclass(frozen=True, slots=True)
class Draw:
    """`auditor`'s lot about one microbatch, or about the whole step's update when `index` is None."""

    run_id: RunId
    step: int
    worker: PeerId
    index: int | None
    auditor: PeerId
    signature: bytes

    def message(self) -> bytes:
        return encoding.encode([self.run_id, self.step, self.worker, self.index])

    def hits(self, rate_bps: int, auditors: int = 1) -> bool:
        """Whether this lot means an audit, when `auditors` share the rate. Exact, and the same for everybody."""
        if auditors < 1:
            raise Invalid(f"a stage has at least one auditor for a draw, not {auditors}")
        return int.from_bytes(sha256(self.signature), "big") * auditors * WHOLE_BPS < rate_bps << 256

    def check(self) -> None:
        """Raises: Invalid unless the auditor signed it, and is not the worker himself."""
        if self.auditor == self.worker:
            raise Invalid("nobody audits himself")
        verify_peer(self.auditor, DRAW, self.message(), self.signature)


def draw(key: PeerKey, run_id: RunId, step: int, worker: PeerId, index: int | None) -> Draw:
    """The lot of the holder of `key`. Draw only when the step's receipts are in: before, no lot must exist."""
    unsigned = Draw(run_id, step, worker, index, key.id, b"")
    return replace(unsigned, signature=key.sign(DRAW, unsigned.message()))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an auditor says of one audited microbatch, or step when `index` is None."""

    draw: Draw
    outcome: Outcome
    reason: str  # one word for a program, then prose: "code: 8.2 steps from the replay"
    evidence: bytes  # SHA-256 of what shows it, zeros when the worker withheld it
    signature: bytes = b""

    def message(self) -> bytes:
        return encoding.encode([self.draw.run_id, *self._facts()])

    def signed_by(self, key: PeerKey) -> Verdict:
        """Raises: Invalid: the draw is not this key's."""
        if key.id != self.draw.auditor:
            raise Invalid("a verdict is signed by the auditor who drew")
        return replace(self, signature=key.sign(VERDICT, self.message()))

    def check(self) -> None:
        """Raises: Misbehaviour unless draw and verdict carry the auditor's signature."""
        try:
            self.draw.check()
            verify_peer(self.draw.auditor, VERDICT, self.message(), self.signature)
        except Invalid as error:
            raise Misbehaviour(
                f"a verdict on step {self.draw.step} is forged: {error}", evidence=self.to_row()
            ) from error

    def to_row(self) -> list[Any]:
        """The form that travels, without the run id."""
        return [*self._facts(), self.signature.hex()]

    @classmethod
    def from_row(cls, run_id: RunId, row: object) -> Verdict:
        """Raises: Invalid for a row of another shape. Signatures are not checked here."""
        if not isinstance(row, list) or len(row) != 9:
            raise Invalid("a verdict is a list of 9 fields")
        step, worker, index, auditor, lot, outcome, reason, evidence, signature = row
        check_place(step, index)
        if outcome not in ("passed", "failed", "withheld"):
            raise Invalid(f"an outcome is passed, failed or withheld, not {str(outcome)[:20]!r}")
        if not isinstance(reason, str) or len(reason) > REASON_CHARS:
            raise Invalid(f"a reason is a text of at most {REASON_CHARS} characters")
        lot = Draw(run_id, step, parse_peer_id(worker), index, parse_peer_id(auditor), encoding.hex_bytes(lot, 64))
        return cls(lot, outcome, reason, encoding.hex_bytes(evidence, 32), encoding.hex_bytes(signature, 64))

    def _facts(self) -> list[Any]:
        d = self.draw
        return [
            d.step, d.worker, d.index, d.auditor, d.signature.hex(), self.outcome, self.reason, self.evidence.hex(),
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Credit:
    """An epoch's verified microbatches by worker, after audits. The three are disjoint."""

    paid: dict[PeerId, frozenset[Microbatch]]
    withheld: dict[PeerId, frozenset[Microbatch]]  # failed audits
    provisional: dict[PeerId, frozenset[Microbatch]]  # nobody could audit: not paid yet, or paid and shown as such


def settle_credit(
    credited: Mapping[PeerId, Collection[Microbatch]],
    verdicts: Iterable[Verdict],
    auditors: Mapping[PeerId, Collection[PeerId]],
    config: AuditConfig,
) -> Credit:
    """What audits leave of an epoch's credit.

        convicted(w, step, m)  when  |{a ∈ auditors(w): a says failed or withheld}| > |auditors(w)| / 2

    Args:
        credited: what receipts verify, one epoch of it. Nobody's own report is an argument here.
        verdicts: signatures checked; those by others than a worker's auditors, and an auditor's second on the same
            place, count for nothing.
        auditors: the other workers of the same stage in that epoch.

    Returns: `provisional` holds all of a worker without auditors. It is owed when a joiner has audited kept samples
    (call again, with him among the auditors), and at once when the manifest waives audits.
    """
    guilty = _convicted(verdicts, auditors)
    paid, withheld, provisional = {}, {}, {}
    for worker, microbatches in credited.items():
        work = frozenset(microbatches)
        lost = frozenset(m for m in work if _loses(m, guilty.get(worker, set()), config.penalty))
        alone = not auditors.get(worker)
        withheld[worker] = lost
        provisional[worker] = work - lost if alone else frozenset()
        paid[worker] = work - lost if not alone else frozenset()
    return Credit(paid, withheld, provisional)


def bond_lost(
    verdicts: Iterable[Verdict], auditors: Mapping[PeerId, Collection[PeerId]]
) -> dict[PeerId, tuple[Verdict, ...]]:
    """By worker, the verdicts that cost him his bond: `failed`, at one place, and convicting there, by two auditors at
    least. One word alone never takes a bond, nor does a worker who was away and showed nothing.

    The first such place; verdicts by auditor.
    """
    failed = [verdict for verdict in verdicts if verdict.outcome == "failed"]
    lost: dict[PeerId, tuple[Verdict, ...]] = {}
    for worker, places in _convicted(failed, auditors).items():
        for step, index in sorted(places, key=lambda place: (place[0], -1 if place[1] is None else place[1])):
            at = {
                v.draw.auditor: v
                for v in failed
                if (v.draw.worker, v.draw.step, v.draw.index) == (worker, step, index)
                and v.draw.auditor in auditors[worker]
            }
            if len(at) >= 2:
                lost[worker] = tuple(at[auditor] for auditor in sorted(at))
                break
    return lost


def _convicted(
    verdicts: Iterable[Verdict], auditors: Mapping[PeerId, Collection[PeerId]]
) -> dict[PeerId, set[tuple[int, int | None]]]:
    """By worker, the places for which more than half of his auditors found against him."""
    against: dict[tuple[PeerId, int, int | None], set[PeerId]] = {}
    for verdict in verdicts:
        lot = verdict.draw
        if verdict.outcome != "passed" and lot.auditor in auditors.get(lot.worker, ()):
            against.setdefault((lot.worker, lot.step, lot.index), set()).add(lot.auditor)
    guilty: dict[PeerId, set[tuple[int, int | None]]] = {}
    for (worker, step, index), accusers in against.items():
        if 2 * len(accusers) > len(set(auditors[worker])):
            guilty.setdefault(worker, set()).add((step, index))
    return guilty


def _loses(microbatch: Microbatch, guilty: set[tuple[int, int | None]], penalty: Penalty) -> bool:
    if penalty == "epoch":
        return bool(guilty)
    if penalty == "step":
        return any(step == microbatch[0] for step, _ in guilty)
    return microbatch in guilty or (microbatch[0], None) in guilty


def check_place(step: object, index: object) -> None:
    """Raises: Invalid unless these name a step, and a microbatch or None."""
    if type(step) is not int or not 0 <= step < MAX_STEPS:
        raise Invalid(f"a step is a number from 0, not {str(step)[:40]!r}")
    if index is not None and (type(index) is not int or not 0 <= index < MAX_MICROBATCHES):
        raise Invalid(f"a microbatch is a number under {MAX_MICROBATCHES} or null, not {str(index)[:40]!r}")

"""The auditor at work: draws, fetches, replays, signs. One worker of a stage, auditing another of the same stage.

Everything fetched is checked against what was signed before the draw, so an audited worker can only show what he did,
or show nothing. Showing nothing, late, or something else counts as `withheld`, after the manifest's number of attempts.

Invariants: every wait has a deadline and every answer a limit; replays run in a thread, one at a time; parameters come
from our own log when the worker committed to the same ones, which is always so where replicas average exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio
import structlog
from anyio import to_thread

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour, Missing, TesseraError
from tessera.core.ids import PeerId, RunId
from tessera.core.signing import PeerKey
from tessera.models.config import ModelSpec
from tessera.models.replay import LOSS_BYTES, Replayer, Snapshot
from tessera.p2p.calls import call
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.audit import AuditConfig, Draw, Outcome, Verdict, draw
from tessera.training.audit_commitment import MAX_FLOWS, Commitment, ReceiptParser, SignedReceipt
from tessera.training.audit_evidence import Evidence, Flow, flow_role, required_roles
from tessera.training.audit_judge import Finding, drift, judge
from tessera.training.audit_log import AUDIT, CHUNK_BYTES, AuditLog

__all__ = ["PAUSE_S", "Audited", "Auditor", "Behind"]

log = structlog.get_logger()

SLACK_BYTES = 64 * 1024  # of an answer beside its messages
PROMISE_BYTES = MAX_FLOWS * 1024  # receipts as rows
PAUSE_S = 1.0  # before asking again
STATE_SLACK_BYTES = 4 * 2**20  # of packed parameters beside their numbers: names, shapes, facts


class Behind(Exception):
    """We are too late for an audit of this step: the worker may rightly have dropped it. Says nothing about him."""


@dataclass(frozen=True, slots=True)
class Audited:
    """One audit. `evidence` is None when the worker withheld it."""

    verdict: Verdict
    evidence: Evidence | None


class Auditor:
    """Audits other workers of `stage`.

    Args:
        key: ours; it draws and signs.
        message_bytes: of one microbatch's message, `StageTrainer.payload_limit`.
        own: our log; its parameters replay whoever committed to the same.
        record_of: where a peer is reached.
        stage_of: the roster, those who left included; None for strangers.
        ids: token ids [B, T+1] of (step, microbatch).
    """

    def __init__(
        self,
        *,
        key: PeerKey,
        run_id: RunId,
        spec: ModelSpec,
        stage: int,
        config: AuditConfig,
        message_bytes: int,
        transport: Transport,
        own: AuditLog,
        record_of: Callable[[PeerId], PeerRecord],
        stage_of: Callable[[PeerId], int | None],
        ids: Callable[[int, int], Any],
        device: str = "cpu",
    ) -> None:
        self._key, self._run_id, self._spec, self._stage = key, run_id, spec, stage
        self._config, self._message_bytes, self._transport, self._own = config, message_bytes, transport, own
        self._record_of, self._stage_of, self._ids, self._device = record_of, stage_of, ids, device
        self._replayer: Replayer | None = None  # the last one: its version names it
        self._busy = anyio.Lock()  # our replayer serves one audit at a time

    def lots(self, commitment: Commitment, receipts: Iterable[SignedReceipt], auditors: int) -> list[Draw]:
        """Our draws about a worker's step that hit, the update's last.

        Args:
            commitment: the worker's; without one he has no credit, and there is nothing to audit.
            receipts: of the step, signatures checked. Only what they cover earns anything and can be audited.
            auditors: how many other workers his stage has.
        """
        step, worker = commitment.step, commitment.worker
        earned = self.covered(commitment, receipts)
        drawn = [draw(self._key, self._run_id, step, worker, index) for index in sorted(earned)]
        hits = [lot for lot in drawn if lot.hits(self._config.rate_bps, auditors)]
        whole = draw(self._key, self._run_id, step, worker, None)
        complete = bool(earned) and earned == set(commitment.microbatches)
        return [*hits, whole] if complete and whole.hits(self._config.update_bps, auditors) else hits

    def covered(self, commitment: Commitment, receipts: Iterable[SignedReceipt]) -> set[int]:
        """The microbatches for which receipts fix every message that a worker got and sent."""
        about, covered = _about(commitment, receipts), set(commitment.microbatches)
        for role in required_roles(self._stage, self._spec.stages):
            covered &= {i for r in about if flow_role(r, commitment.worker) == role for i in r.microbatches}
        return covered

    async def audit(self, lot: Draw, receipts: Sequence[SignedReceipt], commitment: Commitment) -> Audited:
        """Fetch what `lot` names, replay it, sign what came of it.

        Args:
            receipts: of the step, signatures checked; those that the worker signed may not lack.
            commitment: what he sent before the draw.

        Raises: Invalid: a lot about nothing that he earned.  Missing: a receipt or our own parameters are not here:
            wait for the receipts, and when the window closes without them, give `withheld`.  Behind.
        """
        own = self._own.params(lot.step)  # or we could not tell his from others
        about = self._checked(lot, receipts, commitment)
        reason = ""
        for attempt in range(self._config.attempts):
            if attempt:
                await anyio.sleep(PAUSE_S)
            try:
                evidence = await self._gather(lot, about, commitment)
                theirs = await self._their_replayer(evidence, own)
                break
            except TesseraError as error:  # his answer, or his silence: nobody else was asked, nothing of ours was used
                reason = error.message
                log.info("audit_unanswered", worker=lot.worker, step=lot.step, attempt=attempt, reason=reason)
        else:
            return self.withheld(lot, reason)
        return await self._judged(evidence, theirs, own)

    async def promise(self, worker: PeerId, step: int, parse: ReceiptParser) -> tuple[Commitment, list[SignedReceipt]]:
        """A worker's commitment to a step, and the receipts that he shows with it; all signatures checked.

        Raises: Missing: he has not ended the step, or keeps it no more, or did nothing.  Invalid, Misbehaviour: forged,
        or about something else.  Behind.
        """
        head, body = await self._ask(worker, {"op": "promise", "step": step}, PROMISE_BYTES)
        return await to_thread.run_sync(self._read_promise, worker, step, head.get("commitment"), body, parse)

    def _read_promise(
        self, worker: PeerId, step: int, row: object, body: bytes, parse: ReceiptParser
    ) -> tuple[Commitment, list[SignedReceipt]]:
        commitment = Commitment.from_row(self._run_id, worker, row)
        rows = encoding.decode(body, PROMISE_BYTES)
        if not isinstance(rows, list) or len(rows) > MAX_FLOWS:
            raise Invalid(f"a promise comes with at most {MAX_FLOWS} receipts")
        receipts = [parse(self._run_id, row) for row in rows]
        if commitment.step != step or any(r.step != step or worker not in (r.worker, r.signer) for r in receipts):
            raise Misbehaviour(f"{worker[:16]}… promises something else than step {step}")
        commitment.check()
        for receipt in receipts:
            receipt.check()
        return commitment, receipts

    def withheld(self, lot: Draw, why: str) -> Audited:
        """Our verdict on a worker who did not let himself be audited."""
        return self._signed(lot, "withheld", f"withheld: {why}", None)

    async def review(self, evidence: Evidence) -> Audited:
        """Judge another auditor's evidence, under our own name.

        Raises: Invalid, Misbehaviour: it does not hold together, and speaks against who showed it.
        """
        evidence.draw.check()
        lot = draw(self._key, self._run_id, evidence.draw.step, evidence.worker, evidence.draw.index)
        mine = replace(evidence, draw=lot)
        mine.check(self._stage, self._spec.stages, self._stage_of)
        own = self._own.params(lot.step)
        return await self._judged(mine, await self._their_replayer(mine, own), own)

    def _signed(self, lot: Draw, outcome: Outcome, reason: str, evidence: Evidence | None) -> Audited:
        shown = bytes(32) if evidence is None else evidence.digest()
        return Audited(Verdict(lot, outcome, reason[:200], shown).signed_by(self._key), evidence)

    # --- judging ----------------------------------------------------------------------------------------------------

    async def _judged(self, evidence: Evidence, theirs: Replayer | None, own: Snapshot) -> Audited:
        async with self._busy:
            ours = await self._own_replayer(own)
            finding = None if theirs is None else await to_thread.run_sync(self._drifted, theirs, ours)
            if finding is None:
                replay = partial(judge, evidence, theirs or ours, stage_of=self._stage_of, ids=self._ids)
                finding = await to_thread.run_sync(replay)
        return self._signed(evidence.draw, finding.outcome, finding.reason, evidence)

    def _drifted(self, theirs: Replayer, own: Replayer) -> Finding | None:
        """What is wrong with parameters that are not ours; None when they are near enough."""
        off, most = drift(theirs.params(), own.params()), self._config.drift_ppm
        if off * 1e6 <= most:
            return None
        return Finding("failed", f"version: his parameters are off by {off:.3g}, at most {most} millionths expected")

    async def _own_replayer(self, snapshot: Snapshot) -> Replayer:
        """With our parameters; whoever holds the lock may use it."""
        if self._replayer is None:
            self._replayer = await self._load(await to_thread.run_sync(snapshot.pack))
        elif self._replayer.version != snapshot.version:
            await to_thread.run_sync(self._replayer.load, snapshot)
        return self._replayer

    async def _their_replayer(self, evidence: Evidence, own: Snapshot) -> Replayer | None:
        """With the parameters that the worker committed to, fetched from him; None when ours are the same."""
        version, step = evidence.commitment.version, evidence.draw.step
        if own.version == version:
            return None
        theirs = await self._load(await self._chunks(evidence.worker, "params", step, self._state_limit()))
        if theirs.version != version:
            raise Misbehaviour("the parameters that he shows are not those that he committed to")
        return theirs

    async def _load(self, params: bytes) -> Replayer:
        return await to_thread.run_sync(partial(Replayer, self._spec, self._stage, params, device=self._device))

    # --- fetching ---------------------------------------------------------------------------------------------------

    def _checked(self, lot: Draw, receipts: Sequence[SignedReceipt], commitment: Commitment) -> list[SignedReceipt]:
        """The receipts that an audit of `lot` needs."""
        wanted = set(_wanted(lot, commitment))
        if not wanted <= set(commitment.microbatches):
            raise Invalid(f"microbatch {lot.index} earned nothing: the commitment does not name it")
        if lacking := wanted - self.covered(commitment, receipts):
            raise Missing(f"the receipts for microbatch {min(lacking)} of step {lot.step} are not all here")
        return _about(commitment, receipts)

    async def _gather(self, lot: Draw, about: Sequence[SignedReceipt], commitment: Commitment) -> Evidence:
        """The evidence, checked. Raises: TesseraError: the worker lacks an answer, or has the wrong bytes."""
        wanted = set(_wanted(lot, commitment))
        flows = [await self._flow(lot, receipt, wanted) for receipt in about]
        losses: tuple[bytes, ...] = ()
        if self._stage == self._spec.stages - 1:
            losses = await self._losses(lot, len(commitment.microbatches))
        gradient = None
        if lot.index is None:
            gradient = await self._chunks(lot.worker, "update", lot.step, self._state_limit())
        evidence = Evidence(lot, tuple(flows), commitment, losses, gradient)
        evidence.check(self._stage, self._spec.stages, self._stage_of)
        return evidence

    async def _flow(self, lot: Draw, receipt: SignedReceipt, wanted: set[int]) -> Flow:
        of = receipt.microbatches
        indices = [index for index in of if index in wanted]
        role = flow_role(receipt, lot.worker)
        head, body = await self._ask(
            lot.worker,
            {"op": "payloads", "step": lot.step, "role": role, "of": list(of), "indices": indices},
            len(of) * 32 + len(indices) * self._message_bytes,
        )
        cut = len(of) * 32
        sizes = head.get("sizes")
        if sizes != [self._message_bytes] * len(indices) or len(body) != cut + sum(sizes):
            raise Misbehaviour(f"{lot.worker[:16]}… answers with other messages than asked for")
        messages, size = body[cut:], self._message_bytes
        payloads = {index: messages[i * size : (i + 1) * size] for i, index in enumerate(indices)}
        flow = Flow(receipt, tuple(body[i : i + 32] for i in range(0, cut, 32)), payloads)
        flow.check()
        return flow

    async def _losses(self, lot: Draw, count: int) -> tuple[bytes, ...]:
        _, body = await self._ask(lot.worker, {"op": "losses", "step": lot.step}, count * LOSS_BYTES)
        if len(body) != count * LOSS_BYTES:
            raise Misbehaviour(f"{lot.worker[:16]}… answers with {len(body)} bytes of {count} losses")
        return tuple(body[i : i + LOSS_BYTES] for i in range(0, len(body), LOSS_BYTES))

    async def _chunks(self, worker: PeerId, op: str, step: int, limit: int) -> bytes:
        """Packed parameters or gradients, piece by piece."""
        data, size = b"", limit
        while len(data) < size:
            head, body = await self._ask(worker, {"op": op, "step": step, "offset": len(data)}, CHUNK_BYTES)
            size = head.get("size", 0)
            if type(size) is not int or not 0 < size <= limit or not body:
                raise Misbehaviour(
                    f"{worker[:16]}… answers with {op} of {str(size)[:20]} bytes, at most {limit} expected"
                )
            data += body
        if len(data) != size:
            raise Misbehaviour(f"{worker[:16]}… answers with {len(data)} bytes of {op}, not {size}")
        return data

    def _state_limit(self) -> int:
        """Most bytes of packed parameters or gradients: float32 numbers, and room for their names."""
        own = self._own.params(self._own.steps[-1]).params
        return sum(4 * tensor.numel() for tensor in own.values()) + STATE_SLACK_BYTES

    async def _ask(self, worker: PeerId, request: dict[str, Any], body_bytes: int) -> tuple[dict[str, Any], bytes]:
        if not self._own.in_time(request["step"]):
            raise Behind
        return await call(
            self._transport,
            self._record_of(worker),
            AUDIT,
            request,
            timeout_s=self._config.answer_s,
            reply_limit=body_bytes + SLACK_BYTES,
            bulk=True,
        )


def _about(commitment: Commitment, receipts: Iterable[SignedReceipt]) -> list[SignedReceipt]:
    """The receipts that fix the worker's messages: his own for what came, those he accepted for what went."""
    step, worker = commitment.step, commitment.worker
    return [r for r in receipts if (r.step == step and r.signer == worker) or commitment.names(r)]


def _wanted(lot: Draw, commitment: Commitment) -> tuple[int, ...]:
    """The microbatches that an audit replays."""
    return commitment.microbatches if lot.index is None else (lot.index,)

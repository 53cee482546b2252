"""What a worker does in a step: codes in, codes out, gradients back, and receipts when the step is over.

One loop computes, gradients before codes, since the lead lets many microbatches under way at once; what waits is codes
only, which are small. The lead's orders come first. A microbatch is computed once in a step: asked again, a worker
sends again what he sent, to whoever serves the microbatch now, so that nothing is lost when a neighbour dies, and
nothing counted twice.

Invariants: memory is bounded by the microbatches of two steps, whatever neighbours send; a frame of another term, step
or size is never computed on; a receipt is in the signer's own book before it is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import anyio
import structlog

from tessera.core.errors import Invalid, Misbehaviour, TesseraError
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.training.book import ReceiptBook
from tessera.training.boundary import Boundary
from tessera.training.frames import Frame, Kind
from tessera.training.manifest import Manifest
from tessera.training.protocols import QUIET_S
from tessera.training.receipts import NO_VERSION, RECEIPT_PAYLOAD_BYTES, Direction, Receipt, payloads_digest
from tessera.training.roster import Roster
from tessera.training.step_log import Passage, StepLog

__all__ = ["Batches", "Compute", "NoRecords", "Records", "StageWork", "Trainer"]

log = structlog.get_logger()

OPEN_RECEIPTS = 8  # steps that a neighbour may leave unsigned before he is left out
KEPT_STEPS = 2  # whose codes are kept at least, for receipts that are late; audits may want more


class Trainer(Protocol):
    """What is asked of a stage; `tessera.models.trainer.StageTrainer` is the real one."""

    @property
    def step(self) -> int: ...
    def forward(self, step: int, index: int, ids: Any, payload: bytes | None) -> bytes | None: ...
    def backward(self, step: int, index: int, payload: bytes | None) -> bytes | None: ...
    def loss_of(self, index: int) -> float | None: ...
    def gradient(self) -> bytes: ...
    def finish_step(self, step: int, tokens: int) -> float | None: ...
    def finish_step_with(self, step: int, parts: Sequence[bytes]) -> float | None: ...
    def reset_step(self) -> None: ...
    def drop(self, step: int, index: int) -> None: ...
    def skip_step(self, step: int) -> None: ...
    def evaluate(self, ids: Any, payload: bytes | None) -> bytes | tuple[float, int]: ...
    def payload_limit(self, batch: int, length: int) -> int: ...


class Batches(Protocol):
    """Microbatches by name: the same everywhere, so no token crosses the wire."""

    async def ready(self, step: int) -> None:
        """Have here what `train(step, …)` reads."""
        ...

    def train(self, step: int, index: int) -> Any: ...
    def validation(self, index: int) -> Any: ...
    @property
    def validation_count(self) -> int: ...


class Records(Protocol):
    """What is kept of each step for auditors; `tessera.training.audit_records.AuditRecords` is the real one."""

    async def open(self, step: int) -> bytes:
        """`step` begins, perhaps again, with the parameters as they are. Returns their version, for receipts."""
        ...

    async def close(self, log: StepLog) -> None:
        """All microbatches of a step are through, and its sums are not used yet."""
        ...


class NoRecords:
    """For runs without audits."""

    async def open(self, step: int) -> bytes:
        await anyio.lowlevel.checkpoint()
        return NO_VERSION

    async def close(self, log: StepLog) -> None:
        await anyio.lowlevel.checkpoint()


Job = Callable[[], Awaitable[None]]
Compute = Callable[..., Awaitable[Any]]  # (function, *arguments) -> its result
Neighbours = tuple[PeerId | None, PeerId | None]  # who sends a microbatch to us, and whom we send it to


class StageWork:
    """One worker's computing, under whichever lead.

    Args:
        roster: the present one.
        say: tell the lead something; never waits.
        records: of each step, for auditors.
        compute: how a call that takes a while is made, beside the event loop.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        stage: int,
        key: PeerKey,
        trainer: Trainer,
        batches: Batches,
        book: ReceiptBook,
        roster: Callable[[], Roster],
        say: Callable[[dict[str, Any]], None],
        boundary: Callable[..., Boundary],
        records: Records,
        compute: Compute,
        wait_s: float = QUIET_S,
    ) -> None:
        self._manifest, self._stage, self._key, self._run_id = manifest, stage, key, manifest.run_id
        self._last, self.compute = manifest.model.stages - 1, compute
        self._trainer, self._batches, self._book = trainer, batches, book
        self._roster, self._say, self._records = roster, say, records
        self._kept = max(KEPT_STEPS, manifest.audit.window_steps)
        schedule = manifest.schedule
        self._message_bytes = trainer.payload_limit(schedule.sequences, schedule.length)
        self.term, self.step = 0, -1  # no term: nothing is computed
        self.boundary = boundary(
            deliver=self.deliver,
            broken=self._broken,
            queue=4 * schedule.microbatches + 64,
            frame_limit=64 + max(self._message_bytes, RECEIPT_PAYLOAD_BYTES),
            wait_s=wait_s,
        )
        self.terms = 0  # that were opened here
        self.log = StepLog(-1)
        self._logs: dict[int, StepLog] = {}
        self._ready = -1  # the step whose data is here
        self.fetching = False  # and it may take a while
        self._committed = b""  # the version that the open step is computed with
        self._jobs: deque[Job] = deque()
        self._gradients: deque[tuple[PeerId, Frame]] = deque()
        self._codes: deque[tuple[PeerId | None, Frame]] = deque()
        self._windows: dict[int, Neighbours] = {}  # validation windows that pass through us
        self._held: dict[tuple[PeerId, Kind, int], Frame] = {}  # frames that came before the lead's word on them
        self._wake = anyio.Event()
        self._owed: dict[tuple[PeerId, Direction], set[int]] = {}
        self._signed: set[tuple[PeerId, Direction, int]] = set()  # receipts that came before our own step was over

    async def run(self) -> None:
        """Compute until cancelled. Raises what the trainer raises when it can compute nothing any more."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.boundary.run)
            while True:
                await self._next()

    @property
    def busy(self) -> bool:
        """Whether something of the open step is in our sums, or under way."""
        return bool(self.log.passages)

    def clear(self) -> None:
        """Forget everything that waits: the loop broke off, and starts anew."""
        self._jobs.clear()
        self._held.clear()
        self.term = 0
        self._new_log(self.step)

    def do(self, job: Job) -> None:
        """Have the loop run `job` before anything else: nothing else touches the trainer."""
        self._jobs.append(job)
        self._wake.set()

    # --- the lead's orders ------------------------------------------------------------------------------------------

    async def open(self, term: int, step: int) -> None:
        """A new term begins with `step`: whatever an earlier one had asked for is dropped."""
        await self.compute(self._trainer.reset_step)
        self.term, self.terms = term, self.terms + 1
        await self._open_step(step)

    async def reset(self) -> None:
        """Forget what is in our sums for the open step: others do it."""
        await self.compute(self._trainer.reset_step)
        self._new_log(self.step)

    async def drop(self, indexes: Sequence[int]) -> None:
        """The step ends without these, unless they are in our sums already."""
        gone = {index for index in indexes if not (p := self.log.passages.get(index)) or not p.done}
        self._codes = deque(item for item in self._codes if item[1].index not in gone)
        self._gradients = deque(item for item in self._gradients if item[1].index not in gone)
        for index in gone:
            passage = self.log.passages.pop(index, None)
            if passage is not None and passage.code_out is not None:
                await self.compute(self._trainer.drop, self.step, index)

    def take(self, index: int, source: PeerId | None, target: PeerId | None, again: bool) -> None:
        """Serve a microbatch between these neighbours from now on.

        Args:
            again: `target` lacks our codes, whoever had them before.
        """
        passage = self.log.passages.setdefault(index, Passage(index, source, target))
        passage.source, passage.target = source, target
        if self._stage == 0 and not passage.begun:
            passage.begun = True
            self._codes.append((None, Frame(Kind.FORWARD, self.term, self.step, index)))
        elif again:
            self._send_code(passage)
        self._look_at_held(Kind.FORWARD, index, source)

    def take_window(self, index: int, source: PeerId | None, target: PeerId | None) -> None:
        """Pass a validation window on between these neighbours."""
        self._windows[index] = source, target
        if self._stage == 0:
            self._codes.append((None, Frame(Kind.EVALUATE, self.term, self.step, index)))
        self._look_at_held(Kind.EVALUATE, index, source)

    def _look_at_held(self, kind: Kind, index: int, source: PeerId | None) -> None:
        frame = self._held.pop((source, kind, index), None) if source is not None else None
        if source is not None and frame is not None:
            self.deliver(source, frame)

    async def part(self) -> bytes:
        """Our sums over what we have of the open step, for the other workers of the stage."""
        return await self.compute(self._trainer.gradient)

    async def commit(self, parts: Sequence[bytes] | None, between: Callable[[], Awaitable[None]]) -> None:
        """End the open step, and sign for it.

        Args:
            between: done after the step and before the next: nothing is under way then.
            parts: the sums of all workers of the stage who have some, in one order for all; None: ours are all.
        """
        step = self.step
        await self._records.close(self.log)
        if parts is not None:
            await self.compute(self._trainer.finish_step_with, step, parts)
        elif done := self.log.done():
            tokens = len(done) * self._manifest.tokens_per_microbatch
            await self.compute(self._trainer.finish_step, step, tokens)
        else:
            await self.compute(self._trainer.skip_step, step)
        self._sign()
        await between()
        await self._open_step(step + 1)

    async def _open_step(self, step: int) -> None:
        self._committed = await self._records.open(step)
        self.step = step
        self._new_log(step)
        held, self._held = self._held, {}
        for (peer, _, _), frame in held.items():
            self.deliver(peer, frame)

    def _new_log(self, step: int) -> None:
        self._gradients.clear()
        self._codes.clear()
        self._windows.clear()
        self.log = self._logs[step] = StepLog(step)
        for old in [s for s in self._logs if s > step or s <= step - self._kept]:
            del self._logs[old]
        self._signed = {item for item in self._signed if item[2] >= step - 1}

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def _next(self) -> None:
        if self._jobs:
            await self._jobs.popleft()()
        elif self._gradients:
            await self._blaming(self._backward, *self._gradients.popleft())
        elif self._codes:
            await self._blaming(self._forward, *self._codes.popleft())
        else:
            await self._wake.wait()
            self._wake = anyio.Event()

    async def _blaming(self, work: Callable[[Any, Frame], Awaitable[None]], peer: PeerId | None, frame: Frame) -> None:
        """Compute on what a neighbour sent, and find out who is to blame when that is impossible."""
        try:
            await work(peer, frame)
        except Invalid as error:
            if peer is None or not self._holds_nothing(frame):
                raise  # the trainer's own word: it diverged, say
            self._accuse(peer, frame, f"bytes that hold no message: {error.message}")

    def _holds_nothing(self, frame: Frame) -> bool:
        from tessera.models.wire import Wire  # torch takes seconds to import, and this path is rare

        schedule = self._manifest.schedule
        try:
            Wire(self._manifest.model).unpack(frame.payload, schedule.sequences, schedule.length)
        except Invalid:
            return True
        return False

    async def _forward(self, peer: PeerId | None, frame: Frame) -> None:
        if frame.kind is Kind.EVALUATE:
            await self._evaluate(frame)
            return
        passage = self.log.passages[frame.index]
        await self._have_data()
        ids = await self.compute(self._batches.train, self.step, frame.index)
        code = await self.compute(self._trainer.forward, self.step, frame.index, ids, passage.code_in)
        if self._stage < self._last:
            passage.code_out = code
            self._send_code(passage)
        else:
            await self._finish_passage(passage, None)

    async def _backward(self, peer: PeerId, frame: Frame) -> None:
        passage = self.log.passages[frame.index]
        await self._finish_passage(passage, passage.gradient_in)

    async def _finish_passage(self, passage: Passage, gradient: bytes | None) -> None:
        passage.gradient_out = await self.compute(self._trainer.backward, self.step, passage.index, gradient)
        passage.done = True
        loss = self._trainer.loss_of(passage.index) if self._stage == self._last else None
        self._send_gradient(passage)
        self._say({"op": "done", "step": self.step, "index": passage.index, "loss": loss})

    async def _evaluate(self, frame: Frame) -> None:
        ids = await self.compute(self._batches.validation, frame.index)
        payload = frame.payload if self._stage > 0 else None
        result = await self.compute(self._trainer.evaluate, ids, payload)
        if isinstance(result, tuple):
            loss, tokens = result
            said = {"op": "evaluated", "step": self.step, "index": frame.index, "loss": loss, "tokens": tokens}
            self._say(said)
            return
        target = self._windows[frame.index][1]
        if target is not None:
            self.boundary.send_down(target, Frame(Kind.EVALUATE, self.term, self.step, frame.index, result))

    async def _have_data(self) -> None:
        if self._ready != self.step:
            self.fetching = True
            try:
                await self._batches.ready(self.step)
            finally:
                self.fetching = False
            self._ready = self.step

    # --- sending ----------------------------------------------------------------------------------------------------

    def _send_code(self, passage: Passage) -> None:
        if passage.target is not None and passage.code_out is not None:
            frame = Frame(Kind.FORWARD, self.term, self.step, passage.index, passage.code_out)
            self.boundary.send_down(passage.target, frame)

    def _send_gradient(self, passage: Passage) -> None:
        if passage.source is not None and passage.gradient_out is not None:
            frame = Frame(Kind.GRADIENT, self.term, self.step, passage.index, passage.gradient_out)
            self.boundary.send_up(passage.source, frame)

    # --- receiving --------------------------------------------------------------------------------------------------

    def deliver(self, peer: PeerId, frame: Frame) -> None:
        """A frame from a neighbour. Raises `Misbehaviour` for one that no honest neighbour sends."""
        if frame.kind is Kind.RECEIPT:
            self._take_receipt(peer, frame)
            return
        count = self._batches.validation_count if frame.kind is Kind.EVALUATE else self._manifest.schedule.microbatches
        if frame.index >= count:
            raise _wrong(peer, frame, f"there are {count}")
        if len(frame.payload) != self._message_bytes:
            raise _wrong(peer, frame, f"{len(frame.payload)} bytes, expected {self._message_bytes}")
        if frame.term > self.term or (frame.term == self.term and frame.step > self.step):
            self._held[peer, frame.kind, frame.index] = frame
        elif frame.term == self.term and frame.step == self.step:
            self._sort(peer, frame)

    def _sort(self, peer: PeerId, frame: Frame) -> None:
        """Compute on it, answer it, or hold it until the lead says that this neighbour serves the microbatch."""
        if frame.kind is Kind.EVALUATE:
            if self._windows.get(frame.index, (None, None))[0] != peer:
                self._held[peer, frame.kind, frame.index] = frame
                return
            self._codes.append((peer, frame))
            self._windows[frame.index] = None, self._windows[frame.index][1]  # once
        elif frame.kind is Kind.FORWARD:
            self._sort_code(peer, frame)
        else:
            self._sort_gradient(peer, frame)
        self._wake.set()

    def _sort_code(self, peer: PeerId, frame: Frame) -> None:
        passage = self.log.passages.get(frame.index)
        if passage is None or passage.source != peer:
            self._held[peer, frame.kind, frame.index] = frame
            return
        passage.code_in = frame.payload
        if not passage.begun:
            passage.begun = True
            self._codes.append((peer, frame))
        elif passage.done:
            self._send_gradient(passage)
        else:
            self._send_code(passage)  # whoever had it below us may have lost it with its link

    def _sort_gradient(self, peer: PeerId, frame: Frame) -> None:
        passage = self.log.passages.get(frame.index)
        if passage is None or passage.code_out is None or passage.target != peer:
            return  # from somebody who served it before
        first, passage.gradient_in = passage.gradient_in is None, frame.payload
        if first:
            self._gradients.append((peer, frame))
        elif passage.done:
            self._send_gradient(passage)

    async def _broken(self, peer: PeerId, error: TesseraError) -> None:
        for owed in [key for key in self._owed if key[0] == peer]:
            del self._owed[owed]  # what he signed is in his book
        log.info("link_broken", peer_id=peer, code=error.code, reason=error.message)
        self._say({"op": "lost", "peer": peer, "why": error.message[:200]})

    def _accuse(self, peer: PeerId, frame: Frame, why: str) -> None:
        error = _wrong(peer, frame, why)
        log.warning("neighbour_wrong", peer_id=peer, reason=error.message)
        self.boundary.drop(peer)

    # --- receipts ---------------------------------------------------------------------------------------------------

    def _sign(self) -> None:
        """Sign what each neighbour sent and we used, and keep a copy first: one that gets lost is found in our book."""
        receipts = [
            *(self._receipt(source, "forward", self.log.came_from(source)) for source in self.log.sources()),
            *(self._receipt(target, "backward", self.log.came_back_from(target)) for target in self.log.targets()),
        ]
        signed = [receipt.signed_by(self._key) for receipt in receipts if receipt.microbatches]
        self._book.add(signed)
        for receipt in signed:
            frame = Frame(Kind.RECEIPT, self.term, receipt.step, 0, receipt.to_payload())
            if receipt.direction == "forward":
                self.boundary.send_up(receipt.worker, frame)
                self._expect(receipt.worker, "backward", receipt.step)
            else:
                self.boundary.send_down(receipt.worker, frame)
                self._expect(receipt.worker, "forward", receipt.step)

    def _receipt(self, worker: PeerId, direction: Direction, hashes: dict[int, bytes]) -> Receipt:
        return Receipt(
            self._run_id, self.log.step, worker, self._key.id, direction, tuple(sorted(hashes)),
            payloads_digest(hashes), self._committed,
        )  # fmt: skip

    def _expect(self, peer: PeerId, direction: Direction, step: int) -> None:
        if (peer, direction, step) in self._signed:
            self._signed.remove((peer, direction, step))
            return
        owed = self._owed.setdefault((peer, direction), set())
        owed.add(step)
        if len(owed) > OPEN_RECEIPTS:
            log.warning("neighbour_does_not_sign", peer_id=peer, since_step=min(owed))
            del self._owed[peer, direction]
            self.boundary.drop(peer)

    def _take_receipt(self, peer: PeerId, frame: Frame) -> None:
        """Check and keep a receipt for our own work."""
        below = self._roster().stage_of(peer) == self._stage + 1
        direction: Direction = "forward" if below else "backward"
        receipt = Receipt.from_payload(self._run_id, frame.step, self._key.id, peer, direction, frame.payload)
        step = self._logs.get(frame.step)
        if step is None:
            return  # older than what we keep: his book has it
        sent = step.went_to(peer) if below else step.went_back_to(peer)
        if not set(receipt.microbatches) <= sent.keys():
            raise _wrong(peer, frame, "a receipt for what we did not send")
        receipt.check()
        if receipt.digest != payloads_digest({index: sent[index] for index in receipt.microbatches}):
            raise Misbehaviour(
                f"step {frame.step}: the neighbour signed other bytes than we sent", evidence=receipt.to_row()
            )
        self._book.add([receipt])
        if frame.step >= self.step:
            self._signed.add((peer, direction, frame.step))
        self._owed.get((peer, direction), set()).discard(frame.step)


def _wrong(peer: PeerId, frame: Frame, why: str) -> Misbehaviour:
    """A frame that no honest neighbour sends; the evidence names it."""
    name = f"{frame.kind.name} {frame.index} of step {frame.step}"
    return Misbehaviour(f"{peer[:16]}… sent {name}: {why}", evidence={"peer": peer, "frame": name})

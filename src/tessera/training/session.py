"""One attempt to train: a stage's side of the pipeline over two open links, 1F1B with flush.

Stage 0 feeds microbatches, at most `depth` in flight; every other stage takes what arrives, gradients first. After the
last microbatch of a step each stage makes its optimiser step and signs, for each neighbour, what it received from him.
Both links are ordered, so every index must be the next one: anything else is `Misbehaviour`. Any failure ends the
session; nothing is lost but the steps since the last common checkpoint.

Invariants: memory is bounded by `INBOX` frames and `depth` microbatches, whatever a neighbour sends; every wait for a
neighbour, sending included, ends after `wait_s`; a receipt is in the signer's own book before it is sent, and a step
counts as done only after that, so that no crash can lose the only copy.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import anyio
import anyio.abc
from anyio import to_thread

from tessera.core.errors import Invalid, Late, Misbehaviour, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.transport import Stream
from tessera.training.book import ReceiptBook
from tessera.training.frames import RECEIPT_BYTES, Frame, Kind
from tessera.training.manifest import Manifest
from tessera.training.receipts import Direction, Receipt, payloads_digest

__all__ = ["Batches", "Link", "Session", "SessionEvents", "Trainer"]

INBOX = 64  # frames; a neighbour that sends faster is slowed down, not buffered
OPEN_RECEIPTS = 8  # steps that a neighbour may leave unsigned before the session ends
MAX_DEPTH = 256  # microbatches in flight: as many as a trainer holds


class Trainer(Protocol):
    """What a session asks of its stage; `tessera.models.trainer.StageTrainer` is the real one."""

    def forward(self, step: int, index: int, ids: Any, payload: bytes | None) -> bytes | None: ...
    def backward(self, step: int, index: int, payload: bytes | None) -> bytes | None: ...
    def finish_step(self, step: int, tokens: int) -> float | None: ...
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


@dataclass(slots=True)
class Link:
    """A boundary to one neighbour."""

    stream: Stream
    peer: PeerId
    gives: Direction  # what of ours the neighbour receives
    takes: Direction  # what of his we receive
    arrived: dict[int, bytes] = field(default_factory=dict)  # this step's payloads, each by its SHA-256
    sent: dict[int, bytes] = field(default_factory=dict)
    unsigned: dict[int, bytes] = field(default_factory=dict)  # step -> digest of what we sent
    early: Frame | None = None  # his receipt for the open step: he was done before us
    tokens: int = 0  # that crossed, both directions together, evaluation included
    done: bool = False  # the neighbour said that nothing follows


class SessionEvents(Protocol):
    """What the worker learns while a session runs. Called from the event loop; must be quick."""

    async def step_done(self, step: int, loss: float | None, wire: dict[str, int]) -> None: ...
    def validated(self, steps: int, loss: float) -> None: ...


class Session:
    """`run` trains from `first_step` to the manifest's last step, or raises. Runs once.

    Args:
        up, down: neighbour and stream, before and after us; None at the ends. Closing them stays with the caller.
        batches: this run's data.
        first_step: what `trainer` and both neighbours have open. The last step or later means: only evaluate.
        wait_s: how long a neighbour may be silent, or not take what we send.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        stage: int,
        key: PeerKey,
        trainer: Trainer,
        batches: Batches,
        book: ReceiptBook,
        events: SessionEvents,
        up: tuple[PeerId, Stream] | None,
        down: tuple[PeerId, Stream] | None,
        first_step: int,
        wait_s: float = 120.0,
    ) -> None:
        self._manifest, self._stage, self._key = manifest, stage, key
        self._run_id = manifest.run_id
        self._trainer, self._batches, self._book, self._events = trainer, batches, book, events
        self._up = Link(up[1], up[0], "backward", "forward") if up else None
        self._down = Link(down[1], down[0], "forward", "backward") if down else None
        self._step = first_step
        self._wait_s = wait_s
        self._depth = min(manifest.schedule.microbatches, manifest.model.stages + 1, MAX_DEPTH)
        self._message_bytes = trainer.payload_limit(manifest.schedule.sequences, manifest.schedule.length)
        self._finished = 0  # microbatches of the open step whose gradient we have passed on
        self._inbox_in, self._inbox = anyio.create_memory_object_stream[tuple[Link, Frame]](INBOX)
        self._backward: deque[Frame] = deque()
        self._forward: deque[Frame] = deque()
        self._next_index = {Kind.FORWARD: 0, Kind.GRADIENT: 0, Kind.EVALUATE: 0}
        self._losses: list[tuple[float, int]] = []

    async def run(self) -> None:
        """Train to the end.

        Raises: an exception group with the failures: `Unavailable` when a neighbour is gone, `Late` when it is silent,
        `Misbehaviour` when it is wrong.
        """
        schedule = self._manifest.schedule
        async with self._inbox_in, self._inbox, anyio.create_task_group() as tasks:
            for link in self._links():
                tasks.start_soon(self._read, link)
            if self._stage == 0 and self._evaluation_due():  # again after a restart: the last time may be unfinished
                await self._feed_validation(self._step)
            while self._step < schedule.steps:
                await self._train_step()
                if self._stage == 0 and self._evaluation_due():
                    await self._feed_validation(self._step)
            await self._finish()
            tasks.cancel_scope.cancel()

    # --- one step ---------------------------------------------------------------------------------------------------

    async def _train_step(self) -> None:
        count = self._manifest.schedule.microbatches
        await self._batches.ready(self._step)
        started = self._finished = 0
        while self._finished < count:
            if self._stage == 0 and not self._drain() and started < count and started - self._finished < self._depth:
                await self._compute_forward(started, None)
                started += 1
            else:
                await self._work(await self._next())
        await self._end_step()

    async def _work(self, frame: Frame) -> None:
        """Compute on what a neighbour sent, and find out who is to blame when that is impossible."""
        try:
            if frame.kind is Kind.GRADIENT:
                await self._compute_backward(frame.index, frame.payload)
            elif frame.kind is Kind.FORWARD:
                await self._compute_forward(frame.index, frame.payload)
            else:
                await self._evaluate(frame)
        except Invalid as error:
            raise self._blamed(frame, error) from error

    def _blamed(self, frame: Frame, error: Invalid) -> TesseraError:
        """`Misbehaviour` if the neighbour's bytes hold no message; else the trainer's own word (it diverged, say)."""
        from tessera.models.wire import Wire  # torch takes seconds to import, and this path is rare

        schedule, link = self._manifest.schedule, self._down if frame.kind is Kind.GRADIENT else self._up
        if link is None:
            return error
        try:
            Wire(self._manifest.model).unpack(frame.payload, schedule.sequences, schedule.length)
        except Invalid as reason:
            return _wrong(link, frame, f"bytes that hold no message: {reason.message}")
        return error

    async def _compute_forward(self, index: int, payload: bytes | None) -> None:
        ids = await to_thread.run_sync(self._batches.train, self._step, index)
        code = await to_thread.run_sync(self._trainer.forward, self._step, index, ids, payload)
        if self._down is not None:
            await self._send(self._down, Kind.FORWARD, index, code or b"")
        else:
            await self._compute_backward(index, None)

    async def _compute_backward(self, index: int, payload: bytes | None) -> None:
        code = await to_thread.run_sync(self._trainer.backward, self._step, index, payload)
        if self._up is not None:
            await self._send(self._up, Kind.GRADIENT, index, code or b"")
        self._finished += 1

    async def _end_step(self) -> None:
        step, tokens = self._step, self._manifest.tokens_per_step
        loss = await to_thread.run_sync(self._trainer.finish_step, step, tokens)
        await self._sign(step)
        self._next_index = dict.fromkeys(self._next_index, 0)
        self._step += 1
        for link in self._links():
            link.arrived, link.sent = {}, {}
            early, link.early = link.early, None
            if early is not None:
                self._store_receipt(link, early)
        await self._events.step_done(step, loss, self._wire())

    # --- receipts ---------------------------------------------------------------------------------------------------

    async def _sign(self, step: int) -> None:
        """Sign what each neighbour sent, and keep a copy first: one that gets lost is found in our book."""
        receipts = []
        for link in self._links():
            link.unsigned[step] = payloads_digest(link.sent)
            if len(link.unsigned) > OPEN_RECEIPTS:
                raise Misbehaviour(f"{link.peer[:16]}… has not signed step {min(link.unsigned)}")
            receipt = self._receipt(link.peer, link.takes, step, payloads_digest(link.arrived), self._key.id)
            receipts.append(receipt.signed_by(self._key))
        self._book.add(receipts)
        for link, receipt in zip(self._links(), receipts, strict=True):
            await self._put(link, Frame(Kind.RECEIPT, step, 0, receipt.digest + receipt.version + receipt.signature))

    def _take_receipt(self, link: Link, frame: Frame) -> None:
        """Check and keep a receipt, or put it aside when its sender finished the open step before we did."""
        if frame.step == self._step < self._manifest.schedule.steps:
            if link.early is not None:
                raise _wrong(link, frame, "a second receipt for one step")
            link.early = frame
            return
        self._store_receipt(link, frame)

    def _store_receipt(self, link: Link, frame: Frame) -> None:
        if frame.index != 0 or len(frame.payload) != RECEIPT_BYTES:
            raise _wrong(link, frame, f"a receipt of {len(frame.payload)} bytes, expected {RECEIPT_BYTES}")
        digest = link.unsigned.pop(frame.step, None)
        if digest is None:
            raise _wrong(link, frame, "a receipt that is not owed")
        unsigned = self._receipt(self._key.id, link.gives, frame.step, frame.payload[:32], link.peer)
        receipt = replace(unsigned, version=frame.payload[32:64], signature=frame.payload[64:])
        receipt.check()
        if receipt.digest != digest:
            raise Misbehaviour(
                f"step {frame.step}: the neighbour signed other bytes than we sent", evidence=receipt.to_row()
            )
        self._book.add([receipt])

    def _receipt(self, worker: PeerId, direction: Direction, step: int, digest: bytes, signer: PeerId) -> Receipt:
        """For all microbatches of the step: they came over one link."""
        whole = tuple(range(self._manifest.schedule.microbatches))
        return Receipt(self._run_id, step, worker, signer, direction, whole, digest)

    # --- validation -------------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        schedule = self._manifest.schedule
        return self._step % schedule.evaluate_every == 0 or self._step == schedule.steps

    async def _feed_validation(self, step: int) -> None:
        for index in range(self._batches.validation_count):
            await self._evaluate(Frame(Kind.EVALUATE, step, index))

    async def _evaluate(self, frame: Frame) -> None:
        ids = await to_thread.run_sync(self._batches.validation, frame.index)
        payload = frame.payload if self._stage > 0 else None
        result = await to_thread.run_sync(self._trainer.evaluate, ids, payload)
        if self._down is not None and isinstance(result, bytes):
            await self._send(self._down, Kind.EVALUATE, frame.index, result)
        elif self._down is None and isinstance(result, tuple):
            self._losses.append(result)
        else:
            raise RuntimeError(f"stage {self._stage} of {self._manifest.model.stages} evaluates to {type(result)}")
        if self._losses and frame.index + 1 == self._batches.validation_count:
            total, tokens = map(sum, zip(*self._losses, strict=True))
            self._losses = []
            self._events.validated(frame.step, total / tokens)

    # --- links ------------------------------------------------------------------------------------------------------

    def _links(self) -> list[Link]:
        return [link for link in (self._up, self._down) if link is not None]

    async def _read(self, link: Link) -> None:
        """Move frames from one link into the inbox until the neighbour is done."""
        while data := await link.stream.recv(64 + self._message_bytes):
            frame = Frame.parse(data)
            await self._inbox_in.send((link, frame))
            if frame.kind is Kind.DONE:
                return
        raise Unavailable(f"{link.peer[:16]}… closed the link at step {self._step}")

    async def _next(self) -> Frame:
        """The next frame to work on, gradients first."""
        while not self._drain():
            await self._wait()
        return self._take()

    def _take(self) -> Frame:
        return self._backward.popleft() if self._backward else self._forward.popleft()

    async def _wait(self) -> None:
        with anyio.move_on_after(self._wait_s):
            self._sort(*await self._inbox.receive())
            return
        raise Late(f"no neighbour sent anything for {self._wait_s:.0f} s at step {self._step}")

    def _drain(self) -> bool:
        """Take what has arrived without waiting, up to a bound; True when there is something to work on."""
        while len(self._backward) + len(self._forward) < INBOX:
            try:
                self._sort(*self._inbox.receive_nowait())
            except anyio.WouldBlock:
                break
        return bool(self._backward or self._forward)

    def _sort(self, link: Link, frame: Frame) -> None:
        if frame.kind is Kind.RECEIPT:
            self._take_receipt(link, frame)
            return
        if frame.step != self._step:
            raise _wrong(link, frame, f"our step is {self._step}")
        if frame.kind is Kind.DONE:
            if self._step < self._manifest.schedule.steps:
                raise _wrong(link, frame, f"the end, with {self._manifest.schedule.steps - self._step} steps to go")
            link.done = True
            return
        if frame.kind not in ((Kind.GRADIENT,) if link is self._down else (Kind.FORWARD, Kind.EVALUATE)):
            raise _wrong(link, frame, "against the stream")
        self._arrived(link, frame)
        (self._backward if frame.kind is Kind.GRADIENT else self._forward).append(frame)

    def _arrived(self, link: Link, frame: Frame) -> None:
        schedule, expected = self._manifest.schedule, self._next_index[frame.kind]
        count = self._batches.validation_count if frame.kind is Kind.EVALUATE else schedule.microbatches
        if frame.kind is not Kind.EVALUATE and self._step >= schedule.steps:
            raise _wrong(link, frame, "no step is left")
        if frame.kind is Kind.EVALUATE and not self._evaluation_due():
            raise _wrong(link, frame, "no validation is due")
        if frame.index != expected or expected >= count:
            raise _wrong(link, frame, f"expected index {expected} of {count}")
        if frame.kind is Kind.FORWARD and expected - self._finished >= self._depth:
            raise _wrong(link, frame, f"more than {self._depth} microbatches in flight")
        if len(frame.payload) != self._message_bytes:
            raise _wrong(link, frame, f"{len(frame.payload)} bytes, expected {self._message_bytes}")
        self._next_index[frame.kind] += 1
        if frame.kind is not Kind.EVALUATE:
            link.arrived[frame.index] = hashlib.sha256(frame.payload).digest()
        link.tokens += self._manifest.tokens_per_microbatch

    async def _send(self, link: Link, kind: Kind, index: int, payload: bytes) -> None:
        if kind is not Kind.EVALUATE:
            link.sent[index] = hashlib.sha256(payload).digest()
        link.tokens += self._manifest.tokens_per_microbatch
        await self._put(link, Frame(kind, self._step, index, payload))

    async def _put(self, link: Link, frame: Frame, *, last: bool = False) -> None:
        with anyio.move_on_after(self._wait_s):
            await link.stream.send(frame.to_bytes(), last=last)
            return
        raise Late(f"{link.peer[:16]}… did not take a {frame.kind.name} for {self._wait_s:.0f} s at step {self._step}")

    def _wire(self) -> dict[str, int]:
        """Bytes and tokens that crossed our lower boundary, both ways, frame headers and receipts included."""
        link = self._down
        if link is None:
            return {}
        return {"bytes": link.stream.sent_bytes + link.stream.received_bytes, "tokens": link.tokens}

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Evaluate what is still under way; pass the end down, and up once every receipt is here.

        The stages below may still be evaluating while we wait: that is why the end has a full `wait_s`.
        """
        while self._up is not None and (self._drain() or not self._up.done):
            if self._drain():
                await self._work(self._take())
            else:
                await self._wait()
        if self._down is not None:
            await self._say_done(self._down)
        while any(link.unsigned for link in self._links()) or (self._down and not self._down.done):
            await self._wait()
        if self._up is not None:
            await self._say_done(self._up)

    async def _say_done(self, link: Link) -> None:
        await self._put(link, Frame(Kind.DONE, self._step, 0), last=True)


def _wrong(link: Link, frame: Frame, why: str) -> Misbehaviour:
    """A frame that no honest neighbour sends; the evidence names it and hashes what it held."""
    name = f"{frame.kind.name} {frame.index} of step {frame.step}"
    return Misbehaviour(
        f"{link.peer[:16]}… sent {name}: {why}",
        evidence={"peer": link.peer, "frame": name, "sha256": hashlib.sha256(frame.payload).hexdigest()},
    )

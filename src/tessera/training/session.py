"""One attempt to train: a stage's side of the pipeline over two open links, 1F1B with flush.

Stage 0 feeds microbatches, at most `depth` in flight; every other stage takes what arrives, gradients first. After the
last microbatch of a step each stage makes its optimiser step and signs, for each neighbour, what it received from him.
Both links are ordered, so every index must be the next one: anything else is `Misbehaviour`. Any failure ends the
session; nothing is lost but the steps since the last common checkpoint.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
import anyio.abc
from anyio import to_thread

from tessera.core.errors import Late, Misbehaviour, Unavailable
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.transport import Stream
from tessera.training.frames import RECEIPT_BYTES, Frame, Kind
from tessera.training.manifest import Manifest
from tessera.training.receipts import Direction, Receipt, ReceiptBook

__all__ = ["Batches", "Link", "Session", "SessionEvents", "Trainer"]

INBOX = 64  # frames; a neighbour that sends faster is slowed down, not buffered
OPEN_RECEIPTS = 8  # steps that a neighbour may leave unsigned before the session ends
LAST_RECEIPTS_S = 20.0  # how long the end of a session waits for them


class Trainer(Protocol):
    """What a session asks of its stage; `tessera.models.trainer.StageTrainer` is the real one."""

    def forward(self, step: int, index: int, ids: Any, payload: bytes | None) -> bytes | None: ...
    def backward(self, step: int, index: int, payload: bytes | None) -> bytes | None: ...
    def finish_step(self, step: int, tokens: int) -> float | None: ...
    def evaluate(self, ids: Any, payload: bytes | None) -> bytes | tuple[float, int]: ...
    def payload_limit(self, batch: int, length: int) -> int: ...


class Batches(Protocol):
    """Microbatches by name: the same everywhere, so no token crosses the wire."""

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
    digest: Any = field(default_factory=hashlib.sha256)  # of this step's payloads that arrived
    sent: Any = field(default_factory=hashlib.sha256)  # of this step's payloads that we sent
    unsigned: dict[int, bytes] = field(default_factory=dict)  # step -> digest of what we sent
    tokens: int = 0  # that crossed, both directions together, evaluation included
    done: bool = False  # the neighbour said that nothing follows


class SessionEvents(Protocol):
    """What the worker learns while a session runs. Called from the event loop; must be quick."""

    async def step_done(self, step: int, loss: float | None, wire: dict[str, int]) -> None: ...
    def validated(self, steps: int, loss: float) -> None: ...


class Session:
    """`run` trains from `first_step` to the manifest's last step, or raises.

    Args:
        up, down: streams to the neighbours before and after; None at the ends.
        batches: this run's data.
        depth: microbatches that stage 0 keeps in flight.
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
        self._depth = min(manifest.schedule.microbatches, manifest.model.stages + 1)
        self._inbox_in, self._inbox = anyio.create_memory_object_stream[tuple[Link, Frame]](INBOX)
        self._backward: deque[Frame] = deque()
        self._forward: deque[Frame] = deque()
        self._next_index = {Kind.FORWARD: 0, Kind.GRADIENT: 0, Kind.EVALUATE: 0}
        self._losses: list[tuple[float, int]] = []

    async def run(self) -> None:
        """Train to the end. Raises the first failure: a neighbour gone, late, or wrong."""
        schedule = self._manifest.schedule
        async with anyio.create_task_group() as tasks:
            for link in self._links():
                tasks.start_soon(self._read, link)
            if self._stage == 0 and self._step == 0:
                await self._feed_validation(0)
            while self._step < schedule.steps:
                await self._train_step()
                if self._stage == 0 and self._evaluation_due():
                    await self._feed_validation(self._step)
            await self._finish()
            tasks.cancel_scope.cancel()

    # --- one step ---------------------------------------------------------------------------------------------------

    async def _train_step(self) -> None:
        count = self._manifest.schedule.microbatches
        started = finished = 0
        while finished < count:
            if self._stage == 0 and not self._drain() and started < count and started - finished < self._depth:
                await self._compute_forward(started, None)
                started += 1
                continue
            frame = await self._next()
            if frame.kind is Kind.GRADIENT:
                await self._compute_backward(frame.index, frame.payload)
                finished += 1
            elif frame.kind is Kind.FORWARD:
                await self._compute_forward(frame.index, frame.payload)
                finished += self._down is None
            elif frame.kind is Kind.EVALUATE:
                await self._evaluate(frame)
            else:
                raise Misbehaviour(f"{frame.kind.name} in the middle of step {self._step}")
        await self._end_step()

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

    async def _end_step(self) -> None:
        step, tokens = self._step, self._manifest.tokens_per_step
        loss = await to_thread.run_sync(self._trainer.finish_step, step, tokens)
        for link in self._links():
            link.unsigned[step] = link.sent.digest()
            if len(link.unsigned) > OPEN_RECEIPTS:
                raise Misbehaviour(f"{link.peer[:16]}… has not signed step {min(link.unsigned)}")
            await self._sign(link, step, tokens)
            link.digest, link.sent = hashlib.sha256(), hashlib.sha256()
        self._next_index[Kind.FORWARD] = self._next_index[Kind.GRADIENT] = 0
        self._step += 1
        await self._events.step_done(step, loss, self._wire())

    # --- receipts ---------------------------------------------------------------------------------------------------

    async def _sign(self, link: Link, step: int, tokens: int) -> None:
        receipt = self._receipt(link.peer, link.takes, step, tokens, link.digest.digest(), self._key.id)
        signed = receipt.signed_by(self._key)
        await link.stream.send(Frame(Kind.RECEIPT, step, 0, signed.digest + signed.signature).to_bytes())

    def _store_receipt(self, link: Link, frame: Frame) -> None:
        if len(frame.payload) != RECEIPT_BYTES:
            raise Misbehaviour(f"a receipt of {len(frame.payload)} bytes, expected {RECEIPT_BYTES}")
        digest = link.unsigned.pop(frame.step, None)
        if digest is None:
            raise Misbehaviour(f"{link.peer[:16]}… signs step {frame.step}, which it does not owe")
        unsigned = self._receipt(
            self._key.id, link.gives, frame.step, self._manifest.tokens_per_step, frame.payload[:32], link.peer
        )
        receipt = Receipt(**{**_fields(unsigned), "signature": frame.payload[32:]})
        receipt.check()
        if receipt.digest != digest:
            raise Misbehaviour(
                f"step {frame.step}: the neighbour signed other bytes than we sent", evidence=receipt.to_row()
            )
        self._book.add([receipt])

    def _receipt(
        self, worker: PeerId, direction: Direction, step: int, tokens: int, digest: bytes, signer: PeerId
    ) -> Receipt:
        return Receipt(self._run_id, step, worker, signer, direction, tokens, digest)

    # --- validation -------------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        schedule = self._manifest.schedule
        return self._step % schedule.evaluate_every == 0 or self._step == schedule.steps

    async def _feed_validation(self, step: int) -> None:
        for index in range(self._batches.validation_count):
            await self._evaluate(Frame(Kind.EVALUATE, step, index))

    async def _evaluate(self, frame: Frame) -> None:
        count = self._batches.validation_count
        if frame.step != self._step or frame.index >= count:
            raise Misbehaviour(f"validation window {frame.index} of step {frame.step} at step {self._step}")
        ids = await to_thread.run_sync(self._batches.validation, frame.index)
        payload = frame.payload if self._stage > 0 else None
        result = await to_thread.run_sync(self._trainer.evaluate, ids, payload)
        if isinstance(result, bytes):
            if self._down is None:
                raise Misbehaviour("the last stage returned codes")
            await self._send(self._down, Kind.EVALUATE, frame.index, result)
        else:
            self._losses.append(result)
        if frame.index + 1 == count:
            self._next_index[Kind.EVALUATE] = 0
            if self._losses:
                total, tokens = map(sum, zip(*self._losses, strict=True))
                self._losses = []
                self._events.validated(frame.step, total / tokens)

    # --- links ------------------------------------------------------------------------------------------------------

    def _links(self) -> list[Link]:
        return [link for link in (self._up, self._down) if link is not None]

    async def _read(self, link: Link) -> None:
        """Move frames from one link into the inbox until the neighbour is done."""
        schedule = self._manifest.schedule
        limit = 64 + self._trainer.payload_limit(schedule.sequences, schedule.length)
        while data := await link.stream.recv(limit):
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
        """Take what has arrived without waiting; True when there is something to work on."""
        while True:
            try:
                self._sort(*self._inbox.receive_nowait())
            except anyio.WouldBlock:
                return bool(self._backward or self._forward)

    def _sort(self, link: Link, frame: Frame) -> None:
        if frame.kind is Kind.RECEIPT:
            self._store_receipt(link, frame)
            return
        if frame.step != self._step:
            raise Misbehaviour(f"{frame.kind.name} of step {frame.step} at step {self._step}")
        if frame.kind is Kind.DONE:
            if self._step < self._manifest.schedule.steps:
                raise Misbehaviour(f"{link.peer[:16]}… ends at step {self._step}")
            link.done = True
            return
        if frame.kind not in ((Kind.GRADIENT,) if link is self._down else (Kind.FORWARD, Kind.EVALUATE)):
            raise Misbehaviour(f"{link.peer[:16]}… sent {frame.kind.name} against the stream")
        self._arrived(link, frame)
        (self._backward if frame.kind is Kind.GRADIENT else self._forward).append(frame)

    def _arrived(self, link: Link, frame: Frame) -> None:
        schedule, expected = self._manifest.schedule, self._next_index[frame.kind]
        count = self._batches.validation_count if frame.kind is Kind.EVALUATE else schedule.microbatches
        if frame.index != expected or expected >= count:
            raise Misbehaviour(
                f"{frame.kind.name} {frame.index} of step {frame.step}, expected index {expected} of {count}"
            )
        self._next_index[frame.kind] += 1
        if frame.kind is not Kind.EVALUATE:
            link.digest.update(frame.payload)
        link.tokens += self._manifest.tokens_per_microbatch

    async def _send(self, link: Link, kind: Kind, index: int, payload: bytes) -> None:
        if kind is not Kind.EVALUATE:
            link.sent.update(payload)
        link.tokens += self._manifest.tokens_per_microbatch
        await link.stream.send(Frame(kind, self._step, index, payload).to_bytes())

    def _wire(self) -> dict[str, int]:
        """Bytes and tokens that crossed our lower boundary, both ways, frame headers and receipts included."""
        link = self._down
        if link is None:
            return {}
        return {"bytes": link.stream.sent_bytes + link.stream.received_bytes, "tokens": link.tokens}

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Evaluate what is still under way; pass the end down, and up once every receipt is here."""
        while self._up is not None and (self._drain() or not self._up.done):
            if self._drain():
                await self._evaluate(self._take())
            else:
                await self._wait()
        if self._down is not None:
            await self._say_done(self._down)
        with anyio.move_on_after(LAST_RECEIPTS_S):
            while any(link.unsigned for link in self._links()) or (self._down and not self._down.done):
                self._sort(*await self._inbox.receive())
            if self._up is not None:
                await self._say_done(self._up)
            return
        raise Late("a neighbour did not sign the last steps")

    async def _say_done(self, link: Link) -> None:
        await link.stream.send(Frame(Kind.DONE, self._step, 0).to_bytes(), last=True)


def _fields(receipt: Receipt) -> dict[str, Any]:
    return {name: getattr(receipt, name) for name in Receipt.__slots__}

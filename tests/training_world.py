"""What the training tests share: a small manifest, keys, receipts, a trainer that computes nothing, and sessions."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from tessera.core.errors import Conflict, TesseraError
from tessera.core.ids import Account, PeerId
from tessera.core.signing import AccountKey, PeerKey
from tessera.models.config import CodecConfig, ModelConfig, ModelSpec
from tessera.p2p.memory import MemoryNetwork, VirtualClock
from tessera.p2p.transport import Stream
from tessera.training.book import ReceiptBook
from tessera.training.frames import Frame, Kind
from tessera.training.manifest import Allocation, DataRecipe, DataSet, Manifest, Part, Schedule
from tessera.training.receipts import Direction, Receipt, credited, payloads_digest
from tessera.training.session import Batches, Session, Trainer

LINK = "tessera/test-link/1"

DATA_OWNER = AccountKey(b"\x21" * 32).account
CREATOR = AccountKey(b"\x22" * 32).account


def peer_keys(count: int = 4) -> list[PeerKey]:
    return [PeerKey(bytes([i + 1]) * 32) for i in range(count)]


def account_keys(count: int = 4) -> list[AccountKey]:
    return [AccountKey(bytes([i + 1]) * 32) for i in range(count)]


def small_manifest(stages: int = 4, steps: int = 6, epoch_steps: int = 3, **more: Any) -> Manifest:
    model = ModelConfig(vocab_size=64, width=16, layers=stages, heads=2, kv_heads=1, ffn=32, context=8)
    return Manifest(
        name="small",
        chain_id=31337,
        model=ModelSpec(model=model, codec=CodecConfig(kind="codec", k=4), stages=stages, seed=7),
        data=DataRecipe(tokenizer="cd" * 32, sets=(DataSet(index="ab" * 32, weight=1, account=DATA_OWNER),)),
        schedule=Schedule(
            steps=steps,
            microbatches=3,
            sequences=2,
            length=8,
            evaluate_every=2,
            evaluate_batches=2,
            epoch_steps=epoch_steps,
        ),
        allocation=Allocation(
            work=8500, data=(Part(account=DATA_OWNER, bps=1000),), creator=Part(account=CREATOR, bps=500)
        ),
        price_units=10_000,
        **more,
    )


def all_receipts(manifest: Manifest, keys: list[PeerKey], steps: range) -> list[Receipt]:
    """Every receipt that honest neighbours sign in `steps`: one worker at each stage, all microbatches."""
    whole = tuple(range(manifest.schedule.microbatches))
    directions: tuple[tuple[Direction, int], ...] = (("forward", 1), ("backward", -1))
    return [
        Receipt(manifest.run_id, step, key.id, keys[stage + way].id, direction, whole, bytes(32)).signed_by(
            keys[stage + way]
        )
        for step in steps
        for stage, key in enumerate(keys)
        for direction, way in directions
        if 0 <= stage + way < len(keys)
    ]


def verified(manifest: Manifest, receipts: Iterable[Receipt], peers: Sequence[PeerId], steps: range) -> list[int]:
    """Microbatches credited to each of `peers`, who work at a stage each."""
    stage_of = {peer: stage for stage, peer in enumerate(peers)}
    credit = credited(receipts, stage_of, len(peers), steps, manifest.schedule.microbatches)
    return [len(credit.get(peer, ())) for peer in peers]


def work_of(accounts: Sequence[Account], microbatches: Sequence[int]) -> list[tuple[Account, int, int]]:
    """For `compute_epoch`: one worker at each stage."""
    return [(account, stage, microbatches[stage]) for stage, account in enumerate(accounts)]


# --- a trainer that computes nothing ----------------------------------------------------------------------------------


class FakeTrainer:
    """A stage whose messages are hashes of their names, and whose parameters are a hash of all that went through.

    Two trainers that saw the same bytes in the same order are equal. Refuses calls that a real one refuses.
    """

    def __init__(self, manifest: Manifest, stage: int) -> None:
        self.manifest, self.stage = manifest, stage
        self.step, self.params = 0, b"fresh"
        self.busy = 0  # calls that are running now
        self.before_call: Callable[[str, int, int], None] = lambda name, step, index: None
        self._open: dict[int, bytes] = {}
        self._seen = hashlib.sha256()

    def payload_limit(self, batch: int, length: int) -> int:
        return batch * length * self.manifest.model.message_bytes_per_token()

    def forward(self, step: int, index: int, ids: Any, payload: bytes | None) -> bytes | None:
        with self._working("forward", step, index):
            if step != self.step or index in self._open:
                raise Conflict(f"microbatch {index} of step {step} at step {self.step}")
            self._open[index] = payload or b""
            self._seen.update(b"F" + bytes(str(ids), "ascii") + (payload or b""))
            return None if self._last else self._message("forward", step, index)

    def backward(self, step: int, index: int, payload: bytes | None) -> bytes | None:
        with self._working("backward", step, index):
            del self._open[index]
            self._seen.update(b"B" + (payload or b""))
            return None if self.stage == 0 else self._message("backward", step, index)

    def finish_step(self, step: int, tokens: int) -> float | None:
        with self._working("finish_step", step, 0):
            if self._open or step != self.step or tokens != self.manifest.tokens_per_step:
                raise Conflict(f"step {step} of {tokens} tokens cannot end, {len(self._open)} in flight")
            self.params = hashlib.sha256(self.params + self._seen.digest()).digest()
            self.step += 1
            self.reset_step()
            return 5.0 - 0.1 * step if self._last else None

    def evaluate(self, ids: Any, payload: bytes | None) -> bytes | tuple[float, int]:
        with self._working("evaluate", self.step, 0):
            return (3.0 * 16, 16) if self._last else self._message("evaluate", self.step, 0)

    def reset_step(self) -> None:
        self._open.clear()
        self._seen = hashlib.sha256()

    def save(self) -> bytes:
        with self._working("save", self.step, 0):
            return self.step.to_bytes(4, "big") + self.params

    def load(self, data: bytes) -> None:
        with self._working("load", self.step, 0):
            self.step, self.params = int.from_bytes(data[:4], "big"), data[4:]
            self.reset_step()

    @property
    def _last(self) -> bool:
        return self.stage == self.manifest.model.stages - 1

    def _message(self, kind: str, step: int, index: int) -> bytes:
        size = self.payload_limit(self.manifest.schedule.sequences, self.manifest.schedule.length)
        return hashlib.shake_128(f"{kind} {self.stage} {step} {index}".encode()).digest(size)

    def _working(self, name: str, step: int, index: int) -> _Working:
        return _Working(self, lambda: self.before_call(name, step, index))


@dataclass
class _Working:
    """Notices two calls at once."""

    trainer: FakeTrainer
    hook: Callable[[], None]

    def __enter__(self) -> None:
        self.trainer.busy += 1
        assert self.trainer.busy == 1, "two calls at once"
        self.hook()

    def __exit__(self, *_: object) -> None:
        self.trainer.busy -= 1


class FakeBatches:
    """Microbatches that are their own names."""

    validation_count = 2

    async def ready(self, step: int) -> None:
        await anyio.lowlevel.checkpoint()

    def train(self, step: int, index: int) -> Any:
        return ("train", step, index)

    def validation(self, index: int) -> Any:
        return ("validation", index)


@dataclass
class Told:
    """`SessionEvents` that remembers."""

    losses: list[tuple[int, float | None]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    wire: dict[str, int] = field(default_factory=dict)

    async def step_done(self, step: int, loss: float | None, wire: dict[str, int]) -> None:
        self.losses.append((step, loss))
        self.wire = wire

    def validated(self, steps: int, loss: float) -> None:
        self.validations.append((steps, loss))


# --- sessions ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def linked(keys: Sequence[PeerKey], delay_s: float = 0.0) -> AsyncIterator[list[tuple[Stream, Stream]]]:
    """A stream between each two neighbours: the upper's end, the lower's end."""
    network = MemoryNetwork(random.Random(0), delay_s=delay_s, clock=VirtualClock())
    async with AsyncExitStack() as stack:
        transports = [await stack.enter_async_context(network.start(key)) for key in keys]
        over, pairs = anyio.Event(), []
        stack.callback(over.set)
        for upper, lower in itertools.pairwise(transports):
            arrived, ends = anyio.Event(), list[Stream]()

            async def hold(stream: Stream, ends: list[Stream] = ends, arrived: anyio.Event = arrived) -> None:
                ends.append(stream)
                arrived.set()
                await over.wait()

            lower.serve(LINK, hold)
            stream = await upper.open(lower.record(), LINK, timeout_s=5)
            await arrived.wait()
            pairs.append((stream, ends[0]))
        yield pairs


@dataclass
class Stage:
    """One stage's session with everything that it touches."""

    session: Session
    trainer: Any
    book: ReceiptBook
    told: Told


def make_stage(
    manifest: Manifest,
    keys: Sequence[PeerKey],
    stage: int,
    folder: Path,
    *,
    up: Stream | None,
    down: Stream | None,
    trainer: Trainer | None = None,
    batches: Batches | None = None,
    first_step: int = 0,
    wait_s: float = 120.0,
) -> Stage:
    trainer = trainer or FakeTrainer(manifest, stage)
    book, told = ReceiptBook(folder / f"book-{stage}.sqlite"), Told()
    session = Session(
        manifest=manifest,
        stage=stage,
        key=keys[stage],
        trainer=trainer,
        batches=batches or FakeBatches(),
        book=book,
        events=told,
        up=(keys[stage - 1].id, up) if up is not None else None,
        down=(keys[stage + 1].id, down) if down is not None else None,
        first_step=first_step,
        wait_s=wait_s,
    )
    return Stage(session, trainer, book, told)


async def train_together(stages: Sequence[Stage]) -> None:
    async with anyio.create_task_group() as tasks:
        for stage in stages:
            tasks.start_soon(stage.session.run)


class Neighbour:
    """The other end of a link, played by a test."""

    def __init__(self, manifest: Manifest, key: PeerKey, other: PeerId, stream: Stream) -> None:
        self.manifest, self.key, self.other, self.stream = manifest, key, other, stream
        self.size = manifest.tokens_per_microbatch * manifest.model.message_bytes_per_token()
        self.heard: dict[int, dict[int, bytes]] = {}  # step -> microbatch -> digest

    async def send(
        self, kind: Kind, step: int, index: int, payload: bytes | None = None, *, last: bool = False
    ) -> None:
        payload = bytes(self.size) if payload is None else payload
        await self.stream.send(Frame(kind, step, index, payload).to_bytes(), last=last)

    async def recv(self, kind: Kind) -> Frame:
        """The next frame, which must be of `kind`; receipts on the way are passed over."""
        while True:
            frame = Frame.parse(await self.stream.recv(1 << 20))
            if frame.kind in (Kind.FORWARD, Kind.GRADIENT):
                self.heard.setdefault(frame.step, {})[frame.index] = hashlib.sha256(frame.payload).digest()
            if frame.kind is kind:
                return frame
            assert frame.kind is Kind.RECEIPT, f"{frame.kind} came, {kind} was expected"

    async def recv_forwards(self) -> None:
        """The validation windows that come first, and a step's microbatches, as far as they come."""
        for _ in range(FakeBatches.validation_count):
            await self.recv(Kind.EVALUATE)
        for _ in range(self.manifest.schedule.microbatches):
            await self.recv(Kind.FORWARD)

    async def send_gradients(self, step: int) -> None:
        for index in range(self.manifest.schedule.microbatches):
            await self.send(Kind.GRADIENT, step, index)

    def receipt(self, step: int, direction: Direction = "forward", **changes: Any) -> bytes:
        """Our honest receipt for what was heard in `step`, as it travels; `changes` make it dishonest."""
        whole = tuple(range(self.manifest.schedule.microbatches))
        facts = {"microbatches": whole, "digest": payloads_digest(self.heard[step]), **changes}
        signed = Receipt(self.manifest.run_id, step, self.other, self.key.id, direction, **facts).signed_by(self.key)
        return signed.digest + signed.version + signed.signature


async def first_failure(*functions: Callable[[], Awaitable[None]], within_s: float = 1000) -> TesseraError:
    """What `functions`, run together, fail with."""
    try:
        async with anyio.create_task_group() as tasks:
            for function in functions:
                tasks.start_soon(function)
            await anyio.sleep(within_s)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        return _first(group)
    raise AssertionError(f"nothing failed in {within_s} s")


def _first(group: BaseExceptionGroup[BaseException]) -> TesseraError:
    error = group.exceptions[0]
    if isinstance(error, BaseExceptionGroup):
        return _first(error)
    assert isinstance(error, TesseraError), error
    return error

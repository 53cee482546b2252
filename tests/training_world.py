"""What the training tests share: a small manifest, keys, receipts, a trainer that computes nothing, and sessions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from tessera.core.errors import Conflict
from tessera.core.ids import Account, PeerId
from tessera.core.signing import AccountKey, PeerKey
from tessera.models.config import CodecConfig, ModelConfig, ModelSpec
from tessera.training.manifest import Allocation, DataRecipe, DataSet, Manifest, Part, Schedule
from tessera.training.receipts import Direction, Receipt, credited

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

    Two trainers are equal that saw the same bytes in each step, in whatever order, and whoever of a stage did it.
    Refuses calls that a real one refuses, and a microbatch that two of a stage have in their sums.
    """

    def __init__(self, manifest: Manifest, stage: int) -> None:
        self.manifest, self.stage = manifest, stage
        self.step, self.params = 0, b"fresh"
        self.busy = 0  # calls that are running now
        self.before_call: Callable[[str, int, int], None] = lambda name, step, index: None
        self._open: dict[int, str] = {}
        self._sums: dict[str, str] = {}

    def payload_limit(self, batch: int, length: int) -> int:
        return batch * length * self.manifest.model.message_bytes_per_token()

    def forward(self, step: int, index: int, ids: Any, payload: bytes | None) -> bytes | None:
        with self._working("forward", step, index):
            if step != self.step or index in self._open or str(index) in self._sums:
                raise Conflict(f"microbatch {index} of step {step} at step {self.step}")
            self._open[index] = hashlib.sha256(str(ids).encode() + (payload or b"")).hexdigest()
            return None if self._last else self._message("forward", step, index)

    def backward(self, step: int, index: int, payload: bytes | None) -> bytes | None:
        with self._working("backward", step, index):
            seen = self._open.pop(index) + hashlib.sha256(payload or b"").hexdigest()
            self._sums[str(index)] = hashlib.sha256(seen.encode()).hexdigest()
            return None if self.stage == 0 else self._message("backward", step, index)

    def loss_of(self, index: int) -> float:
        return (5.0 - 0.1 * self.step) * self.manifest.tokens_per_microbatch

    def drop(self, step: int, index: int) -> None:
        del self._open[index]

    def gradient(self) -> bytes:
        with self._working("gradient", self.step, 0):
            if self._open:
                raise Conflict(f"{len(self._open)} microbatches in flight")
            return json.dumps(self._sums).encode()

    def finish_step(self, step: int, tokens: int) -> float | None:
        if tokens != len(self._sums) * self.manifest.tokens_per_microbatch:
            raise Conflict(f"step {step} of {tokens} tokens, {len(self._sums)} microbatches are here")
        return self.finish_step_with(step, [json.dumps(self._sums).encode()])

    def finish_step_with(self, step: int, parts: Sequence[bytes]) -> float | None:
        with self._working("finish_step", step, 0):
            if self._open or step != self.step:
                raise Conflict(f"step {step} cannot end at step {self.step}, {len(self._open)} in flight")
            sums = [item for part in parts for item in json.loads(part).items()]
            assert len(dict(sums)) == len(sums), "a microbatch counts twice"
            self.params = hashlib.sha256(self.params + str(sorted(sums)).encode()).digest()
            self.counted = sorted(int(index) for index, _ in sums)
            self.step += 1
            self.reset_step()
            return 5.0 - 0.1 * step if self._last else None

    def partition(self, round_: int) -> bytes:
        return self.params

    def merge(self, round_: int, own: bytes, others: Sequence[bytes]) -> None:
        if self._open or self._sums:
            raise Conflict(f"step {self.step} is under way")
        self.params = min(self.params, *others)

    def skip_step(self, step: int) -> None:
        self.step += 1
        self.reset_step()

    def evaluate(self, ids: Any, payload: bytes | None) -> bytes | tuple[float, int]:
        with self._working("evaluate", self.step, 0):
            return (3.0 * 16, 16) if self._last else self._message("evaluate", self.step, 0)

    def reset_step(self) -> None:
        self._open.clear()
        self._sums = {}

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
    """A pipeline's `Watcher` that remembers, and calls back."""

    losses: list[tuple[int, float | None]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    on_step: Callable[[int], None] = lambda step: None

    def step_done(self, step: int, loss: float | None) -> None:
        self.losses.append((step, loss))
        self.on_step(step)

    def validated(self, steps: int, loss: float) -> None:
        self.validations.append((steps, loss))

"""One stage's queue: together, in order, and nobody left waiting."""

from __future__ import annotations

import itertools
from typing import Any

import anyio
import pytest

from tessera.core.errors import Invalid, Unavailable
from tessera.models.steps import Step
from tessera.p2p.memory import run_virtual
from tessera.serving.decoding.batches import Batches


class Stage:
    """Echoes the ids of each step, a second for each forward."""

    def __init__(self, most_tokens: int = 100) -> None:
        self.forwards: list[list[str]] = []
        self.batches = Batches(self.run, most_tokens=most_tokens, compute=self.compute)

    async def compute(self, work: Any, steps: Any) -> Any:
        await anyio.sleep(1)
        return work()

    def run(self, steps: list[Step]) -> list[Any]:
        self.forwards.append([step.session for step in steps])
        if any(step.ids == [666] for step in steps):
            raise RuntimeError("out of memory")
        return [Invalid("no") if step.ids == [0] else step.ids for step in steps]


async def ask(stage: Stage, session: str, rounds: int, size: int = 1) -> None:
    for number in range(1, rounds + 1):
        assert await stage.batches.step(Step(session, [number] * size)) == [number] * size


def test_what_waits_is_computed_together() -> None:
    """Whoever comes first is alone; from then on two groups take turns, since each asks again when it has an answer."""

    async def main() -> float:
        stage = Stage()
        async with anyio.create_task_group() as group:
            for name in "abcdefgh":
                group.start_soon(ask, stage, name, 10)
        assert len(stage.forwards) <= 21
        return anyio.current_time()

    assert run_virtual(main) <= 21


def test_a_long_text_does_not_hold_up_the_short_ones() -> None:
    async def main() -> None:
        stage = Stage(most_tokens=20)
        async with anyio.create_task_group() as group:
            group.start_soon(ask, stage, "long", 12, 20)
            for name in "abc":
                group.start_soon(ask, stage, name, 10)
        for name in "abc":
            turns = [number for number, batch in enumerate(stage.forwards) if name in batch]
            assert len(turns) == 10
            assert all(later - turn <= 2 for turn, later in itertools.pairwise(turns))

    run_virtual(main)


def test_whoever_is_cancelled_leaves_nobody_waiting() -> None:
    """Also when it was the one that computed for all, or was to compute next."""

    async def main() -> None:
        stage = Stage()
        async with anyio.create_task_group() as group:

            async def impatient(name: str, seconds: float) -> None:
                with anyio.move_on_after(seconds):
                    await ask(stage, name, 100)

            for number, seconds in enumerate((0.5, 0.5, 1.5, 2.0, 2.5)):
                group.start_soon(impatient, f"impatient {number}", seconds)
            for name in "abc":
                group.start_soon(ask, stage, name, 5)
        assert await stage.batches.resting(lambda: 7) == 7

    with_deadline(main)


def with_deadline(main: Any) -> None:
    async def bounded() -> None:
        with anyio.fail_after(60):
            await main()

    run_virtual(bounded)


def test_one_bad_step_is_its_own_fault_and_a_broken_forward_everybodys() -> None:
    async def main() -> None:
        stage = Stage()
        async with anyio.create_task_group() as group:

            async def bad(ids: list[int], error: type[Exception]) -> None:
                with pytest.raises(error):
                    await stage.batches.step(Step(str(ids), ids))

            group.start_soon(ask, stage, "warm", 1)
            group.start_soon(ask, stage, "good", 1)
            group.start_soon(bad, [0], Invalid)
        async with anyio.create_task_group() as group:
            group.start_soon(bad, [666], Unavailable)
        await ask(stage, "after", 2)

    with_deadline(main)


def test_short_things_are_done_between_two_forwards() -> None:
    async def main() -> None:
        stage, done = Stage(), list[int]()
        async with anyio.create_task_group() as group:
            group.start_soon(ask, stage, "a", 20)
            group.start_soon(ask, stage, "b", 20)
            for number in range(5):
                await anyio.sleep(1.3)
                await stage.batches.resting(lambda: done.append(len(stage.forwards)))
                assert len(done) == number + 1
        with pytest.raises(Invalid):
            await stage.batches.resting(lambda: (_ for _ in ()).throw(Invalid("no")))

    with_deadline(main)

"""The indexer's law: whatever happened on the way, the tables equal a fresh index of the chain as it is."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from index_world import FakeNode, contents, fresh, index_of
from tessera.chain.indexer import tables
from tessera.chain.indexer.engine import Config

CONFIG = Config(window_blocks=4, chunk_blocks=7, behind_s=0)
SEEDS = st.integers(0, 2**32)
HERE = Path(__file__).resolve().parent.parent  # where the child finds the tests' own modules


class Crash(BaseException):
    """The process ends here."""


class Histories(RuleBasedStateMachine):
    """Blocks, reorgs, crashes and resumes, seen by two processes that share a file."""

    @initialize(limit=st.sampled_from([1, 3, 10**9]))
    def begin(self, limit: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="tessera-index-")
        self.file = Path(self.folder.name) / "index.sqlite"
        self.node = FakeNode(longest_range=limit)
        self.indexes = [index_of(self.node, self.file, CONFIG) for _ in range(2)]

    def teardown(self) -> None:
        if not hasattr(self, "node"):
            return
        for index in self.indexes:
            anyio.run(index.update)
            assert contents(index) == anyio.run(fresh, self.node, CONFIG)
            index.close()
        self.folder.cleanup()

    @rule(seed=SEEDS, count=st.integers(1, 12))
    def blocks_come(self, seed: int, count: int) -> None:
        self.node.grow(random.Random(seed), count)

    @rule(seed=SEEDS, depth=st.integers(1, 3), more=st.integers(-2, 3))
    def a_reorg_within_the_window(self, seed: int, depth: int, more: int) -> None:
        self.node.cut(depth)
        self.node.grow(random.Random(seed), max(0, depth + more))

    @rule(seed=SEEDS, depth=st.integers(4, 30), more=st.integers(-20, 20))
    def a_reorg_deeper_than_the_window(self, seed: int, depth: int, more: int) -> None:
        self.node.cut(depth)
        self.node.grow(random.Random(seed), max(0, depth + more))

    @rule(who=st.integers(0, 1))
    def update(self, who: int) -> None:
        index = self.indexes[who]
        reached = anyio.run(index.update)
        assert reached == len(self.node.blocks) - 1
        assert contents(index) == anyio.run(fresh, self.node, CONFIG)

    @rule(who=st.integers(0, 1), request=st.integers(1, 25), seed=SEEDS, depth=st.integers(1, 9))
    def a_reorg_in_the_middle_of_an_update(self, who: int, request: int, seed: int, depth: int) -> None:
        first = self.node.requests

        def strike(number: int) -> None:
            if number == first + request:
                self.a_reorg_within_the_window(seed, depth, 1)

        self.node.at_request = strike
        try:
            anyio.run(self.indexes[who].update)
        finally:
            self.node.at_request = lambda number: None

    @rule(who=st.integers(0, 1), request=st.integers(1, 25))
    def the_other_process_updates_in_between(self, who: int, request: int) -> None:
        first = self.node.requests

        async def both() -> None:
            turn = anyio.Event()

            def strike(number: int) -> None:
                if number == first + request:
                    turn.set()

            async def other() -> None:
                await turn.wait()
                await self.indexes[1 - who].update()

            self.node.at_request = strike
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(other)
                await self.indexes[who].update()
                turn.set()

        try:
            anyio.run(both)
        finally:
            self.node.at_request = lambda number: None

    @rule(who=st.integers(0, 1), request=st.integers(1, 25))
    def a_crash_while_reading(self, who: int, request: int) -> None:
        first = self.node.requests

        def strike(number: int) -> None:
            if number == first + request:
                raise Crash

        self.node.at_request = strike
        try:
            anyio.run(self.indexes[who].update)
        except Crash:
            self.resume(who)
        finally:
            self.node.at_request = lambda number: None

    @rule(who=st.integers(0, 1), write=st.integers(1, 6))
    def a_crash_while_writing(self, who: int, write: int) -> None:
        done, real = 0, tables._set

        def strike(*args: object, **values: str) -> None:
            nonlocal done
            done += 1
            if done == write:
                raise Crash
            real(*args, **values)  # type: ignore[arg-type]

        tables._set = strike
        try:
            anyio.run(self.indexes[who].update)
        except Crash:
            pass
        finally:
            tables._set = real
        self.resume(who)

    @rule(who=st.integers(0, 1))
    def resume(self, who: int) -> None:
        self.indexes[who].close()
        self.indexes[who] = index_of(self.node, self.file, CONFIG)


def _run(examples: int, steps: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=checks,
            derandomize=True,
        ),
    )


def test_the_tables_equal_a_fresh_index_of_the_final_chain() -> None:
    _run(6, 12)


CHILD = """
import random, anyio
from index_world import FakeNode, index_of
from tessera.chain.indexer.engine import Config

node = FakeNode()
node.grow(random.Random(1), 3_000)
index = index_of(node, {file!r}, Config(window_blocks=4, chunk_blocks=7, behind_s=0))
print("begins", flush=True)
anyio.run(index.update)
print("ends", flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_is_killed_again_and_again_ends_in_the_same_tables(tmp_path: Path) -> None:
    file, rng = str(tmp_path / "index.sqlite"), random.Random(7)
    reached = [-1]
    for _ in range(8):
        child = subprocess.Popen([sys.executable, "-c", CHILD.format(file=file)], stdout=subprocess.PIPE, cwd=HERE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"begins\n"
        time.sleep(rng.uniform(0, 1))
        child.kill()
        child.wait()
        child.stdout.close()
        index = index_of(FakeNode(), file, CONFIG)
        reached.append(index.last_block)
        index.close()
    assert reached == sorted(reached)
    assert len({*reached}) > 3
    node = FakeNode()
    node.grow(random.Random(1), 3_000)
    index = index_of(node, file, CONFIG)
    anyio.run(index.update)
    assert contents(index) == anyio.run(fresh, node)
    index.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tables_equal_a_fresh_index_of_the_final_chain_at_length() -> None:
    _run(50, 40)

"""A step ends with each microbatch once in the sums of each stage, whoever dies in whatever order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tessera.core.ids import PeerId
from tessera.training.plan import StepPlan
from tessera.training.routing import Router


class Step(RuleBasedStateMachine):
    """Workers as sets of what they have summed; the twin of what the plan believes."""

    @initialize(
        count=st.integers(1, 12), workers=st.lists(st.integers(1, 4), min_size=1, max_size=4), depth=st.integers(1, 12)
    )
    def begin(self, count: int, workers: list[int], depth: int) -> None:
        self.count, self.now, self.depth = count, 0.0, depth
        self.stages = [[PeerId(f"{stage}-{n}") for n in range(size)] for stage, size in enumerate(workers)]
        self.sums: dict[PeerId, set[int]] = {peer: set() for stage in self.stages for peer in stage}
        self.plan = StepPlan(count, self.stages, Router(), depth)
        self.lost = False

    @precondition(lambda self: not self.lost)
    @rule()
    def feed(self) -> None:
        for order in self.plan.feed(self.now):
            assert not order.again
            assert order.worker == order.path[0]

    @precondition(lambda self: not self.lost and self.plan.open())
    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        """Somebody finishes something that is his; or says so twice."""
        index = data.draw(st.sampled_from(self.plan.open()))
        stage = data.draw(st.integers(0, len(self.stages) - 1))
        worker = self.plan.path(index)[stage]
        new = index not in self.sums[worker]
        self.sums[worker].add(index)
        self.now += 1.0
        assert self.plan.done(worker, index, self.now) is new

    @precondition(lambda self: not self.lost)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.sums)))
        stage = next(s for s, peers in enumerate(self.stages) if worker in peers)
        had = {i for i in range(self.count) if self._fed(i) and self.plan.path(i)[stage] == worker}
        del self.sums[worker]
        self.stages[stage].remove(worker)
        orders = self.plan.lose(worker, self.now)
        if orders is None:
            assert not self.stages[stage]
            self.lost = True
            return
        assert {order.index for order in orders} == had
        for order in orders:
            assert order.again
            assert order.path[stage] in self.stages[stage]
            assert order.worker == order.path[max(stage - 1, 0)]

    @rule(worker=st.text(max_size=3), index=st.integers(-1, 15))
    def a_stranger_or_a_liar_changes_nothing(self, worker: str, index: int) -> None:
        assert not self.plan.done(PeerId(f"stranger {worker}"), index, self.now)

    @invariant()
    def nothing_is_lost_and_nothing_counts_twice(self) -> None:
        if not hasattr(self, "plan") or self.lost:
            return
        assert len(self.plan.open()) <= max(self.depth, self.count)
        for stage, peers in enumerate(self.stages):
            held = [index for peer in peers for index in self.sums[peer]]
            assert len(held) == len(set(held))
            assert {i for mine in self.plan.contributors(stage).values() for i in mine} == set(held)
            if self.plan.complete:
                assert sorted(held) == list(range(self.count))

    def _fed(self, index: int) -> bool:
        try:
            self.plan.path(index)
        except KeyError:
            return False
        return True


Step.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestStep = Step.TestCase

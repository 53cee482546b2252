"""Work goes to whoever is free first, as seen from what he has finished, and to nobody who does not finish."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tessera.core.ids import PeerId
from tessera.training.routing import Router

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def share(router: Router, workers: list[PeerId], count: int, now: float) -> Counter[PeerId]:
    return Counter(router.choose(workers, now) for _ in range(count))


def settle_all(router: Router, given: Counter[PeerId], seconds: dict[PeerId, float], start: float) -> None:
    """Each works off what it was given, at its own pace."""
    events = sorted((start + (n + 1) * seconds[w], w) for w, count in given.items() for n in range(count))
    for at, worker in events:
        router.settle(worker, at)


def test_equals_get_equal_shares() -> None:
    assert share(Router(), [A, B, C], 30, 0.0) == {A: 10, B: 10, C: 10}


def test_a_worker_three_times_as_slow_gets_a_quarter() -> None:
    router, seconds = Router(), {A: 1.0, B: 3.0}
    for step in range(20):
        given = share(router, [A, B], 40, 1000.0 * step)
        settle_all(router, given, seconds, 1000.0 * step)
    assert share(router, [A, B], 40, 1e6) == {A: 30, B: 10}


def test_who_does_not_finish_gets_nothing_more() -> None:
    router = Router()
    settle_all(router, share(router, [A, B], 4, 0.0), {A: 1.0, B: 1.0}, 0.0)
    taken = 0
    for at in range(100):
        chosen = router.choose([A, B], 10.0 + at)
        if chosen == A:
            router.settle(A, 11.0 + at)
        taken += chosen == B
    assert taken <= 1


def test_what_was_promised_to_a_dead_worker_is_not_held_against_him_when_he_is_back() -> None:
    router = Router()
    share(router, [A, B], 10, 0.0)
    router.release(B)
    assert share(router, [A, B], 5, 1.0) == {B: 5}


def test_a_settlement_that_was_not_promised_says_nothing() -> None:
    router = Router()
    router.settle(A, 5.0)
    assert router.seconds(A) is None


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6), st.integers(1, 200))
def test_everything_is_given_to_somebody_and_the_last_is_done_soon(paces: list[float], count: int) -> None:
    """Greedy by finishing time: nobody ends later than the ideal plus his own one microbatch."""
    workers = [PeerId(str(n)) for n in range(len(paces))]
    router = Router()
    for worker, pace in zip(workers, paces, strict=True):
        router.choose([worker], 0.0)
        router.settle(worker, pace)
    given = share(router, workers, count, 0.0)
    assert sum(given.values()) == count
    ideal = count / sum(1 / pace for pace in paces)
    for worker, pace in zip(workers, paces, strict=True):
        assert given[worker] * pace <= ideal + max(paces) + 1e-6

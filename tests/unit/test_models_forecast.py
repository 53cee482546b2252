"""The forecast against what can be worked out by hand."""

import math
from dataclasses import replace

import pytest

from tessera.core.errors import Invalid
from tessera.models.forecast import MESSAGE_S, StagePace, Workload, forecast

ONE = StagePace(forward_s=1.0, backward_s=2.0, evaluate_s=1.0)  # so slow that messages cost nothing beside it
WORK = Workload(microbatches=8, tokens=1, bytes_per_token=0)


def test_one_stage_computes_without_a_pause() -> None:
    found = forecast([replace(ONE, step_s=6.0)], WORK)
    assert found.tokens_per_s == pytest.approx(8 / 30)
    assert found.busy == (pytest.approx(1.0),)
    assert found.limit == "stage"


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_equal_stages_lose_the_flush_and_no_more(stages: int) -> None:
    """1F1B with flush takes (microbatches + stages - 1) turns."""
    found = forecast([ONE] * stages, WORK)
    assert found.step_s == pytest.approx(3 * (8 + stages - 1), rel=2e-3)


def test_everybody_waits_for_the_slowest() -> None:
    slow = replace(ONE, forward_s=10.0, backward_s=20.0)
    found = forecast([ONE, ONE, slow, ONE], replace(WORK, microbatches=64))
    assert found.tokens_per_s == pytest.approx(1 / 30, rel=0.03)
    assert found.slowest == 2
    assert found.limit == "stage"


def test_the_optimiser_of_the_first_stage_adds_to_every_step() -> None:
    plain, with_step = forecast([ONE, ONE], WORK), forecast([replace(ONE, step_s=5.0), ONE], WORK)
    assert with_step.step_s == pytest.approx(plain.step_s + 5.0, rel=1e-6)


def test_stages_that_share_cores_share_their_pace() -> None:
    shared = replace(ONE, machine="home", cores=2)
    found = forecast([shared] * 4, replace(WORK, microbatches=64))
    bound = 2 / (4 * 3)  # two cores, four stages of three seconds each
    assert 0.8 * bound < found.tokens_per_s < bound
    assert found.limit == "cores"
    elsewhere = forecast([ONE] * 4, replace(WORK, microbatches=64))
    assert elsewhere.tokens_per_s > 1.8 * found.tokens_per_s


def test_cores_enough_for_all_are_as_good_as_machines_of_their_own() -> None:
    shared = replace(ONE, machine="home", cores=4)
    assert forecast([shared] * 4, WORK).step_s == pytest.approx(forecast([ONE] * 4, WORK).step_s)


def test_a_stage_on_all_cores_leaves_none_to_the_other() -> None:
    wide = replace(ONE, machine="home", cores=2, threads=2)
    together = forecast([wide, wide], replace(WORK, microbatches=32))
    assert together.tokens_per_s == pytest.approx(1 / 6, rel=0.15)


def test_an_uplink_bounds_the_rate_of_a_middle_stage() -> None:
    """It sends a code down and a gradient up for each token."""
    fast = StagePace(forward_s=1e-9, backward_s=1e-9, up_bytes_s=1e5, down_bytes_s=1e7)
    work = Workload(microbatches=64, tokens=4096, bytes_per_token=25)
    found = forecast([fast] * 3, work)
    assert found.tokens_per_s == pytest.approx(1e5 / (2 * 25), rel=0.1)
    assert found.tokens_per_s < 1e5 / (2 * 25)
    assert found.limit == "links"


def test_a_downlink_bounds_too() -> None:
    fast = StagePace(forward_s=1e-9, backward_s=1e-9)
    work = Workload(microbatches=64, tokens=4096, bytes_per_token=25)
    found = forecast([fast, replace(fast, down_bytes_s=1e5), fast], work)
    assert found.tokens_per_s == pytest.approx(1e5 / (2 * 25), rel=0.1)


def test_a_round_trip_costs_most_where_few_microbatches_hide_it() -> None:
    few, many = replace(WORK, microbatches=1), replace(WORK, microbatches=16)
    assert forecast([ONE, ONE], few, rtt_s=4.0).step_s == pytest.approx(6 + 4, rel=1e-3)
    assert forecast([ONE, ONE], many, rtt_s=1.0).step_s < 1.1 * forecast([ONE, ONE], many).step_s
    assert forecast([ONE, ONE], few, rtt_s=[4.0]).step_s == forecast([ONE, ONE], few, rtt_s=4.0).step_s


def test_evaluation_costs_its_part() -> None:
    plain = forecast([ONE, ONE], WORK)
    often = forecast([ONE, ONE], replace(WORK, evaluate_every=2, evaluate_batches=10))
    seldom = forecast([ONE, ONE], replace(WORK, evaluate_every=200, evaluate_batches=10))
    assert often.step_s == plain.step_s
    assert 8 / often.tokens_per_s == pytest.approx(plain.step_s + 10 / 2, rel=0.15)
    assert plain.tokens_per_s > seldom.tokens_per_s > often.tokens_per_s


def test_messages_cost_both_ends_processor_time() -> None:
    quick = StagePace(forward_s=1e-9, backward_s=1e-9)
    found = forecast([quick, quick], replace(WORK, microbatches=1))
    assert found.step_s == pytest.approx(4 * MESSAGE_S, rel=1e-3)


def test_a_pace_known_as_one_number_is_split_like_a_matrix_product() -> None:
    assert StagePace.of_total(3.0, machine="m", cores=2) == StagePace(1.0, 2.0, evaluate_s=1.0, machine="m", cores=2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: forecast([], WORK),
        lambda: forecast([ONE, ONE], WORK, rtt_s=[]),
        lambda: forecast([ONE, ONE], WORK, rtt_s=-1.0),
        lambda: forecast([ONE, ONE], WORK, rtt_s=math.nan),
        lambda: StagePace(0.0, 0.0),
        lambda: StagePace(-1.0, 2.0),
        lambda: StagePace(math.inf, 2.0),
        lambda: StagePace(1.0, 2.0, cores=0),
        lambda: StagePace(1.0, 2.0, up_bytes_s=0.0),
        lambda: Workload(microbatches=0, tokens=1, bytes_per_token=1),
        lambda: Workload(microbatches=1, tokens=1, bytes_per_token=math.nan),
    ],
)
def test_paces_that_nobody_has_are_refused(wrong: object) -> None:
    with pytest.raises(Invalid):
        wrong()  # type: ignore[operator]

"""Laws of audits, for all inputs."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audit_world import RUN, auditor_key, worker_key
from tessera.incentives.deterrence import expected_gain, least_rate, worst_gain
from tessera.models.config import CodecConfig
from tessera.models.distance import compare
from tessera.models.presets import tiny_spec
from tessera.models.wire import Wire
from tessera.training.audit import AuditConfig, Verdict, draw, settle_credit

WIRE = Wire(tiny_spec().model_copy(update={"codec": CodecConfig(kind="codec", k=32)}))
AUDITORS = [auditor_key(1, number) for number in range(4)]
WORKER = worker_key(1).id
rates = st.floats(min_value=0.001, max_value=1.0)


@given(st.floats(min_value=0.01, max_value=0.6), st.integers(0, 2**31), st.booleans())
@settings(max_examples=40)
def test_the_mean_of_steps_estimates_the_error_of_the_computation(error: float, seed: int, noisy: bool) -> None:
    """E |round(x + δ) − round(x)| = |δ|, for rounding to the nearest and for rounding with named noise."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 64, 32, generator=rng) * 2 - 1
    x[..., 0] = 1.0  # fixes the scale: a step is about 1/127
    sign = torch.where(torch.rand(x.shape, generator=rng) < 0.5, -1.0, 1.0)
    sign[..., 0] = 0.0
    name = ("law", seed) if noisy else None
    moved = x + sign * error / 127
    found = compare(WIRE, WIRE.pack(moved, name), x, name).mean * 32 / 31
    assert abs(found - error) < 0.04


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 2**20))
def test_lots_hit_less_with_more_auditors_and_more_with_a_higher_rate(rate: int, auditors: int, step: int) -> None:
    lot = draw(AUDITORS[0], RUN, step, WORKER, 0)
    if lot.hits(rate, auditors):
        assert lot.hits(min(10_000, rate + 1), auditors)
        assert lot.hits(rate, 1)


def test_lots_hit_at_their_rate() -> None:
    hits = sum(draw(AUDITORS[0], RUN, step, WORKER, 0).hits(2000, 2) for step in range(3000))
    assert 240 < hits < 360  # 300 expected, 16 is one standard deviation


@given(
    st.sets(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=12),
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 5), st.none() | st.integers(0, 3),
            st.sampled_from(["passed", "failed", "withheld"]),
        ),
        max_size=12,
    ),
    st.integers(0, 4),
    st.sampled_from(["microbatch", "step", "epoch"]),
)  # fmt: skip
@settings(max_examples=60)
def test_credit_is_conserved_and_a_minority_takes_nothing(work: set, said: list, count: int, penalty: str) -> None:
    verdicts = [
        Verdict(draw(AUDITORS[a], RUN, step, WORKER, index), outcome, "x", bytes(32))
        for a, step, index, outcome in said
    ]
    auditors = [key.id for key in AUDITORS[:count]]
    credit = settle_credit({WORKER: work}, verdicts, {WORKER: auditors}, AuditConfig(penalty=penalty))
    parts = [credit.paid[WORKER], credit.withheld[WORKER], credit.provisional[WORKER]]
    assert frozenset().union(*parts) == work
    assert sum(map(len, parts)) == len(work)
    assert not (credit.paid[WORKER] and credit.provisional[WORKER])
    accusers: dict[tuple, set] = {}
    for verdict in verdicts:
        if verdict.outcome != "passed" and verdict.draw.auditor in auditors:
            accusers.setdefault((verdict.draw.step, verdict.draw.index), set()).add(verdict.draw.auditor)
    if all(2 * len(who) <= count for who in accusers.values()):
        assert not credit.withheld[WORKER]


@given(st.integers(1, 300), rates, st.floats(0, 1), st.floats(0, 1), st.floats(0, 100))
def test_the_worst_gain_is_the_worst_over_every_number_of_cheats(
    work: int, rate: float, recognised: float, saved: float, stake: float
) -> None:
    facts = {"rate": rate, "recognised": recognised, "saved": saved}
    every = [expected_gain(k, at_stake=work + stake, **facts) for k in range(1, work + 1)]
    assert abs(worst_gain(work, stake=stake, **facts) - max(every)) < 1e-6 * (1 + work)


@given(st.integers(2, 1000), st.floats(0.5, 1), st.floats(0.05, 0.95), st.floats(0, 1000))
def test_the_least_rate_is_the_least(work: int, recognised: float, saved: float, stake: float) -> None:
    rate = least_rate(work, recognised=recognised, saved=saved, stake=stake)
    if rate <= 1:
        assert worst_gain(work, rate=rate, recognised=recognised, saved=saved, stake=stake) < 0
        if rate > 2e-6:
            assert worst_gain(work, rate=rate - 2e-6, recognised=recognised, saved=saved, stake=stake) >= 0
    else:
        assert worst_gain(work, rate=1.0, recognised=recognised, saved=saved, stake=stake) >= 0

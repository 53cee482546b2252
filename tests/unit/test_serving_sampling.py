"""Choosing the next token."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.core.errors import Invalid
from tessera.serving.decoding.sampling import choose, uniform
from tessera.serving.engine import Sampling


def test_zero_temperature_takes_the_likeliest_and_the_lowest_of_equals() -> None:
    assert choose(torch.tensor([0.0, 3.0, 3.0, 1.0]), Sampling(temperature=0), 5) == 1


def test_frequencies_follow_the_softmax_at_the_temperature() -> None:
    logits, temperature, draws = torch.tensor([0.0, 1.0, 2.0, -1.0]), 0.7, 4_000
    wanted = torch.softmax(logits.double() / temperature, 0)
    counts = torch.zeros(4, dtype=torch.float64)
    for position in range(draws):
        counts[choose(logits, Sampling(temperature=temperature, seed=9), position)] += 1
    # Four standard deviations of a binomial: the seed is fixed, so this passes or fails for good.
    slack = 4 * (wanted * (1 - wanted) / draws).sqrt()
    assert bool(((counts / draws - wanted).abs() < slack).all())


def test_top_p_keeps_the_shortest_run_of_likeliest_tokens_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.3, 0.1]))
    for top_p, kept in ((0.4, {1}), (0.5, {1}), (0.75, {1, 2}), (0.85, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        found = {choose(logits, Sampling(top_p=top_p, seed=seed), 0) for seed in range(300)}
        assert found == kept


def test_the_same_seed_and_position_choose_the_same_token() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    picks = [choose(logits, Sampling(seed=3), position) for position in range(40)]
    assert picks == [choose(logits, Sampling(seed=3), position) for position in range(40)]
    assert len(set(picks)) > 5


def test_uniform_is_in_range_and_fixed() -> None:
    draws = [uniform(7, position) for position in range(1_000)]
    assert all(0 <= draw < 1 for draw in draws)
    assert abs(sum(draws) / 1_000 - 0.5) < 4 / math.sqrt(12 * 1_000)
    assert uniform(7, 0) == draws[0] != uniform(8, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(Invalid, match="not finite"):
        choose(torch.tensor([0.0, bad]), Sampling(temperature=0), 0)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"temperature": math.nan}, {"temperature": True}, {"top_p": 0}, {"top_p": 1.1},
     {"seed": -1}, {"seed": 2**63}, {"seed": 1.0}, {"max_tokens": 0}, {"stop": (-1,)}, {"stop": tuple(range(17))},
     {"logprobs": 21}, {"logprobs": -1}, {"logprobs": True}],
)  # fmt: skip
def test_sampling_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_sampling_survives_the_wire() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.9, seed=4, logprobs=3)
    assert Sampling.from_dict(sampling.to_dict()) == sampling
    for wrong in (None, [], {"temperature": 1.0}, sampling.to_dict() | {"x": 1}):
        with pytest.raises(Invalid):
            Sampling.from_dict(wrong)

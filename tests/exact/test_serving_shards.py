"""Decoding over peers gives the tokens of one process, and keeps sessions apart."""

from __future__ import annotations

import anyio
import pytest

from serving_peers import open_shards, tokens
from tessera.core.errors import Invalid
from tessera.models.presets import Kind
from tessera.serving.engine import Sampling

pytestmark = pytest.mark.anyio
GREEDY = Sampling(temperature=0, max_tokens=24)


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True], ids=["memory", "quic"])
@pytest.mark.parametrize(
    ("stages", "codec"),
    [(1, "codec"), pytest.param(2, "dense", marks=pytest.mark.slow), (4, "codec"), (4, "reparam")],
)
async def test_greedy_decoding_over_peers_equals_one_process(stages: int, codec: Kind, real: bool) -> None:
    async with open_shards(stages, codec, real=real) as shards:
        for prompt in ([5], [1, 2, 3], list(range(40))):
            assert await tokens(shards.engine, prompt, GREEDY) == shards.one_process(prompt, 24)
        await shards.settled()


@pytest.mark.slow
@pytest.mark.parametrize("away", [(2,), *(pytest.param(a, marks=pytest.mark.slow) for a in ((0,), (6,), (0, 3, 4, 7)))])
async def test_a_stage_answers_as_long_as_one_of_its_workers_is_there(away: tuple[int, ...]) -> None:
    """Two at each of four stages; the first of a stage is asked first."""
    async with open_shards(4, replicas=2) as shards:
        assert shards.network is not None
        expected = shards.one_process([1, 2, 3], 24)
        assert await tokens(shards.engine, [1, 2, 3], GREEDY) == expected
        for number in away:
            shards.network.kill(shards.transports[number].id)
        assert await tokens(shards.engine, [1, 2, 3], GREEDY) == expected


async def test_equal_seeds_give_equal_text_and_other_seeds_another() -> None:
    async with open_shards(2) as shards:
        samples = [
            await tokens(shards.engine, [7, 8], Sampling(temperature=1.0, top_p=0.95, seed=seed, max_tokens=20))
            for seed in (3, 3, 4)
        ]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]


@pytest.mark.slow
async def test_sessions_at_the_same_time_do_not_mix() -> None:
    async with open_shards(4) as shards:
        prompts = [[n, n + 1, 2 * n] for n in range(6)]
        found: dict[int, list[int]] = {}

        async def ask(index: int) -> None:
            found[index] = await tokens(shards.engine, prompts[index], GREEDY)

        async with anyio.create_task_group() as group:
            for index in range(len(prompts)):
                group.start_soon(ask, index)
        assert [found[i] for i in range(6)] == [shards.one_process(prompt, 24) for prompt in prompts]
        await shards.settled()


async def test_the_whole_context_can_be_used_and_no_more() -> None:
    async with open_shards(2) as shards:
        context = shards.engine.context
        assert len(await tokens(shards.engine, [1] * (context - 4), Sampling(temperature=0, max_tokens=4))) == 4
        with pytest.raises(Invalid, match="do not fit"):
            await tokens(shards.engine, [1] * (context - 4), Sampling(max_tokens=5))
        await shards.settled()


async def test_a_stop_token_ends_the_generation_and_is_not_given_out() -> None:
    async with open_shards(2) as shards:
        whole = await tokens(shards.engine, [1, 2, 3], GREEDY)
        stop = whole[9]
        found = await tokens(shards.engine, [1, 2, 3], Sampling(temperature=0, max_tokens=24, stop=(stop,)))
        assert found == whole[: whole.index(stop)]
        await shards.settled()

"""What makes decoding over peers fast or lasting changes no token: guesses, pieces, earlier texts, lost stages."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest
import torch

from serving_peers import Shards, open_shards, tokens
from tessera.serving.decoding.speculation import Drafter, NgramDraft, NgramTable
from tessera.serving.engine import Sampling

pytestmark = pytest.mark.anyio
GREEDY = Sampling(temperature=0, max_tokens=30)
WARM = Sampling(temperature=0.8, top_p=0.9, seed=5, max_tokens=30)
SLOW_CASES = [(GREEDY, 1), (WARM, 1), (GREEDY, 3), (GREEDY, 10**6), (WARM, 10**6)]


class Oracle:
    """Knows what will come, and says it with mistakes: every `wrong`th guess is another token."""

    def __init__(self, text: list[int], wrong: int) -> None:
        self.text = text
        self.wrong = wrong

    def begin(self) -> Drafter:
        return self

    async def propose(self, ids: Sequence[int], count: int) -> list[int]:
        coming = self.text[len(ids) :][:count]
        return [(token + 1) % 300 if (len(ids) + i) % self.wrong == 0 else token for i, token in enumerate(coming)]


@pytest.mark.parametrize(
    ("sampling", "wrong"),
    [(WARM, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
async def test_guesses_change_no_token(sampling: Sampling, wrong: int) -> None:
    async with open_shards(3) as shards:
        prompt = [1, 2, 3]
        plain = await tokens(shards.engine, prompt, sampling)
        before = shards.decoders[0].forwards
    async with open_shards(3, draft=Oracle([*prompt, *plain], wrong)) as shards:
        assert await tokens(shards.engine, prompt, sampling) == plain
        assert shards.engine.guessed > 0
        if wrong > 30:
            assert shards.engine.right == shards.engine.guessed
            assert shards.decoders[0].forwards < before / 2
        await shards.settled()


async def test_a_draft_from_the_text_and_a_table_changes_no_token() -> None:
    async with open_shards(2) as shards:
        plain = await tokens(shards.engine, [5, 6, 5, 6, 5], GREEDY)
    table = NgramTable([[5, 6, 5, 6, *plain]])
    async with open_shards(2, draft=NgramDraft(table)) as shards:
        assert await tokens(shards.engine, [5, 6, 5, 6, 5], GREEDY) == plain
        assert shards.engine.right > 0


async def test_a_prompt_in_pieces_and_one_seen_before_give_the_same_tokens() -> None:
    async with open_shards(2, gateway_settings={"piece_tokens": 5}) as shards:
        prompt = [n % 11 for n in range(40)]
        expected = shards.one_process(prompt, 20)
        greedy = Sampling(temperature=0, max_tokens=20)
        assert await tokens(shards.engine, prompt, greedy) == expected
        await shards.settled()
        computed = [decoder.tokens for decoder in shards.decoders]
        assert await tokens(shards.engine, prompt, greedy) == expected
        again = [decoder.tokens - before for decoder, before in zip(shards.decoders, computed, strict=True)]
        assert again == [40 - 32 + 19] * 2, "two pages of the prompt were there"


async def test_log_probabilities_are_those_of_the_model() -> None:
    sampling = Sampling(temperature=0.9, seed=2, max_tokens=6, logprobs=3)
    async with open_shards(2) as shards:
        found = [token async for token in shards.engine.generate([1, 2, 3], sampling)]
        assert [token.id for token in found] == await tokens(
            shards.engine, [1, 2, 3], Sampling(0.9, seed=2, max_tokens=6)
        )
        out: object = None
        for decoder in shards.decoders:
            out = decoder.step("one", [1, 2, 3], out if isinstance(out, bytes) else None)
        assert isinstance(out, torch.Tensor)
        logprobs = torch.log_softmax(out.double(), 0)
    assert found[0].logprob == float(logprobs[found[0].id])
    assert [token for token, _ in found[0].top] == logprobs.topk(3).indices.tolist()
    assert all(
        len(token.top) == 3 and token.logprob is not None and token.logprob <= token.top[0][1] for token in found
    )


async def test_an_embedding_is_the_hidden_state_of_the_last_token() -> None:
    async with open_shards(3) as shards:
        found = await shards.engine.embed([4, 5, 6])
        assert found == await shards.engine.embed([4, 5, 6])
        assert len(found) == 32
        last = shards.decoders[-1].stage
        logits = last.logits(torch.tensor([found]))[0]
        assert int(logits.argmax()) == shards.one_process([4, 5, 6], 1)[0]
        await shards.settled()


async def kill(shards: Shards, number: int) -> None:
    await shards.transports[number].close()


@pytest.mark.parametrize(
    ("stage", "draft"),
    [
        (1, NgramDraft()),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, None), (1, None), (2, None), (0, NgramDraft()))),
    ],
)
async def test_a_stage_that_goes_away_is_replaced_and_the_text_goes_on(stage: int, draft: NgramDraft | None) -> None:
    async with open_shards(3, replicas=2, draft=draft) as shards:
        prompt = [n % 7 for n in range(20)]
        expected = shards.one_process(prompt, 30)
        found = list[int]()
        async for token in shards.engine.generate(prompt, Sampling(temperature=0, max_tokens=30)):
            found.append(token.id)
            if len(found) == 15:
                before = sum(decoder.tokens for decoder in shards.decoders)
                await kill(shards, 2 * stage)
        assert found == expected
        assert shards.engine.recoveries >= 1
        computed = sum(decoder.tokens for decoder in shards.decoders) - before
        assert computed <= 3 * (15 + 16) + 2 * 35 + 16, "no more than the lost stage's text, and the one's after it"
        await shards.settled()


async def test_a_session_whose_memory_was_taken_goes_on() -> None:
    async with open_shards(2) as shards:
        expected = shards.one_process([1, 2, 3], 24)
        found = list[int]()
        async for token in shards.engine.generate([1, 2, 3], Sampling(temperature=0, max_tokens=24)):
            found.append(token.id)
            if len(found) % 7 == 0:
                for decoder in shards.decoders:
                    for session in list(decoder._sessions):
                        decoder.drop(session)
        assert found == expected
        assert shards.engine.recoveries >= 2
        await shards.settled()


@pytest.mark.slow
async def test_one_stalled_stage_does_not_hold_up_the_sessions_of_another() -> None:
    """The first of two holders of stage 1 takes sessions and never answers again."""
    async with open_shards(2, replicas=2, gateway_settings={"step_timeout_s": 2}) as shards:
        stuck = anyio.Event()

        async def never(work: object, steps: object) -> object:
            await stuck.wait()
            return [None]

        shards.servers[2]._batches._compute = never
        expected = shards.one_process([1, 2], 10)
        assert await tokens(shards.engine, [1, 2], Sampling(temperature=0, max_tokens=10)) == expected
        assert shards.decoders[3].tokens > 0, "the second one did it"
        stuck.set()


async def test_equal_prompts_at_the_same_time_share_pages() -> None:
    async with open_shards(2) as shards:
        prompt = [n % 5 for n in range(33)]
        first = shards.engine.generate(prompt, Sampling(temperature=0, max_tokens=8))
        await anext(first)
        held = shards.decoders[0].held_bytes
        others = [shards.engine.generate(prompt, Sampling(seed=n, max_tokens=8)) for n in range(3)]
        for other in others:
            await anext(other)
        assert shards.decoders[0].held_bytes < 2.5 * held, "each holds two pages that the first computed, and its own"
        for generation in (first, *others):
            await generation.aclose()
        await shards.settled()

"""Decoding over four sites: the chain against a star, guesses against none, sixteen texts against one, and the delay.

    python benchmarks/bench_decode.py [--quick] [--json]

The real gateway's engine and real stages, a model that is trained here (`decode_world.py`), and texts that it has not
seen. Virtual time, 25 ms one way, with a forward charged 20 ms and 2 % more for each further token:

- chain_over_star: tokens per second of the chain over those of a star, in which each message goes by way of the gateway
  and each token is fed by it. Theory: (4c + 8d) / (4c + 4d) = 1.56.
- speculation_speedup: the chain with guesses over the chain without, both at their best. Guesses come from the text
  itself and from an n-gram table of the training text, at most a tenth of the model's size.
- inflight_share: tokens per second of 16 texts at once over 16 times those of one: nobody ever waits for anybody.

Not modelled: itl_over_ideal is the time between tokens at 4 stages and 20 ms there and back, over the processor time
of the stages' forwards plus 4 × 10 ms. The time between tokens is that on the wires plus all processor time of the
process: stages, gateway and network, one after the other. So it does not depend on what else the machine does.
itl_wall_ms is the same on the clock on the wall. batch_gain: processor time of 16 texts one by one over that of all in
one forward.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import anyio
import structlog
import torch
from decode_world import MORE, STAGE_S, Learnt, learn, open_world, prompts, table, timed, write_results

from tessera.models.decode import StageDecoder
from tessera.models.steps import Step
from tessera.p2p.memory import run_virtual
from tessera.serving.decoding.batches import in_thread
from tessera.serving.decoding.speculation import NgramDraft, NgramTable
from tessera.serving.engine import Sampling

DELAY_S, ITL_DELAY_S = 0.025, 0.010
STREAMS, PROMPT = 16, 48
ENTRY_BYTES = 6  # of a table's entry: two ids and what follows, two bytes each
FIGURES = (
    "chain_over_star", "itl_over_ideal", "acceptance", "speculation_speedup", "speculation_identical",
    "inflight_share", "inflight_identical", "sampled_speedup", "batch_gain", "star_tokens_per_s", "chain_tokens_per_s",
    "speculation_tokens_per_s", "inflight_tokens_per_s", "itl_ms", "itl_computed_ms", "itl_wall_ms",
    "table_over_model", "params", "trained_loss",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer tokens: under 50 s on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    torch.set_num_threads(1)
    learnt = learn(quick=arguments.quick)
    result = measure(learnt, texts=2 if arguments.quick else 4, tokens=32 if arguments.quick else 96)
    print(table(result))
    if not arguments.quick:
        write_results("decode", "Decoding over four sites", about(), result)
    if arguments.json:
        print(json.dumps({key: result[key] for key in FIGURES}))


def measure(learnt: Learnt, *, texts: int, tokens: int) -> dict[str, Any]:
    asked = prompts(learnt, texts, PROMPT)
    greedy = [Sampling(temperature=0, max_tokens=tokens)] * texts
    sampled = [Sampling(temperature=0.8, top_p=0.95, seed=n, max_tokens=tokens) for n in range(texts)]
    size = 4 * learnt.params // 10 // ENTRY_BYTES
    ngrams = NgramTable(learnt.seen, order=2, entries=size)
    star, _ = run_virtual(ask, learnt, asked[:1], greedy[:1], {"star": True}, {"run_tokens": 1}, None)
    chain, plain = run_virtual(ask, learnt, asked, greedy, {}, {}, None)
    guessed = run_virtual(speculate, learnt, asked, greedy, ngrams)
    warm_rate, warm = run_virtual(ask, learnt, asked, sampled, {}, {}, None)
    warm_guessed = run_virtual(speculate, learnt, asked, sampled, ngrams)
    together = run_virtual(at_once, learnt, prompts(learnt, STREAMS, PROMPT), tokens // 2)
    itl_s, computed_s = run_virtual(delay, learnt, asked[0], tokens)
    wall_s = anyio.run(delay_on_the_wall, learnt, asked[0], tokens // 2)
    return {
        "chain_over_star": chain / star,
        "itl_over_ideal": itl_s / (computed_s + 4 * ITL_DELAY_S),
        "acceptance": guessed[2],
        "speculation_speedup": guessed[0] / chain,
        "speculation_identical": guessed[1] == plain and warm_guessed[1] == warm,
        "inflight_share": together[0] / (STREAMS * chain),
        "inflight_identical": together[1],
        "sampled_speedup": warm_guessed[0] / warm_rate,
        "batch_gain": batch_gain(learnt, 8 if tokens < 64 else 32),
        "star_tokens_per_s": star,
        "chain_tokens_per_s": chain,
        "speculation_tokens_per_s": guessed[0],
        "inflight_tokens_per_s": together[0],
        "itl_ms": 1000 * itl_s,
        "itl_computed_ms": 1000 * computed_s,
        "itl_wall_ms": 1000 * wall_s,
        "table_over_model": len(ngrams) * ENTRY_BYTES / (4 * learnt.params),
        "params": learnt.params,
        "trained_loss": learnt.loss,
    }


async def ask(
    learnt: Learnt,
    asked: Sequence[list[int]],
    samplings: Sequence[Sampling],
    world_settings: dict[str, Any],
    engine_settings: dict[str, Any],
    draft: NgramDraft | None,
) -> tuple[float, list[list[int]]]:
    """Tokens per second, one text after the other; and the texts."""
    async with open_world(learnt, DELAY_S, **world_settings) as world:
        engine = world.engine(draft, **engine_settings)
        found = [await timed(engine, prompt, how) for prompt, how in zip(asked, samplings, strict=True)]
    return sum(len(text) - 1 for text, _ in found) / sum(seconds for _, seconds in found), [text for text, _ in found]


async def speculate(
    learnt: Learnt, asked: Sequence[list[int]], samplings: Sequence[Sampling], ngrams: NgramTable
) -> tuple[float, list[list[int]], float]:
    """As `ask`, with guesses; and which part of them came."""
    async with open_world(learnt, DELAY_S) as world:
        engine = world.engine(NgramDraft(ngrams))
        found = [await timed(engine, prompt, how) for prompt, how in zip(asked, samplings, strict=True)]
    rate = sum(len(text) - 1 for text, _ in found) / sum(seconds for _, seconds in found)
    return rate, [text for text, _ in found], engine.right / max(1, engine.guessed)


async def at_once(learnt: Learnt, asked: Sequence[list[int]], tokens: int) -> tuple[float, bool]:
    """Tokens per second of all texts together while all of them are made, and whether they are what each is alone."""
    sampling = Sampling(temperature=0, max_tokens=tokens)
    async with open_world(learnt, DELAY_S) as world:
        engine, times = world.engine(), dict[int, list[float]]()
        texts: dict[int, list[int]] = {}

        async def stream(number: int) -> None:
            times[number], texts[number] = [], []
            async for token in engine.generate(asked[number], sampling):
                times[number].append(anyio.current_time())
                texts[number].append(token.id)

        async with anyio.create_task_group() as group:
            for number in range(len(asked)):
                group.start_soon(stream, number)
        began, ended = max(each[0] for each in times.values()), min(each[-1] for each in times.values())
        counted = sum(began < at <= ended for each in times.values() for at in each)
        some = range(0, len(asked), 5)
        same = [texts[number] == (await timed(engine, asked[number], sampling))[0] for number in some]
    return counted / (ended - began), all(same)


async def delay(learnt: Learnt, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds between two tokens, on the wires and of the processor; and those of them that the stages computed."""
    spent = 0.0

    async def here(work: Any, steps: Sequence[Step]) -> Any:
        nonlocal spent
        began = time.process_time()
        answer = work()
        spent += time.process_time() - began
        return answer

    async with open_world(learnt, ITL_DELAY_S, compute=here) as world:
        generation = world.engine().generate(prompt, Sampling(temperature=0, max_tokens=tokens))
        await anext(generation)
        before, began, processor = spent, anyio.current_time(), time.process_time()
        count = len([token async for token in generation])
        used = time.process_time() - processor + anyio.current_time() - began
    return used / count, (spent - before) / count


async def delay_on_the_wall(learnt: Learnt, prompt: list[int], tokens: int) -> float:
    """Seconds between two tokens, the median."""
    async with open_world(learnt, ITL_DELAY_S, compute=in_thread) as world:
        at = list[float]()
        async for _ in world.engine().generate(prompt, Sampling(temperature=0, max_tokens=tokens)):
            at.append(time.perf_counter())
    return statistics.median(b - a for a, b in itertools.pairwise(at))


def batch_gain(learnt: Learnt, tokens: int) -> float:
    """Processor time of 16 texts, each computed alone, over that of all in one forward of each stage."""
    used = []
    for together in (False, True):
        decoders = [StageDecoder(stage) for stage in learnt.stages]
        began = time.process_time()
        for place in range(tokens):
            steps = [Step(str(n), [learnt.unseen[0][place + n]], None) for n in range(STREAMS)]
            for group in [steps] if together else [[step] for step in steps]:
                answers: list[Any] = [None] * len(group)
                for decoder in decoders:
                    answers = decoder.run([Step(s.session, s.ids, a) for s, a in zip(group, answers, strict=True)])
        used.append(time.process_time() - began)
    return used[0] / used[1]


def about() -> str:
    return f"""Trained here for 240 steps; 96 tokens each after 4 texts that it has not seen. A forward is charged
{1000 * STAGE_S:.0f} ms and {100 * MORE:.0f} % more for each further token.

What this does not say: half a minute of training gives a model whose greedy texts soon repeat themselves, and those are
easy to guess. At temperature 0.8 (`sampled_speedup`) guesses gain next to nothing. A better model with a better draft
lies between; what does not depend on the model is that the texts are equal.
"""


if __name__ == "__main__":
    main()

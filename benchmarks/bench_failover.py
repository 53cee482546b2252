"""Stages killed in mid-text: is the text the same, and what did it cost to go on?

    python benchmarks/bench_failover.py [--quick] [--json]

Four stages with two workers each, 25 ms apart, a model that is trained here, in virtual time (`decode_world.py`). In
each run the worker in use of one stage dies at a random token; every stage in turn, and in turn without a word (noticed
after 3 s of silence) and closing its links; with guesses and without; greedy and sampled. Each text is compared with
the one that nobody disturbed.

- recovery_prefills: tokens that all stages computed beyond those of an undisturbed run, over what a prefill of the
  text so far would be for all stages. The most, over all kills; `recovery_prefills_mean` beside it.
- recovery_s: from the last token before to the first one after, of the kills that said goodbye, median; a silent one
  adds what it takes to notice. `first_token_s` is what a new text of that length takes, for comparison.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from typing import Any

import anyio
import structlog
import torch
from decode_world import STAGES, Learnt, learn, open_world, prompts, table, write_results

from tessera.p2p.memory import run_virtual
from tessera.serving.decoding.speculation import NgramDraft
from tessera.serving.engine import Sampling

DELAY_S, PROMPT = 0.025, 48
FIGURES = (
    "kills",
    "identical",
    "recovery_prefills",
    "recovery_prefills_mean",
    "recovery_s",
    "first_token_s",
    "silent_s",
)


ABOUT = """Four stages with two workers each, 25 ms apart, virtual time, 48 tokens after 48 of a text that the
model has not seen."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer kills, shorter training: under 50 s on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    torch.set_num_threads(1)
    learnt = learn(quick=arguments.quick)
    result = measure(learnt, kills=8 if arguments.quick else 50, tokens=24 if arguments.quick else 48)
    print(table(result))
    if not arguments.quick:
        write_results("failover", "Losing stages in mid-text", ABOUT, result)
    if arguments.json:
        print(json.dumps({key: result[key] for key in FIGURES}))


def measure(learnt: Learnt, *, kills: int, tokens: int) -> dict[str, Any]:
    rng, runs = random.Random(0), list[dict[str, float]]()
    for number, prompt in enumerate(prompts(learnt, kills, PROMPT)):
        how = {"temperature": 0.0} if number % 3 else {"temperature": 0.8, "top_p": 0.95}
        sampling = Sampling(**how, seed=number, max_tokens=tokens)
        draft = NgramDraft() if number // 2 % 2 else None
        at, stage, silent = rng.randrange(2, tokens - 1), number % STAGES, bool(number // STAGES % 2)
        runs.append(run_virtual(one, learnt, prompt, sampling, draft, at, stage, silent))
    told = [run["gap_s"] for run in runs if not run["silent"]]
    silent_gaps = [run["gap_s"] for run in runs if run["silent"]]
    return {
        "kills": len(runs),
        "identical": sum(int(run["identical"]) for run in runs),
        "recovery_prefills": max(run["prefills"] for run in runs),
        "recovery_prefills_mean": statistics.mean(run["prefills"] for run in runs),
        "recovery_s": statistics.median(told),
        "first_token_s": statistics.median(run["first_s"] for run in runs),
        "silent_s": statistics.median(silent_gaps),
    }


async def one(
    learnt: Learnt, prompt: list[int], sampling: Sampling, draft: NgramDraft | None, at: int, stage: int, silent: bool
) -> dict[str, float]:
    """One text, undisturbed and then with a kill, in worlds of their own."""
    async with open_world(learnt, DELAY_S, replicas=2) as world:
        began, first_s, undisturbed = anyio.current_time(), 0.0, list[int]()
        async for token in world.engine(draft).generate(prompt, sampling):
            first_s = first_s or anyio.current_time() - began
            undisturbed.append(token.id)
        usual = world.computed
    async with open_world(learnt, DELAY_S, replicas=2) as world:
        engine, found, gap_s, before = world.engine(draft), list[int](), 0.0, 0.0
        async for token in engine.generate(prompt, sampling):
            found.append(token.id)
            if len(found) == at:
                before = anyio.current_time()
                victim = world.transports[2 * stage]
                if silent:
                    world.network.kill(victim.id)
                else:
                    await victim.close()
            elif len(found) > at:
                gap_s = max(gap_s, anyio.current_time() - before)
                before = anyio.current_time()
        extra = world.computed - usual
        if not engine.recoveries:
            raise RuntimeError("the kill disturbed nobody: this run says nothing")
    return {
        "identical": found == undisturbed,
        "prefills": extra / (STAGES * (len(prompt) + at)),
        "gap_s": gap_s,
        "first_s": first_s,
        "silent": silent,
    }


if __name__ == "__main__":
    main()

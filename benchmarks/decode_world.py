"""What the decoding benchmarks share: a model that has learnt, texts that it has not seen, and stages on a network.

The model is trained here on the sources of Python's standard library; every eighth file is kept from it. Stages run the
real protocol over `MemoryNetwork`, whose delays are virtual. A forward computes for real, and is charged
`STAGE_S` · (1 + `MORE` · (new tokens - 1)) of virtual time: decoding reads all params once, whatever the number of
tokens, so more tokens in one forward cost little.
"""

from __future__ import annotations

import json
import os
import platform
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import torch

from tessera.core.signing import PeerKey
from tessera.models.config import ModelConfig, ModelSpec
from tessera.models.corpus import Skipped, read_standard_library
from tessera.models.dataset import Dataset
from tessera.models.decode import StageDecoder
from tessera.models.pipeline import Pipeline
from tessera.models.presets import Batch, default_spec
from tessera.models.stage import Stage
from tessera.models.steps import Step
from tessera.models.tokenizer import train_tokenizer
from tessera.p2p.memory import MemoryNetwork, MemoryTransport
from tessera.serving.decoding.shard_engine import ShardEngine, ShardEngineConfig
from tessera.serving.decoding.shards import FixedRoster, ShardConfig, ShardServer, serve_decode
from tessera.serving.decoding.speculation import Draft
from tessera.serving.engine import Sampling

RESULTS = Path(__file__).parent / "results"
STAGES = 4
STAGE_S, MORE = 0.020, 0.02
VOCABULARY, UNSEEN_EVERY = 1024, 8


@dataclass(frozen=True)
class Learnt:
    """A trained model in stages, what it learnt from, and what it has not seen."""

    spec: ModelSpec
    stages: list[Stage]
    seen: list[list[int]]
    unseen: list[list[int]]
    params: int
    loss: float  # nats per token, on what it has not seen
    seconds: float


def learn(*, quick: bool) -> Learnt:
    """1.3 million params and 240 steps of 512 tokens, about 30 s of one core; `quick`: 80 steps."""
    texts = read_texts(1_500_000)
    cut = [text for place, text in enumerate(texts) if place % UNSEEN_EVERY]
    kept = [text for place, text in enumerate(texts) if place % UNSEEN_EVERY == 0]
    tokenizer = train_tokenizer(cut, VOCABULARY)
    seen, unseen = ([tokenizer.encode(text) for text in part] for part in (cut, kept))
    spec, batch = default_spec(STAGES, vocab_size=tokenizer.vocab_size), Batch(4, 128, 1, 80 if quick else 240)
    small = ModelConfig(vocab_size=tokenizer.vocab_size, width=128, layers=4, heads=4, kv_heads=2, ffn=256, context=256)
    spec = spec.model_copy(update={"model": small, "codec": spec.codec.model_copy(update={"k": 16})})
    data = Dataset(
        spec.model.vocab_size, *(np.concatenate([np.asarray(t, np.uint16) for t in part]) for part in (seen, unseen))
    )
    pipeline, began = Pipeline(spec, steps=batch.steps), time.perf_counter()
    pipeline.train(data, batch)
    windows = np.stack([data.validation[at : at + 129] for at in range(0, 16 * 129, 129)]).astype(np.int64)
    loss = pipeline.evaluate(windows)
    stages = [trainer.whole_stage().eval() for trainer in pipeline.trainers]
    return Learnt(spec, stages, seen, unseen, pipeline.parameters, loss, time.perf_counter() - began)


def read_texts(limit: int) -> list[str]:
    source, texts, size = read_standard_library(), list[str](), 0
    numbers = list(range(len(source.files)))
    random.Random(0).shuffle(numbers)
    for number in numbers:
        text = "".join(piece.text for piece in source.read(number, 0, Skipped()))
        if len(text) > 4_000:
            texts.append(text)
            size += len(text)
        if size > limit:
            break
    return texts


def prompts(learnt: Learnt, count: int, length: int) -> list[list[int]]:
    """Beginnings out of the middle of files that the model has not seen."""
    rng = random.Random(1)
    long = [text for text in learnt.unseen if len(text) > 4 * length]
    found = []
    for number in range(count):
        text = long[number % len(long)]
        start = rng.randrange(len(text) - length)
        found.append(text[start : start + length])
    return found


async def charged(work: Callable[[], Any], steps: Sequence[Step]) -> Any:
    """Computes now, and takes as long as it is charged."""
    answer = work()
    await anyio.sleep(STAGE_S * (1 + MORE * (sum(len(step.ids) for step in steps) - 1)))
    return answer


@dataclass
class World:
    """`transports`, `decoders` and `servers` by stage, then by worker of it."""

    network: MemoryNetwork
    gateway: MemoryTransport
    transports: list[MemoryTransport]
    decoders: list[StageDecoder]
    servers: list[ShardServer]
    roster: FixedRoster
    spec: ModelSpec
    engines: list[ShardEngine] = field(default_factory=list)

    def engine(self, draft: Draft | None = None, **settings: Any) -> ShardEngine:
        model = self.spec.model
        config = ShardEngineConfig(context=model.context, vocab_size=model.vocab_size, **settings)
        self.engines.append(ShardEngine(self.gateway, self.roster, config, draft=draft))
        return self.engines[-1]

    @property
    def computed(self) -> int:
        """Tokens that went through a stage, all stages together."""
        return sum(decoder.tokens for decoder in self.decoders)


@asynccontextmanager
async def open_world(
    learnt: Learnt, delay_s: float, *, replicas: int = 1, star: bool = False, compute: Any = charged
) -> AsyncIterator[World]:
    """`star`: what goes from stage to stage goes by way of the gateway."""
    spec, model = learnt.spec, learnt.spec.model
    network = MemoryNetwork(random.Random(0), delay_s=delay_s)
    async with AsyncExitStack() as stack:
        count = STAGES * replicas
        keys = [PeerKey(bytes([number + 1]) * 32) for number in range(count + 1)]
        gateway, *transports = [await stack.enter_async_context(network.start(key)) for key in keys]
        if star:
            for a in transports:
                for b in transports:
                    if a is not b:
                        network.shape(a.id, b.id, delay_s=2 * delay_s)
        records = [transport.record() for transport in transports]
        roster = FixedRoster(tuple(tuple(records[stage * replicas :][:replicas]) for stage in range(STAGES)))
        config = ShardConfig(context=model.context, vocab_size=model.vocab_size)
        decoders = [StageDecoder(learnt.stages[number // replicas]) for number in range(count)]
        servers = [
            serve_decode(transport, decoder, number // replicas, roster, config, compute=compute)
            for number, (transport, decoder) in enumerate(zip(transports, decoders, strict=True))
        ]
        yield World(network, gateway, transports, decoders, servers, roster, spec)


async def timed(engine: ShardEngine, prompt: Sequence[int], sampling: Sampling) -> tuple[list[int], float]:
    """The tokens, and seconds from the first of them to the last."""
    found, began, ended = list[int](), 0.0, 0.0
    async for token in engine.generate(prompt, sampling):
        found.append(token.id)
        ended = anyio.current_time()
        began = began if len(found) > 1 else ended
    return found, ended - began


def table(facts: dict[str, Any]) -> str:
    rows = [
        f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in facts.items()
    ]
    return "\n".join(["| figure | value |", "|---|---|", *rows])


def write_results(name: str, title: str, about: str, result: dict[str, Any]) -> None:
    """One flat object, and a page that says where it was measured and what it does not say."""
    facts = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}."
    )
    command = f"`python benchmarks/bench_{name}.py`, which says what each figure is."
    page = f"# {title}\n\n{about}\n{where}\n{command}\n\n{table(facts)}\n"
    (RESULTS / f"{name}_{os.cpu_count()}core_{datetime.now(UTC):%Y%m}.md").write_text(page)

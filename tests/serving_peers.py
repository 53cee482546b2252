"""Stages of a tiny model over peers, for tests."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import torch

from tessera.core.signing import PeerKey
from tessera.models.decode import StageDecoder
from tessera.models.presets import Kind, tiny_spec
from tessera.models.stage import Stage
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.memory import MemoryNetwork
from tessera.p2p.transport import Transport
from tessera.serving.decoding.links import PROTOCOL, Limits, Link
from tessera.serving.decoding.shard_engine import ShardEngine, ShardEngineConfig
from tessera.serving.decoding.shards import FixedRoster, ShardConfig, ShardServer, serve_decode
from tessera.serving.decoding.speculation import Draft
from tessera.serving.engine import Sampling
from tessera.serving.income.dues import Dues
from tessera.serving.income.gate import Gate


@dataclass
class Shards:
    """`stages` peers that serve, and a gateway's engine over them."""

    network: MemoryNetwork | None
    gateway: Any
    transports: list[Any]
    decoders: list[StageDecoder]
    servers: list[ShardServer]
    roster: FixedRoster
    engine: ShardEngine
    config: ShardConfig

    async def link(self, stage: int, transport: Any = None) -> Link:
        """A stream of our own to a stage, to say what we like."""
        stream = await (transport or self.gateway).open(self.roster.holders(stage)[0], PROTOCOL, timeout_s=5)
        return Link(stream, Limits(tokens=self.config.context, vocab_size=self.config.vocab_size, payload=1 << 16))

    def holding(self) -> int:
        """Sessions, listeners and caches held anywhere."""
        servers = sum(server.sessions + server.listeners for server in self.servers)
        return servers + sum(len(decoder) for decoder in self.decoders)

    async def settled(self) -> None:
        """Returns when nothing is held any more; fails the test when something stays."""
        with anyio.fail_after(5):
            while self.holding():
                await anyio.sleep(0.005)

    def one_process(self, prompt: list[int], count: int) -> list[int]:
        """Greedy decoding with the same stages and no peers, token by token."""
        firsts = self.decoders[:: len(self.decoders) // self.roster.stages]
        decoders = [StageDecoder(decoder.stage) for decoder in firsts]
        new, found = list(prompt), []
        for _ in range(count):
            out: Any = None
            for decoder in decoders:
                out = decoder.step("one", new, out)
            new = [int(out.argmax())]
            found += new
        return found


def peer_key(number: int) -> PeerKey:
    """Of the gateway, which is 0, and of the workers."""
    return PeerKey(bytes([number + 1]) * 32)


@asynccontextmanager
async def open_peers(count: int, *, real: bool) -> AsyncIterator[tuple[MemoryNetwork | None, list[Transport]]]:
    """Transports over QUIC when `real`, else over a network in memory with the same behaviour."""
    network = None if real else MemoryNetwork(random.Random(0))
    async with AsyncExitStack() as stack:
        keys = [peer_key(number) for number in range(count)]
        starts = [IrohTransport.start(key) if network is None else network.start(key) for key in keys]
        yield network, [await stack.enter_async_context(start) for start in starts]


@asynccontextmanager
async def open_shards(
    stages: int = 4,
    codec: Kind = "codec",
    *,
    replicas: int = 1,
    real: bool = False,
    draft: Draft | None = None,
    gateway_settings: Mapping[str, Any] | None = None,
    gate: Callable[[int], Gate] | None = None,
    dues: Callable[[Any, list[Any]], Dues] | None = None,
    **settings: Any,
) -> AsyncIterator[Shards]:
    """`transports`, `decoders` and `servers` are by stage, then by worker of it, and so is what `gate` is asked for.

    Args:
        dues: of the gateway with this transport, whose workers have these records.
    """
    spec = tiny_spec(stages=stages, codec=codec)
    model = spec.model
    async with open_peers(stages * replicas + 1, real=real) as (network, (gateway, *transports)):
        records = [transport.record() for transport in transports]
        roster = FixedRoster(tuple(tuple(records[stage * replicas :][:replicas]) for stage in range(stages)))
        config = ShardConfig(context=model.context, vocab_size=model.vocab_size, **settings)
        decoders = [StageDecoder(_lively(Stage(spec, number // replicas))) for number in range(stages * replicas)]
        servers = [
            serve_decode(transport, decoder, number // replicas, roster, config, gate=gate(number) if gate else None)
            for number, (transport, decoder) in enumerate(zip(transports, decoders, strict=True))
        ]
        how = {"step_timeout_s": 5} | dict(gateway_settings or {})
        shape = ShardEngineConfig(model.context, model.vocab_size, **how)
        engine = ShardEngine(gateway, roster, shape, draft=draft, dues=dues(gateway, records) if dues else None)
        yield Shards(network, gateway, transports, decoders, servers, roster, engine, config)


async def tokens(engine: ShardEngine, prompt: list[int], sampling: Sampling) -> list[int]:
    return [token.id async for token in engine.generate(prompt, sampling)]


def _lively(stage: Stage) -> Stage:
    """Away from its first values, at which a model with a zero head answers the same to everything."""
    generator = torch.Generator().manual_seed(stage.index)
    with torch.no_grad():
        for param in stage.parameters():
            param += 0.1 * torch.randn(param.shape, generator=generator)
    return stage.eval()

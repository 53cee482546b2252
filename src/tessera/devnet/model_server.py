"""Serving an imported model: its stages, the engine over them, and the gateway in front.

All stages in this process, over a transport that never leaves it; or some of them on other machines, which come with an
invitation. Then every stage here is a peer of its own among the others, and a request is answered while each stage has
somebody.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import structlog
import torch
from anyio import to_thread

from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Invalid
from tessera.core.ids import parse_blob_id
from tessera.core.signing import PeerKey
from tessera.devnet.http import bind_port, listening
from tessera.devnet.library import model_tokenizer
from tessera.devnet.model_till import Access, open_model_till
from tessera.devnet.stage_hosting import StageDesk
from tessera.devnet.stage_invitation import StageInvitation
from tessera.devnet.stage_table import StageTable
from tessera.models.card import ModelCard
from tessera.models.decode import StageDecoder
from tessera.models.memory import free_ram_bytes
from tessera.models.stage_file import load_stage
from tessera.p2p.blobs import BlobStore, serve_blobs
from tessera.p2p.engines import start_transport
from tessera.p2p.memory import MemoryNetwork
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import Transport
from tessera.serving.callers import CallerLimits
from tessera.serving.chat_template import TemplateChat
from tessera.serving.decoding.shard_engine import ShardEngine, ShardEngineConfig
from tessera.serving.decoding.shards import ShardConfig, serve_decode
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.training.home import Home, write_atomic

__all__ = ["Peers", "ServeConfig", "Served", "serve_model"]

log = structlog.get_logger()

ANSWER_TOKENS = 1024  # when a request names no limit
ONLINE_S = 5.0  # for a relay, before the invitation is made


@dataclass(frozen=True, slots=True)
class Peers:
    """Which stages other machines hold: the last `stages` of them. More machines than stages make replicas."""

    stages: int
    bind: str = "0.0.0.0:0"
    relays: tuple[RelayUrl, ...] = ()
    hours: float = 168.0  # that the invitation is good for


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """How a model is served."""

    host: str = "127.0.0.1"
    port: int = 8410  # 0 = any free one
    access: Access = field(default_factory=Access)
    concurrent: int = 16  # answers at once
    callers: CallerLimits = field(default_factory=CallerLimits)
    threads: int = 0  # of each stage; 0 = the stages here share the cores
    peers: Peers | None = None


@dataclass(frozen=True)
class Served:
    """A model that answers."""

    url: str
    card: ModelCard
    table: StageTable
    first_key: str  # an API key that was made just now; shown once
    invitation: StageInvitation | None
    desk: StageDesk | None


@asynccontextmanager
async def serve_model(home: Home, card: ModelCard, config: ServeConfig, clock: Clock) -> AsyncIterator[Served]:
    """Serve `card` inside the block.

    Raises: Invalid: free and paid at once, no memory for the stages, a chat template that fails; Conflict: the port is
    taken; Unavailable: the chain does not answer.
    """
    async with AsyncExitStack() as stack:
        blobs = BlobStore(home.blobs)
        tokenizer = await to_thread.run_sync(model_tokenizer, blobs, card)
        chat = None
        if card.template:
            chat = await stack.enter_async_context(TemplateChat(card.template, card.named, tokenizer, clock))
        opening = open_model_till(home, config.access, card.spec.model.context, clock)
        till = await stack.enter_async_context(opening)
        table = StageTable(card.spec.stages)
        opened = await stack.enter_async_context(_open_stages(home, card, config, table, blobs, clock))
        limits = ShardEngineConfig(context=card.spec.model.context, vocab_size=card.spec.model.vocab_size)
        model = LocalModel(
            card.name,
            ShardEngine(opened.gateway, table, limits),
            tokenizer,
            chat=chat,
            stop_tokens=card.ends,
            default_max_tokens=ANSWER_TOKENS,
            is_ready=lambda: table.complete,
            clock=clock,
        )
        limit = GatewayConfig(
            max_concurrent=config.concurrent, callers=config.callers, public_url=config.access.public_url
        )
        app = create_app(limit, [model], till.ways, clock=clock)
        till.mount(app)
        server_socket = bind_port(config.host, config.port)
        stack.callback(server_socket.close)
        url = await stack.enter_async_context(listening(app, server_socket))
        yield Served(url, card, table, till.first_key, opened.invitation, opened.desk)


@dataclass(frozen=True)
class _Opened:
    gateway: Transport
    invitation: StageInvitation | None = None
    desk: StageDesk | None = None


@asynccontextmanager
async def _open_stages(
    home: Home, card: ModelCard, config: ServeConfig, table: StageTable, blobs: BlobStore, clock: Clock
) -> AsyncIterator[_Opened]:
    """The stages of this process in `table`, and the way for the engine to reach them and others."""
    peers = config.peers
    others = peers.stages if peers else 0
    if not 0 <= others <= card.spec.stages:
        raise Invalid(f"the model has {card.spec.stages} stages: other machines cannot hold {others} of them")
    own = range(card.spec.stages - others)
    _check_memory(card, own)
    # More threads than cores spin while they wait for each other: 20 times slower on a busy machine.
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // max(1, len(own))))
    async with AsyncExitStack() as stack:
        network = MemoryNetwork(random.Random(0))

        async def transport(key: PeerKey, bind: str) -> Transport:
            if peers is None:
                return await stack.enter_async_context(network.start(key))
            start = start_transport("iroh", key, bind=bind, relays=peers.relays, clock=clock, online_s=ONLINE_S)
            return await stack.enter_async_context(start)

        gateway = await transport(home.peer_key, peers.bind if peers else "")
        limits = ShardConfig(context=card.spec.model.context, vocab_size=card.spec.model.vocab_size)
        for stage in own:
            file = blobs.path(parse_blob_id(card.stages[stage].blob))
            loaded = await to_thread.run_sync(load_stage, card.spec, stage, file)
            here = await transport(PeerKey.generate(), _any_port(peers.bind) if peers else "")
            serve_decode(here, StageDecoder(loaded), stage, table, limits, gateways=frozenset([gateway.id]))
            table.add(stage, here.record())
        if peers is None:
            yield _Opened(gateway)
            return
        serve_blobs(gateway, blobs)
        invitation = _invite(home, card, gateway, peers, clock)
        yield _Opened(gateway, invitation, StageDesk(gateway, card, table, invitation, clock))


def _invite(home: Home, card: ModelCard, gateway: Transport, peers: Peers, clock: Clock) -> StageInvitation:
    """The invitation of this model. One that was given out before stays good for its time."""
    file = home.path / "models" / f"{card.name}.invitation"
    expires, secret = int(clock.time() + peers.hours * 3600), ""
    if file.exists():
        known = encoding.decode(file.read_bytes(), 1024)
        if known["digest"] == card.digest and known["expires"] > clock.time():
            secret, expires = known["secret"], max(expires, known["expires"])
    made = StageInvitation.make(
        home.peer_key, card.digest, host=gateway.record(), expires=expires, relays=peers.relays, secret=secret
    )
    kept = {"digest": made.digest, "secret": made.secret, "expires": made.expires}
    write_atomic(file, encoding.encode(kept), mode=0o600)
    return made


def _check_memory(card: ModelCard, own: range) -> None:
    need, free = sum(card.stages[stage].size_bytes for stage in own), free_ram_bytes()
    if need > free:
        raise Invalid(
            f"{len(own)} stages of {card.name} need {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: let "
            "other machines hold some (--invite)",
            need_bytes=need,
            have_bytes=free,
        )


def _any_port(bind: str) -> str:
    """Every stage listens on a port of its own."""
    return f"{bind.rpartition(':')[0]}:0"

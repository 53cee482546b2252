"""One worker process: it trains its stage, and when the model is done it serves it. `tessera join` runs this."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import anyio
import structlog
from anyio import to_thread

from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Missing
from tessera.devnet.income import open_gate
from tessera.devnet.invitations import keep_invitation, last_invitation
from tessera.devnet.preview import Preview, make_preview, measure
from tessera.devnet.served import serving_terms
from tessera.models.decode import StageDecoder
from tessera.models.device import keep_freed_memory, pick_device
from tessera.models.parallel_link import RankLink
from tessera.p2p.engines import engine_of, start_transport
from tessera.p2p.pacer import Pacer
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import PeerRecord
from tessera.serving.decoding.shards import ShardConfig, serve_decode
from tessera.training.gate import Gate, GateConfig
from tessera.training.home import Home
from tessera.training.invitation import Invitation
from tessera.training.joining import HostLink, Offer, Pace, look
from tessera.training.roster import Roster, recall_run
from tessera.training.seating import Seated, WorkerConfig
from tessera.training.sensors import MachineSensors
from tessera.training.worker import Worker

__all__ = ["LiveRoster", "NodeConfig", "run_node"]

log = structlog.get_logger()


@dataclass(frozen=True)
class NodeConfig:
    """What the owner of a machine chooses."""

    bind: str = ""  # address and UDP port to listen on; "" = loopback when the host is on this machine, else all
    threads: int = 1  # torch threads
    patience_s: float = 60.0  # how long to look for the host before giving up
    probe_s: float = 3.0  # how long the stage's pace is measured before joining; 0 = not at all
    relays: tuple[RelayUrl, ...] = ()  # beside those of the invitation
    uplink_bytes_s: float | None = None  # most that this node may send; None = bulk gives way on the measured uplink
    gate: GateConfig = field(default_factory=GateConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)


Agree = Callable[[Preview], Awaitable[bool]]


async def run_node(
    home: Home,
    invitation_text: str,
    config: NodeConfig,
    *,
    agree: Agree,
    link: RankLink | None = None,
    clock: Clock | None = None,
) -> None:
    """Look, ask, take a seat, and work until the host closes the run or we have left it.

    Args:
        invitation_text: kept in the state directory once it was accepted; "" = the one that lies there.
        agree: shown what joining means, unless the seat is ours already or nothing was measured.
        link: to the other processes of this worker, when torchrun started several.

    Raises: Invalid, Refused, Conflict, Unavailable, Misbehaviour as `look` and `Worker` do; Conflict when the directory
    is in use.
    """
    import torch

    torch.set_num_threads(config.threads)
    keep_freed_memory()
    clock = clock or SystemClock()
    device = pick_device(config.worker.device)
    with home.locked():
        invitation = _read_invitation(home, invitation_text, clock)
        start = start_transport(
            engine_of(invitation.host),
            home.peer_key,
            bind=config.bind or invitation.listen_on,
            relays=_relays(invitation, config),
            clock=clock,
            pacer=Pacer(config.uplink_bytes_s),
        )
        async with start as transport:
            host = HostLink(transport, invitation, patience_s=config.patience_s, clock=clock)
            offer = await host.patiently(lambda: look(host))
            pace = None
            if not offer.returning and config.probe_s > 0:
                preview, pace = await _preview(host, offer, device, config.probe_s)
                if not await agree(preview):
                    return
            keep_invitation(home, invitation)
            gate = Gate(config.gate, MachineSensors(home.path, people=config.gate.only_when_idle), clock)
            serve = partial(_serve, host, home, clock)
            worker = Worker(home, host, config.worker, pace=pace, gate=gate, clock=clock, serve=serve, link=link)
            await worker.run()


async def _preview(host: HostLink, offer: Offer, device: str, seconds: float) -> tuple[Preview, Pace]:
    speed, pace = await to_thread.run_sync(partial(measure, offer, device=device, seconds=seconds))
    asked = anyio.current_time()
    offer = await host.patiently(lambda: look(host))  # others may have joined meanwhile; and this one tells the way
    return make_preview(offer, speed, pace, anyio.current_time() - asked), pace


class LiveRoster:
    """A roster whose addresses follow peers that come back elsewhere."""

    def __init__(self, current: Callable[[], Roster]) -> None:
        self._current = current

    @property
    def stages(self) -> int:
        return self._current().stages

    def holders(self, stage: int) -> list[PeerRecord]:
        return self._current().holders(stage)


def _read_invitation(home: Home, text: str, clock: Clock) -> Invitation:
    """What was given now, or lies here. Whoever has a seat in its run may come with an expired one."""
    if not text:
        return last_invitation(home, clock, even_expired=True)
    invitation = Invitation.parse(text, clock, even_expired=True)
    try:
        recall_run(home.run_folder(invitation.run_id))
        return invitation
    except Missing:
        return Invitation.parse(text, clock)


def _relays(invitation: Invitation, config: NodeConfig) -> tuple[RelayUrl, ...]:
    """Those of the invitation, and the owner's own; his token counts where both name one."""
    return tuple({relay.url: relay for relay in (*invitation.relays, *config.relays)}.values())


async def _serve(host: HostLink, home: Home, clock: Clock, seated: Seated) -> None:
    """Decode for the run's gateway, which is whoever gave the invitation, and for nobody else; and for what was paid,
    unless the manifest says that serving is open."""
    gateways = frozenset(peer.id for peer in host.invitation.peers)
    model = seated.manifest.model.model
    config = ShardConfig(context=model.context, vocab_size=model.vocab_size)
    roster = LiveRoster(lambda: seated.roster)
    terms = await host.patiently(lambda: serving_terms(seated.chain, seated.manifest, seated.roster))
    async with open_gate(seated, terms, gateways, (home.peer_key, home.account_key), clock) as gate:
        decoder = StageDecoder(seated.trainer)
        serve_decode(seated.transport, decoder, seated.stage, roster, config, gateways=gateways, gate=gate)
        log.info("serving", stage=seated.stage)
        await anyio.sleep_forever()

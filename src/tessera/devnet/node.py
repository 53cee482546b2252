"""One worker process: it trains its stage, and when the model is done it serves it. `tessera join` runs this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import anyio
import structlog

from tessera.core.clock import Clock, SystemClock
from tessera.models.decode import StageDecoder
from tessera.models.device import keep_freed_memory
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.transport import PeerRecord
from tessera.serving.shards import ShardConfig, serve_decode
from tessera.training.home import Home, write_atomic
from tessera.training.roster import Roster
from tessera.training.ticket import Ticket
from tessera.training.worker import Seated, Worker, WorkerConfig

__all__ = ["LiveRoster", "NodeConfig", "run_node"]

log = structlog.get_logger()


@dataclass(frozen=True)
class NodeConfig:
    """What the owner of a machine chooses."""

    bind: str = ""  # address and UDP port to listen on; "" = loopback when the host is on this machine, else all
    threads: int = 1  # torch threads
    worker: WorkerConfig = field(default_factory=WorkerConfig)


async def run_node(home: Home, ticket_text: str, config: NodeConfig, clock: Clock | None = None) -> None:
    """Take a seat and work until the host closes the run. The ticket is kept in the state directory.

    Raises: Invalid, Conflict, Unavailable, Misbehaviour as `Worker` does; Conflict when the directory is in use.
    """
    import torch

    torch.set_num_threads(config.threads)
    keep_freed_memory()
    clock = clock or SystemClock()
    ticket = Ticket.parse(ticket_text, clock)
    with home.locked():
        write_atomic(home.path / "ticket", ticket.to_text().encode())
        async with IrohTransport.start(home.peer_key, bind=config.bind or ticket.listen_on) as transport:
            worker = Worker(home, ticket, transport, config.worker, clock=clock, serve=partial(_serve, ticket))
            await worker.run()


class LiveRoster:
    """A roster whose addresses follow peers that come back elsewhere."""

    def __init__(self, current: Callable[[], Roster]) -> None:
        self._current = current

    @property
    def stages(self) -> int:
        return self._current().stages

    def holder(self, stage: int) -> PeerRecord:
        return self._current().holder(stage)


async def _serve(ticket: Ticket, seated: Seated) -> None:
    """Decode for the run's gateway, which is whoever gave the ticket; for nobody else, since only it is paid."""
    gateways = frozenset(peer.id for peer in ticket.peers)
    model = seated.manifest.model.model
    config = ShardConfig(context=model.context, vocab_size=model.vocab_size)
    roster = LiveRoster(lambda: seated.roster)
    serve_decode(seated.transport, StageDecoder(seated.trainer), seated.stage, roster, config, gateways=gateways)
    log.info("serving", stage=seated.stage)
    await anyio.sleep_forever()

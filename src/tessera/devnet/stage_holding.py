"""Holding one stage of a model that another machine serves: fetch it, load it, decode for that machine's gateway.

The stage's file comes from the host, checked by its hash, and stays for the next time. When the host goes away the
stage waits for it to come back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import structlog
from anyio import to_thread

from tessera.core.clock import Clock
from tessera.core.errors import Invalid, Late, Misbehaviour, Refused, TesseraError, Unavailable
from tessera.core.ids import BlobId
from tessera.devnet.stage_invitation import StageInvitation
from tessera.devnet.stage_table import ALIVE_S, STAGES, StageTable, Stream, receive, send
from tessera.models.card import ModelCard
from tessera.models.decode import StageDecoder
from tessera.models.memory import free_ram_bytes
from tessera.models.stage_file import load_stage
from tessera.p2p.blobs import BlobStore, fetch
from tessera.p2p.engines import engine_of, start_transport
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import Transport
from tessera.serving.decoding.shards import ShardConfig, serve_decode
from tessera.training.home import Home

__all__ = ["Holding", "hold_stage"]

log = structlog.get_logger()

OPEN_S = 10.0
FETCH_S = 24 * 3600.0
AGAIN_S = (1.0, 2.0, 5.0, 10.0)  # between two tries to reach the host; the last one repeats


@dataclass(frozen=True, slots=True)
class Holding:
    """What is held, for people to see."""

    card: ModelCard
    stage: int
    ready: bool


Tell = Callable[[Holding], None]


async def hold_stage(
    home: Home,
    invitation: StageInvitation,
    clock: Clock,
    *,
    bind: str = "",
    relays: tuple[RelayUrl, ...] = (),
    tell: Tell = lambda holding: None,
) -> None:
    """Hold a stage until cancelled. The first try must reach the host.

    Raises: Refused, Conflict: the host does not want us; Unavailable, Late: nobody answers; Invalid: no memory for it.
    """
    with home.locked():
        start = start_transport(
            engine_of(invitation.host),
            home.peer_key,
            bind=bind or invitation.listen_on,
            relays=tuple({relay.url: relay for relay in (*invitation.relays, *relays)}.values()),
            clock=clock,
        )
        async with start as transport:
            holder = _Holder(home, transport, invitation, tell)
            tries = 0
            while True:
                try:
                    await holder.once()
                    tries = 0
                except (Unavailable, Late) as error:
                    if holder.stage < 0:
                        raise
                    log.warning("stage_host_lost", reason=error.message)
                await anyio.sleep(AGAIN_S[min(tries, len(AGAIN_S) - 1)])
                tries += 1


class _Holder:
    """One machine's part in a served model."""

    def __init__(self, home: Home, transport: Transport, invitation: StageInvitation, tell: Tell) -> None:
        self._blobs = BlobStore(home.blobs)
        self._transport, self._invitation, self._tell = transport, invitation, tell
        self._table: StageTable | None = None
        self.stage = -1  # -1: none yet

    async def once(self) -> None:
        """From asking for a stage to the end of the host's stream."""
        stream = await self._transport.open(self._invitation.host, STAGES, timeout_s=OPEN_S)
        try:
            async with anyio.create_task_group() as group:
                await self._ask(stream, group)
                group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            raise _only(errors) from errors
        finally:
            await stream.abort()

    async def _ask(self, stream: Stream, group: anyio.abc.TaskGroup) -> None:
        asked = {"secret": self._invitation.secret, "digest": self._invitation.digest, "want": self.stage}
        await send(stream, {"op": "ask", **asked})
        seat = await _answer(stream, "seat", stage=int, card=str)
        card = ModelCard.parse(seat["card"].encode())
        if card.digest != self._invitation.digest or not 0 <= seat["stage"] < card.spec.stages:
            raise Misbehaviour("the host shows another model than it invited to", evidence=card.digest)
        group.start_soon(_keep_alive, stream)
        if seat["stage"] != self.stage or self._table is None:
            await self._load(card, seat["stage"])
        await send(stream, {"op": "ready", "record": self._transport.record().to_text()})
        self._tell(Holding(card, self.stage, ready=True))
        while True:
            roster = await _answer(stream, "roster", stages=list)
            if self._table is not None:
                self._table.load(roster["stages"])

    async def _load(self, card: ModelCard, stage: int) -> None:
        self._tell(Holding(card, stage, ready=False))
        file = card.stages[stage]
        free = free_ram_bytes()
        if file.size_bytes > free:
            need, have = (f"{size / 1e9:.1f} GB" for size in (file.size_bytes, free))
            raise Invalid(f"stage {stage} of {card.name} needs {need} of memory, {have} are free")
        blob = BlobId(file.blob)
        await fetch(self._transport, [self._invitation.host], blob, self._blobs, timeout_s=FETCH_S)
        loaded = await to_thread.run_sync(load_stage, card.spec, stage, self._blobs.path(blob))
        self._table, model = StageTable(card.spec.stages), card.spec.model
        config = ShardConfig(context=model.context, vocab_size=model.vocab_size)
        gateways = frozenset([self._invitation.host.id])
        serve_decode(self._transport, StageDecoder(loaded), stage, self._table, config, gateways=gateways)
        self.stage = stage
        log.info("stage_loaded", model=card.name, stage=stage)


async def _answer(stream: Stream, op: str, **fields: type) -> dict[str, Any]:
    """The host's next message, which is `op`. Raises: Refused with the host's reason when it says sorry."""
    said = await receive(stream, reason=str, **fields)
    if said is None:
        raise Unavailable("the host ended the stream")
    if said["op"] == "sorry":
        raise Refused(str(said.get("reason", "the host refuses"))[:500], rule="host")
    if said["op"] != op or said.keys() != {"op", *fields}:
        raise Misbehaviour(f"expected {op}, not {str(said['op'])[:20]}", evidence=str(said)[:80])
    return said


async def _keep_alive(stream: Stream) -> None:
    while True:
        await anyio.sleep(ALIVE_S)
        await send(stream, {"op": "alive"})


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    leaves = [error for error in group.exceptions if isinstance(error, TesseraError)]
    return leaves[0] if leaves else group.exceptions[0]

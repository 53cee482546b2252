"""`Flood`: small signed items reach every member of a group, and stay until they expire.

Whoever gets news tells its neighbours the ids; who lacks one fetches it, and tells its own. So an item comes to each
member once, nobody is sent what it did not ask for, and each sets its own pace. Every `sync_s` a member compares what
it holds with one other, so that whoever was away, cut off or overrun catches up: an item is lost only when its origin
and all who held it are. What is accepted is decided in `flood_state`, whom we talk to in `flood_peers`, and the
talking is `flood_exchange`'s.

Bounds: memory is members × (`StateLimits.origin_bytes` and a queue of ids each way); every call has a deadline.
Rules: only members are answered, and only members' items are taken and passed on. A member that breaks the protocol is
dropped for `PeerLimits.bar_s`; one that signs two items in one slot is proven guilty, once for each slot.

All methods are called from the event loop's thread.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import structlog

from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Refused, TesseraError, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.calls import serve_calls
from tessera.p2p.flood_config import FloodConfig
from tessera.p2p.flood_exchange import CHECKS, REQUEST_LIMIT, FloodExchange
from tessera.p2p.flood_item import MAX_GROUP, Item, ItemStore, MemoryItemStore, prove_equivocation
from tessera.p2p.flood_peers import Bucket, FloodPeers
from tessera.p2p.flood_state import FloodState, origin_of
from tessera.p2p.transport import PeerRecord, Transport

__all__ = ["Flood", "FloodConfig", "FloodCounts", "flood_protocol"]

log = structlog.get_logger()

REFRESHES, REFRESHES_PER_S = 10.0, 1.0  # how often strangers make us look at the list of members
PLACES = 8  # calls of one member at once

T = TypeVar("T")

Subscriber = Callable[[Item], None]


@dataclass(frozen=True, slots=True)
class FloodCounts:
    """What a `Flood` holds now, and has done since it was made."""

    items: int
    size_bytes: int
    wanted: int  # ids that we have heard of and lack
    to_offer: int  # ids that wait to be offered, each counted for each peer
    accepted: int
    voided: int  # slots that their origins filled twice
    barred: int  # members dropped


def flood_protocol(group: str) -> str:
    """The name under which a group is flooded: groups on one transport do not meet."""
    return f"tessera/flood/1/{sha256(group.encode())[:8].hex()}"


class Flood:
    """One member's part in flooding `group`.

    Args:
        group: what the items belong to, a run id for one; signed with each of them. Up to 128 characters.
        members: who takes part now, ourselves included or not, with the newest known record of each. Asked often.
            Keep whoever leaves in the list until its items do not matter any more: then they are dropped.
        clock: for expiry; deadlines and rates follow the event loop's time.
        rng: chooses whom we compare with.
        store: where items outlive this process.
        on_misbehaviour: hears of each equivocation, with evidence for `check_equivocation`, and of each member that is
            dropped for breaking the protocol.
    """

    def __init__(
        self,
        transport: Transport,
        group: str,
        members: Callable[[], Sequence[PeerRecord]],
        key: PeerKey,
        clock: Clock,
        rng: random.Random,
        config: FloodConfig | None = None,
        *,
        store: ItemStore | None = None,
        on_misbehaviour: Callable[[Misbehaviour], None] | None = None,
    ) -> None:
        if not 0 < len(group) <= MAX_GROUP:
            raise Invalid(f"a group is a name of 1 to {MAX_GROUP} characters, not {len(group)}")
        if key.id != transport.id:
            raise Invalid(f"the key is {key.id[:16]}…'s, the transport {transport.id[:16]}…'s")
        self._transport, self._group, self._members, self._key = transport, group, members, key
        self._clock, self._rng, self._config = clock, rng, config or FloodConfig()
        self._store = store if store is not None else MemoryItemStore()
        self._on_misbehaviour = on_misbehaviour
        self._protocol = flood_protocol(group)
        self._state = FloodState(self._config.state)
        self._peers = FloodPeers(group, key.id, self._config.peers, rng, most=self._config.members)
        self._exchange = FloodExchange(
            transport, group, self._protocol, self._config, self._state, self._peers,
            wants=self._wants, take_in=self._take_in, on_misbehaviour=self._report,
        )  # fmt: skip
        self._subscribers: dict[str, list[Subscriber]] = {}
        self._refreshes = Bucket(REFRESHES, REFRESHES_PER_S)
        self._accepted = self._voided = 0

    # --- for the application ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take part until cancelled. Loads what the store kept, catches up with the neighbours, then serves on."""
        if self._exchange.tasks is not None:
            raise Conflict(f"the flood of {self._group[:16]} runs already")
        try:
            async with anyio.create_task_group() as self._exchange.tasks:
                await self._load()
                serve_calls(
                    self._transport, self._protocol, self._answer, request_limit=REQUEST_LIMIT, max_streams=PLACES
                )
                await self.catch_up()
                while True:
                    await anyio.sleep(self._config.sync_s * self._rng.uniform(0.5, 1.5))
                    self._tidy()
                    peer = self._peers.pick(anyio.current_time())
                    if peer is not None:
                        await self._exchange.compare(peer)
        finally:
            self._exchange.tasks = None

    def publish(self, topic: str, payload: bytes, key: str = "", *, ttl_s: float | None = None) -> Item:
        """Say `payload` to everybody. It is on disk when this returns; it is offered while `run` runs.

        Args:
            key: replaces what we said under this topic and key before; "" replaces nothing.

        Raises: Invalid for a field that no item may have; Refused when our items, until they expire, fill what an
        origin may hold; Unavailable when this is too much at once; what the store raises.
        """
        now, state = self._clock.time(), self._config.state
        ttl_s = self._config.ttl_s if ttl_s is None else ttl_s
        if not 0 < ttl_s <= state.max_ttl_s:
            raise Invalid(f"an item lives up to {state.max_ttl_s:g} s, not {ttl_s:g}")
        self._expire()
        sequence = self._state.next_sequence(self._key.id, now)
        item = Item(self._group, topic, self._key.id, sequence, key, math.ceil(now + ttl_s), bytes(payload))
        if not self._state.room(item):
            raise Refused(
                f"our items fill the {state.origin_items} places or {state.origin_bytes} bytes of one origin: publish"
                " fewer, shorter-lived or keyed ones",
                rule="flood_room",
            )
        wait_s = self._peers.news_wait_s(self._key.id, anyio.current_time())
        if wait_s > 0:
            raise Unavailable(f"published too much at once: wait {wait_s:.1f} s", retry_after_s=wait_s)
        item = item.signed_by(self._key)
        self._store.keep(item)
        self._take_in([item], None)
        return item

    def subscribe(self, topic: str, callback: Subscriber) -> None:
        """Call `callback(item)` for each item under `topic` that is accepted from now on, our own included.

        It must be quick. Items that do not count any more (void, replaced, expired) are not taken back: `items` says
        what counts. What a payload holds is the application's to check.
        """
        self._subscribers.setdefault(topic, []).append(callback)

    def items(self, topic: str) -> list[Item]:
        """What counts now under `topic`, by origin and then sequence: the same for all members that hold the same."""
        self._expire()
        return self._state.items(topic)

    async def catch_up(self) -> bool:
        """Compare with every neighbour now; False when none of them answered."""
        self._tidy()
        answered: list[PeerId] = []

        async def compare(peer: PeerId) -> None:
            if await self._exchange.compare(peer):
                answered.append(peer)

        async with anyio.create_task_group() as tasks:
            for peer in self._peers.neighbours(anyio.current_time()):
                tasks.start_soon(compare, peer)
        return bool(answered)

    def counts(self) -> FloodCounts:
        state, exchange = self._state, self._exchange
        return FloodCounts(
            items=len(state), size_bytes=state.size_bytes, wanted=exchange.wanted, to_offer=exchange.to_offer,
            accepted=self._accepted, voided=self._voided, barred=exchange.barred,
        )  # fmt: skip

    # --- taking in --------------------------------------------------------------------------------------------------

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if self._exchange.tasks is None:
            raise Unavailable("this member does not flood now", retry_after_s=60.0)
        now = anyio.current_time()
        self._knows(peer, now)
        self._expire()
        reply, out = self._exchange.answer(peer, request.get("op"), body)
        self._peers.heard(peer)
        self._peers.spend(peer, len(body) + len(out), now)
        return reply, out

    def _wants(self, id: bytes) -> bool:
        if not self._state.wants(id):
            return False
        origin, now = origin_of(id), anyio.current_time()
        if origin == self._key.id or self._state.get(id):  # ours, after a lost disk; or proof that a slot is void
            return True
        return self._knows(origin, now) and not self._peers.news_wait_s(origin, now)

    def _take_in(self, items: list[Item], source: PeerId | None) -> None:
        """Merge checked items, and tell the store, the neighbours and the subscribers.

        Args:
            source: who gave them; None for our own, which the store has already.
        """
        self._expire()
        now, loop_now = self._clock.time(), anyio.current_time()
        news = [item for item in items if self._merge(item, now, loop_now, kept=source is None)]
        neighbours = self._peers.neighbours(loop_now) if news else []
        for item in news:
            self._exchange.announce(item, source, neighbours)
            if self._state.holds(item.id):  # not void
                for callback in self._subscribers.get(item.topic, ()):
                    self._tell(callback, item)

    def _merge(self, item: Item, now: float, loop_now: float, *, kept: bool) -> bool:
        """Whether `item` is news."""
        merged = self._state.merge(item, now)
        if merged.verdict == "new":
            self._accepted += 1
            self._peers.spend_news(item.origin, item.size_bytes, loop_now)
        elif merged.verdict == "void":
            self._voided += 1
        else:
            return False
        if not kept:
            self._keep(item)
        self._forget(merged.dropped)
        if merged.clash is not None:
            log.warning("flood_item_void", group=self._group, origin=item.origin, sequence=item.sequence)
            self._report(prove_equivocation(merged.clash, item))
        return True

    def _report(self, error: Misbehaviour) -> None:
        if self._on_misbehaviour is not None:
            self._tell(self._on_misbehaviour, error)

    def _tell(self, callback: Callable[[T], None], news: T) -> None:
        """What a peer sent must not be able to stop the flood, whatever the application makes of it."""
        try:
            callback(news)
        except Exception:
            log.exception("flood_callback_broke", group=self._group)

    # --- housekeeping -----------------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        self._refresh()
        self._expire()
        self._forget(self._state.keep_origins(self._peers.members | {self._key.id}))
        self._exchange.keep_members()

    def _knows(self, peer: PeerId, now: float) -> bool:
        """Whether `peer` is a member; the list is read again when it seems not."""
        if peer not in self._peers and not self._refreshes.wait_s(now):
            self._refreshes.take(1.0, now)
            self._refresh()
        return peer in self._peers

    def _refresh(self) -> None:
        members = self._members()
        if len(members) > self._config.members:
            log.warning("flood_members_ignored", group=self._group, count=len(members) - self._config.members)
        self._peers.refresh(members)

    def _expire(self) -> None:
        self._forget(self._state.expire(self._clock.time()))

    def _keep(self, item: Item) -> None:
        try:
            self._store.keep(item)
        except (OSError, TesseraError) as error:  # others hold it too; what is ours raises in `publish`
            log.error("flood_item_not_kept", group=self._group, origin=item.origin, reason=str(error))

    def _forget(self, items: Iterable[Item]) -> None:
        for item in items:
            try:
                self._store.drop(item)
            except (OSError, TesseraError) as error:  # it is dropped again after the next start
                log.error("flood_item_not_dropped", group=self._group, origin=item.origin, reason=str(error))

    async def _load(self) -> None:
        """What the store kept; an item that is damaged, expired, or of nobody any more, is dropped."""
        self._refresh()
        now = self._clock.time()
        for number, item in enumerate(sorted(self._store.load(), key=lambda item: -item.expires)):
            if number % CHECKS == 0:
                await anyio.lowlevel.checkpoint()
            if not self._is_ours(item):
                self._forget([item])
                continue
            merged = self._state.merge(item, now)
            self._forget(merged.dropped if merged.verdict in ("new", "void", "known") else [item])

    def _is_ours(self, item: Item) -> bool:
        if item.group != self._group or (item.origin not in self._peers and item.origin != self._key.id):
            return False
        try:
            item.check()
        except Invalid as error:
            log.warning("flood_item_damaged", group=self._group, origin=item.origin, reason=error.message)
            return False
        return True

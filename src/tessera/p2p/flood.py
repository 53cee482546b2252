"""`Flood`: small signed items reach every member of a group, and stay until they expire.

Whoever gets news tells its neighbours the ids; who lacks one fetches it, and tells its own. So an item crosses each
link at most once, nobody is sent what it did not ask for, and each sets its own pace. Every `sync_s` a member compares
what it holds with one other, so that whoever was away, cut off or overrun catches up: an item is lost only when its
origin and all who held it are. What is accepted is decided in `flood_state`, whom we talk to in `flood_peers`.

Bounds: memory is members × (`StateLimits.origin_bytes` + `QUEUE` ids each way); to each member at most three calls are
under way, each with a deadline. Rules: only members are answered, and only members' items are taken and passed on.
A member that breaks the protocol is dropped for `PeerLimits.bar_s`; one that signs two items in one slot is proven
guilty to `on_misbehaviour`, once for each slot.

All methods are called from the event loop's thread.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import structlog

from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Refused, TesseraError, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.flood_index import ANSWER_LIMIT, ASK_LIMIT, Reconciliation, answer_ranges, split_ids
from tessera.p2p.flood_item import (
    ID_BYTES,
    ITEM_LIMIT,
    MAX_GROUP,
    Item,
    ItemStore,
    MemoryItemStore,
    join_items,
    prove_equivocation,
    split_items,
)  # fmt: skip
from tessera.p2p.flood_peers import Bucket, FloodPeers, PeerLimits
from tessera.p2p.flood_state import FloodState, StateLimits, origin_of
from tessera.p2p.flood_want import WantList
from tessera.p2p.transport import PeerRecord, Transport

__all__ = ["Flood", "FloodConfig", "FloodCounts", "flood_protocol"]

log = structlog.get_logger()

QUEUE = 1024  # ids that wait to be offered to, or fetched from, one peer; the rest is left to the next comparison
OFFER_IDS = 512  # in one call
GET_IDS = 256
GET_BYTES = 256 * 1024  # of items in one answer, and the last item
HEAD_BYTES = 256  # of a request or reply, beside its body
REQUEST_LIMIT = max(OFFER_IDS * ID_BYTES, ASK_LIMIT) + HEAD_BYTES
COMPARE_S = 120.0  # one comparison, fetching included
COMPARE_ROUNDS = 16
WAITS = 5  # times that we wait for a peer that asks us to
WAIT_MOST_S = 60.0
REFRESHES, REFRESHES_PER_S = 10.0, 1.0  # how often strangers make us look at the list of members
CHECKS = 16  # signatures checked in one go: 2 ms
MALFORMED = 10.0  # points
UNDELIVERED = 16  # ids that a peer offered and does not have cost a point

Subscriber = Callable[[Item], None]


@dataclass(frozen=True, slots=True)
class FloodConfig:
    """How one group is flooded. All members should agree on `state` and on the `news` limits."""

    ttl_s: float = 7 * 86_400.0  # an item lives this long unless its publisher says otherwise
    sync_s: float = 30.0  # between two comparisons with somebody, on average
    gather_s: float = 0.1  # news waits this long for more before it is offered
    call_s: float = 15.0  # deadline of one call
    members: int = 256  # more are ignored
    state: StateLimits = field(default_factory=StateLimits)
    peers: PeerLimits = field(default_factory=PeerLimits)


@dataclass(frozen=True, slots=True)
class FloodCounts:
    """What a `Flood` holds and has done, for pages and tests."""

    items: int
    size_bytes: int
    wanted: int
    to_offer: int
    accepted: int
    voided: int
    barred: int


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
        self._want = WantList(QUEUE)
        self._outbox: dict[PeerId, dict[bytes, None]] = {}
        self._offering: set[PeerId] = set()
        self._pulling: dict[PeerId, anyio.Event] = {}
        self._subscribers: dict[str, list[Subscriber]] = {}
        self._tasks: anyio.abc.TaskGroup | None = None
        self._refreshes = Bucket(REFRESHES, REFRESHES_PER_S)
        self._accepted = self._voided = self._barred = 0

    # --- for the application ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take part until cancelled. Loads what the store kept, catches up with the neighbours, then serves on."""
        if self._tasks is not None:
            raise Conflict(f"the flood of {self._group[:16]} runs already")
        await self._load()
        try:
            async with anyio.create_task_group() as self._tasks:
                serve_calls(self._transport, self._protocol, self._answer, request_limit=REQUEST_LIMIT, max_streams=8)
                await self.catch_up()
                while True:
                    await anyio.sleep(self._config.sync_s * self._rng.uniform(0.5, 1.5))
                    self._tidy()
                    peer = self._peers.pick(anyio.current_time())
                    if peer is not None:
                        await self._compare(peer)
        finally:
            self._tasks = None

    def publish(self, topic: str, payload: bytes, key: str = "", *, ttl_s: float | None = None) -> Item:
        """Say `payload` to everybody. It is on disk when this returns; it is offered while `run` runs.

        Args:
            key: replaces what we said under this topic and key before; "" replaces nothing.

        Raises: Invalid for a field that no item may have; Refused when our items, until they expire, fill what an
        origin may hold; Unavailable when this is too much at once; what the store raises.
        """
        now, loop_now = self._clock.time(), anyio.current_time()
        self._expire()
        ttl_s = self._config.ttl_s if ttl_s is None else ttl_s
        if not 0 < ttl_s <= self._config.state.max_ttl_s:
            raise Invalid(f"an item lives up to {self._config.state.max_ttl_s:g} s, not {ttl_s:g}")
        sequence = self._state.next_sequence(self._key.id, now)
        item = Item(self._group, topic, self._key.id, sequence, key, math.ceil(now + ttl_s), bytes(payload))
        if not self._state.room(item):
            limits = self._config.state
            raise Refused(
                f"our items fill the {limits.origin_items} places or {limits.origin_bytes} bytes of one origin: publish"
                " fewer, shorter-lived or keyed ones",
                rule="flood_room",
            )
        wait_s = self._peers.news_wait_s(self._key.id, loop_now)
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
            if await self._compare(peer):
                answered.append(peer)

        async with anyio.create_task_group() as tasks:
            for peer in self._peers.neighbours(anyio.current_time()):
                tasks.start_soon(compare, peer)
        return bool(answered)

    def counts(self) -> FloodCounts:
        to_offer = sum(map(len, self._outbox.values()))
        state = self._state
        return FloodCounts(
            len(state), state.size_bytes, len(self._want), to_offer, self._accepted, self._voided, self._barred
        )

    # --- answering --------------------------------------------------------------------------------------------------

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if self._tasks is None:
            raise Unavailable("this member does not flood now", retry_after_s=60.0)
        now = anyio.current_time()
        self._knows(peer, now)
        self._peers.admit(peer, now)
        self._peers.heard(peer)
        try:
            reply, out = self._reply(peer, request.get("op"), body)
        except Invalid as error:
            self._fault(peer, MALFORMED, error.message)
            raise
        self._peers.spend(peer, len(body) + len(out), now)
        return reply, out

    def _reply(self, peer: PeerId, op: object, body: bytes) -> tuple[dict[str, Any], bytes]:
        self._expire()
        if op == "offer":
            self._hear_of(peer, _some_ids(body, OFFER_IDS))
            return {}, b""
        if op == "get":
            return self._give(_some_ids(body, GET_IDS))
        if op == "compare":
            return {}, answer_ranges(self._state.index, body)
        raise Invalid(f"a flood's operations are compare, get and offer, not {str(op)[:40]!r}")

    def _give(self, ids: list[bytes]) -> tuple[dict[str, Any], bytes]:
        """The items; `sent` says how many of the ids were looked at before the answer was full."""
        items, size, sent = list[Item](), 0, 0
        for id in ids:
            held = self._state.get(id)
            items += held
            size += sum(len(item.payload) + HEAD_BYTES for item in held)
            sent += 1
            if size >= GET_BYTES:
                break
        return {"sent": sent}, join_items(items)

    # --- offering ---------------------------------------------------------------------------------------------------

    def _offer_to(self, peer: PeerId, ids: Iterable[bytes]) -> None:
        outbox = self._outbox.setdefault(peer, {})
        for id in ids:
            if len(outbox) < QUEUE:
                outbox[id] = None
        if self._tasks is not None and outbox and peer not in self._offering:
            self._offering.add(peer)
            self._tasks.start_soon(self._offer, peer)

    async def _offer(self, peer: PeerId) -> None:
        outbox = self._outbox[peer]
        try:
            while outbox:
                await anyio.sleep(self._config.gather_s)
                some = list(outbox)[:OFFER_IDS]
                for id in some:
                    del outbox[id]
                ids = [id for id in some if self._state.holds(id)]
                if ids and await self._ask(peer, "offer", b"".join(ids), 0) is None:
                    outbox.clear()
        finally:
            self._offering.discard(peer)
            if not outbox:
                self._outbox.pop(peer, None)

    # --- fetching ---------------------------------------------------------------------------------------------------

    def _hear_of(self, peer: PeerId, ids: Iterable[bytes]) -> None:
        """`peer` has these: queue what we want, and fetch it."""
        now = anyio.current_time()
        for id in ids:
            if self._wants(id, now):
                self._want.offer(peer, id)
        self._start_pulls([peer])

    def _wants(self, id: bytes, now: float) -> bool:
        if not self._state.wants(id):
            return False
        origin = origin_of(id)
        if origin == self._key.id:
            return True
        return self._knows(origin, now) and not self._peers.news_wait_s(origin, now)

    def _start_pulls(self, peers: Iterable[PeerId]) -> None:
        for peer in peers:
            if self._tasks is not None and peer not in self._pulling and self._want.queued(peer):
                self._tasks.start_soon(self._pull, peer)

    async def _pull(self, peer: PeerId) -> None:
        """Fetch what is queued for `peer`; returns when nothing is."""
        while (other := self._pulling.get(peer)) is not None:
            await other.wait()
        done = self._pulling[peer] = anyio.Event()
        try:
            while ids := self._want.take(peer, GET_IDS):
                ids = self._still_wanted(ids)
                if ids and not await self._fetch(peer, ids):
                    self._start_pulls(self._want.abandon(peer))
        finally:
            del self._pulling[peer]
            done.set()

    def _still_wanted(self, ids: list[bytes]) -> list[bytes]:
        wanted = [id for id in ids if self._state.wants(id)]
        for id in set(ids).difference(wanted):
            self._want.settle(id)
        return wanted

    async def _fetch(self, peer: PeerId, ids: list[bytes]) -> bool:
        """Ask `peer` for `ids`, at most `GET_IDS`; what it does not deliver is asked of others."""
        try:
            answer = await self._ask(peer, "get", b"".join(ids), GET_BYTES + 2 * ITEM_LIMIT)
            sent = await self._read(peer, ids, answer) if answer is not None else 0
        except BaseException:
            self._pass_on(peer, ids)
            raise
        for id in ids[sent:]:
            self._want.put_back(peer, id)
        missed = [id for id in ids[:sent] if self._state.wants(id)]
        for id in set(ids[:sent]).difference(missed):
            self._want.settle(id)
        self._pass_on(peer, missed if sent else ids)
        if missed:
            self._fault(peer, 1 + len(missed) // UNDELIVERED, f"{len(missed)} items offered and not delivered")
        return bool(sent)

    async def _read(self, peer: PeerId, ids: list[bytes], answer: tuple[dict[str, Any], bytes]) -> int:
        """Take in what `peer` gave; how many of `ids` it has dealt with, 0 when it broke the protocol."""
        sent, asked = answer[0].get("sent"), {id[:-16] for id in ids}
        try:
            if type(sent) is not int or not 0 < sent <= len(ids):
                raise Invalid(f"{str(sent)[:40]} of {len(ids)} ids dealt with")
            items = split_items(self._group, answer[1])
            if any(item.slot not in asked for item in items) or len(items) > 2 * len(ids):
                raise Invalid("items that nobody asked for")
            for number, item in enumerate(items):
                if number % CHECKS == 0:
                    await anyio.lowlevel.checkpoint()
                item.check()
        except Invalid as error:
            self._bar(peer, error.message)
            return 0
        self._expire()
        self._take_in(sorted(items, key=lambda item: -item.expires), peer)
        return sent

    def _pass_on(self, peer: PeerId, ids: Iterable[bytes]) -> None:
        heirs = {self._want.miss(id, peer) for id in ids}
        self._start_pulls(heir for heir in heirs if heir is not None)

    def _take_in(self, items: list[Item], source: PeerId | None) -> None:
        """Merge checked items; tell the store, the subscribers, and the neighbours that have not told us."""
        now, loop_now = self._clock.time(), anyio.current_time()
        news: list[Item] = []
        for item in items:
            merged = self._state.merge(item, now)
            if merged.verdict in ("new", "void"):
                news.append(item)
                if source is not None:
                    self._keep(item)
            if merged.verdict == "new":
                self._accepted += 1
                self._peers.spend_news(item.origin, item.size_bytes, loop_now)
            elif merged.verdict == "void" and merged.clash is not None:
                self._voided += 1
                log.warning("flood_item_void", group=self._group, origin=item.origin, sequence=item.sequence)
                self._report(prove_equivocation(merged.clash, item))
            self._forget(merged.dropped)
        neighbours = self._peers.neighbours(loop_now) if news else []
        for item in news:
            self._announce(item, source, neighbours)
            self._tell_subscribers(item)

    def _announce(self, item: Item, source: PeerId | None, neighbours: list[PeerId]) -> None:
        id = self._state.id_at(item.slot)
        if id is not None:
            knowing = {source, item.origin, *self._want.sources(id)} if id == item.id else set()  # void is news to all
            for peer in neighbours:
                if peer not in knowing:
                    self._offer_to(peer, [id])

    def _tell_subscribers(self, item: Item) -> None:
        if self._state.id_at(item.slot) != item.id:
            return  # void
        for callback in self._subscribers.get(item.topic, ()):
            try:
                callback(item)
            except Exception:  # a payload must not be able to stop the flood
                log.exception("flood_subscriber_broke", group=self._group, topic=item.topic, origin=item.origin)

    # --- comparing --------------------------------------------------------------------------------------------------

    async def _compare(self, peer: PeerId) -> bool:
        """Bring both of us to the same items; False when it did not answer to the end."""
        with anyio.move_on_after(COMPARE_S):
            for _ in range(COMPARE_ROUNDS):
                found = Reconciliation(self._state.index, most=QUEUE)
                while (question := found.ask()) is not None:
                    answer = await self._ask(peer, "compare", question, ANSWER_LIMIT)
                    if answer is None:
                        return False
                    try:
                        found.hear(answer[1])
                    except Invalid as error:
                        self._bar(peer, error.message)
                        return False
                self._offer_to(peer, found.surplus)
                accepted = self._accepted
                self._hear_of(peer, found.missing)
                if len(self._want):
                    await self._pull(peer)
                if found.whole or self._accepted == accepted:
                    return True
        return False

    # --- peers ------------------------------------------------------------------------------------------------------

    async def _ask(self, peer: PeerId, op: str, body: bytes, reply_limit: int) -> tuple[dict[str, Any], bytes] | None:
        """One call. None when there is no answer: then `peer` is left alone for a while."""
        for _ in range(WAITS):
            record = self._peers.record(peer)
            if record is None or self._peers.barred(peer, anyio.current_time()):
                return None
            try:
                answer = await call(
                    self._transport, record, self._protocol, {"op": op}, body,
                    timeout_s=self._config.call_s, reply_limit=reply_limit + HEAD_BYTES,
                )  # fmt: skip
            except Misbehaviour as error:
                self._bar(peer, error.message)
                return None
            except TesseraError as error:
                if not isinstance(error, Unavailable) or error.fields.get("throttled") is not True:
                    self._lost(peer, error)
                    return None
                await anyio.sleep(min(error.retry_after_s, WAIT_MOST_S))
            else:
                self._peers.heard(peer)
                return answer
        return None

    def _lost(self, peer: PeerId, error: TesseraError) -> None:
        log.debug("flood_peer_away", group=self._group, peer_id=peer, code=error.code, reason=error.message)
        self._peers.failed(peer, anyio.current_time())

    def _fault(self, peer: PeerId, points: float, what: str) -> None:
        if self._peers.fault(peer, points, anyio.current_time()):
            self._dropped(peer, what)

    def _bar(self, peer: PeerId, what: str) -> None:
        if self._peers.bar(peer, anyio.current_time()):
            self._dropped(peer, what)

    def _dropped(self, peer: PeerId, what: str) -> None:
        self._barred += 1
        log.warning("flood_peer_barred", group=self._group, peer_id=peer, reason=what)
        self._outbox.get(peer, {}).clear()
        self._start_pulls(self._want.abandon(peer))
        self._report(Misbehaviour(f"{peer[:16]}…: {what}", evidence={"peer": peer, "fault": what}, peer=peer))

    def _report(self, error: Misbehaviour) -> None:
        if self._on_misbehaviour is not None:
            self._on_misbehaviour(error)

    # --- housekeeping -----------------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        self._refresh()
        self._expire()
        self._forget(self._state.keep_origins(self._peers.members | {self._key.id}))
        for peer in [peer for peer in self._outbox if peer not in self._peers]:
            self._outbox[peer].clear()

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
        """What the store kept; an item that is damaged, or of nobody any more, is dropped."""
        self._refresh()
        now = self._clock.time()
        for number, item in enumerate(sorted(self._store.load(), key=lambda item: -item.expires)):
            if number % CHECKS == 0:
                await anyio.lowlevel.checkpoint()
            try:
                item.check()
            except Invalid as error:
                log.warning("flood_item_damaged", group=self._group, origin=item.origin, reason=error.message)
                self._forget([item])
                continue
            known = item.group == self._group and (item.origin in self._peers or item.origin == self._key.id)
            merged = self._state.merge(item, now) if known else None
            held = merged is not None and merged.verdict in ("new", "void", "known")
            self._forget((*(merged.dropped if merged else ()), *(() if held else (item,))))


def _some_ids(body: bytes, most: int) -> list[bytes]:
    ids = split_ids(body)
    if not 0 < len(ids) <= most:
        raise Invalid(f"1 to {most} ids expected, not {len(ids)}")
    return ids

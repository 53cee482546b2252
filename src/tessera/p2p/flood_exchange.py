"""The talking of a `Flood`: news is offered and fetched, holdings are compared, and whoever misbehaves is dropped.

To each peer at most one offer, one fetch and a few comparisons are under way, each call with a deadline. What is
fetched was asked for, is read within limits, and is checked before anybody else sees it. Ids that find no place in a
queue are left to the next comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import structlog

from tessera.core.errors import Invalid, Misbehaviour, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.p2p.calls import call
from tessera.p2p.flood_config import FloodConfig
from tessera.p2p.flood_index import ANSWER_LIMIT, ASK_LIMIT, Reconciliation, answer_ranges, split_ids
from tessera.p2p.flood_item import ID_BYTES, ITEM_LIMIT, SLOT_BYTES, Item, join_items, split_items
from tessera.p2p.flood_peers import FloodPeers
from tessera.p2p.flood_state import FloodState
from tessera.p2p.flood_want import WantList
from tessera.p2p.transport import Transport

__all__ = ["REQUEST_LIMIT", "FloodExchange"]

log = structlog.get_logger()

QUEUE = 1024  # ids that wait to be offered to, or fetched from, one peer
OFFER_IDS = 512  # in one call
GET_IDS = 256
GET_BYTES = 256 * 1024  # of items in one answer, and the last item
HEAD_BYTES = 256  # of a request or reply, beside its body
REQUEST_LIMIT = max(OFFER_IDS * ID_BYTES, ASK_LIMIT) + HEAD_BYTES
COMPARE_S = 120.0  # one comparison, fetching included
COMPARE_ROUNDS = 16
WAITS = 5  # times that we wait for a peer that asks us to
WAIT_MOST_S = 5.0
CHECKS = 16  # signatures checked in one go: 2 ms
MALFORMED = 10.0  # points
UNDELIVERED = 16  # ids that a peer offered and does not have cost a point


class FloodExchange:
    """Made by `Flood`.

    Args:
        wants: whether the item or proof that an id names would be taken in now.
        take_in: takes checked items in, and says who gave them.
        on_misbehaviour: hears of each member that is dropped.
    """

    def __init__(
        self,
        transport: Transport,
        group: str,
        protocol: str,
        config: FloodConfig,
        state: FloodState,
        peers: FloodPeers,
        *,
        wants: Callable[[bytes], bool],
        take_in: Callable[[list[Item], PeerId], None],
        on_misbehaviour: Callable[[Misbehaviour], None],
    ) -> None:
        self._transport, self._group, self._protocol, self._config = transport, group, protocol, config
        self._state, self._peers = state, peers
        self._wants, self._take_in, self._on_misbehaviour = wants, take_in, on_misbehaviour
        self._want = WantList(QUEUE)
        self._outbox: dict[PeerId, dict[bytes, None]] = {}
        self._offering: set[PeerId] = set()
        self._pulling: dict[PeerId, anyio.Event] = {}
        self.tasks: anyio.abc.TaskGroup | None = None  # where our tasks live while the flood runs
        self.barred = 0  # members dropped so far

    @property
    def wanted(self) -> int:
        """Ids that we lack."""
        return len(self._want)

    @property
    def to_offer(self) -> int:
        """Ids that wait to be offered, each counted for each peer."""
        return sum(map(len, self._outbox.values()))

    def answer(self, peer: PeerId, op: object, body: bytes) -> tuple[dict[str, Any], bytes]:
        """What to say to `peer`.

        Raises: what `FloodPeers.admit` raises; Invalid for a request that no honest member makes.
        """
        try:
            self._peers.admit(peer, anyio.current_time())
            if op == "offer":
                ids = _some_ids(body, OFFER_IDS)
                for id in ids:
                    self._outbox.get(peer, {}).pop(id, None)  # no need to tell it
                self.hear_of(peer, ids)
                return {}, b""
            if op == "get":
                return self._give(_some_ids(body, GET_IDS))
            if op == "compare":
                return {}, answer_ranges(self._state.index, body)
            raise Invalid(f"a flood's operations are compare, get and offer, not {str(op)[:40]!r}")
        except Unavailable:
            self._fault(peer, 1.0, "more calls or bytes than a member may have")
            raise
        except Invalid as error:
            self._fault(peer, MALFORMED, error.message)
            raise

    def announce(self, item: Item, source: PeerId | None, neighbours: Iterable[PeerId]) -> None:
        """Offer what now stands in `item`'s slot to those who did not tell us of it."""
        id = self._state.id_at(item.slot)
        if id is None:
            return
        knowing = {source, item.origin, *self._want.sources(id)} if id == item.id else set()  # void is news to all
        for peer in neighbours:
            if peer not in knowing:
                self.offer(peer, [id])

    def keep_members(self) -> None:
        """Have nothing to say to those who are members no more."""
        for peer in [peer for peer in self._outbox if peer not in self._peers]:
            self._outbox[peer].clear()
            if peer not in self._offering:
                del self._outbox[peer]

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

    def offer(self, peer: PeerId, ids: Iterable[bytes]) -> None:
        """Tell `peer` soon that we hold these."""
        outbox = self._outbox.setdefault(peer, {})
        for id in ids:
            if len(outbox) < QUEUE:
                outbox[id] = None
        if self.tasks is not None and outbox and peer not in self._offering:
            self._offering.add(peer)
            self.tasks.start_soon(self._send_offers, peer)

    async def _send_offers(self, peer: PeerId) -> None:
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

    def hear_of(self, peer: PeerId, ids: Iterable[bytes]) -> None:
        """`peer` has these: queue what we want, and fetch it."""
        for id in ids:
            if self._wants(id):
                self._want.offer(peer, id)
        self._start_pulls([peer])

    def _start_pulls(self, peers: Iterable[PeerId]) -> None:
        for peer in peers:
            if self.tasks is not None and peer not in self._pulling and self._want.queued(peer):
                self.tasks.start_soon(self._pull, peer)

    async def _pull(self, peer: PeerId) -> None:
        """Fetch what is queued for `peer`; returns when nothing is."""
        while (other := self._pulling.get(peer)) is not None:
            await other.wait()
        if not self._want.queued(peer):
            return
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
        if 2 * len(missed) > sent:  # some are replaced or expire between an offer and its fetch
            self._fault(peer, 1 + len(missed) // UNDELIVERED, f"{len(missed)} items offered and not delivered")
        return bool(sent)

    async def _read(self, peer: PeerId, ids: list[bytes], answer: tuple[dict[str, Any], bytes]) -> int:
        """Take in what `peer` gave; how many of `ids` it has dealt with, 0 when it broke the protocol."""
        sent, asked = answer[0].get("sent"), {id[:SLOT_BYTES] for id in ids}
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
        self._take_in(sorted(items, key=lambda item: -item.expires), peer)
        return sent

    def _pass_on(self, peer: PeerId, ids: Iterable[bytes]) -> None:
        heirs = {self._want.miss(id, peer) for id in ids}
        self._start_pulls(heir for heir in heirs if heir is not None)

    # --- comparing --------------------------------------------------------------------------------------------------

    async def compare(self, peer: PeerId) -> bool:
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
                self.offer(peer, found.surplus)
                before = len(self._state)
                self.hear_of(peer, found.missing)
                await self._pull(peer)
                if found.whole or len(self._state) == before:
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
        self.barred += 1
        log.warning("flood_peer_barred", group=self._group, peer_id=peer, reason=what)
        self._outbox.get(peer, {}).clear()
        self._start_pulls(self._want.abandon(peer))
        self._on_misbehaviour(Misbehaviour(f"{peer[:16]}…: {what}", evidence={"peer": peer, "fault": what}, peer=peer))


def _some_ids(body: bytes, most: int) -> list[bytes]:
    ids = split_ids(body)
    if not 0 < len(ids) <= most:
        raise Invalid(f"1 to {most} ids expected, not {len(ids)}")
    return ids

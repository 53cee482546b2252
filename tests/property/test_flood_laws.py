"""The laws of flooding: whoever hears the same ends with the same, within bounds, and finds out what it lacks."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_world import key
from tessera.core.errors import Invalid
from tessera.core.ids import PeerId
from tessera.p2p.flood_index import HIGHEST, LOWEST, Reconciliation, SlotIndex, answer_ranges
from tessera.p2p.flood_item import ID_BYTES, SLOT_BYTES, Item, join_items, split_items
from tessera.p2p.flood_peers import FloodPeers, PeerLimits
from tessera.p2p.flood_state import FloodState, StateLimits
from tessera.p2p.flood_want import WantList
from tessera.p2p.transport import PeerRecord

NOW = 1_000.0
ORIGINS = [key(1).id, key(2).id]


def an_item(origin: PeerId, topic: str, name: str, sequence: int, expires: int, payload: bytes) -> Item:
    return Item("g", topic, origin, sequence, name, expires, payload)


ITEMS = st.builds(
    an_item,
    st.sampled_from(ORIGINS),
    st.sampled_from(["a", "b"]),
    st.sampled_from(["", "x", "y"]),
    st.integers(0, 6),
    st.sampled_from([999, 2_000, 3_000, 10**7]),
    st.sampled_from([b"", b"1", b"22"]),
)


DENSE = st.builds(  # one liar, few slots: clashes of clashes
    an_item,
    st.just(ORIGINS[0]),
    st.just("a"),
    st.sampled_from(["x", "y"]),
    st.integers(0, 2),
    st.sampled_from([2_000, 3_000]),
    st.sampled_from([b"", b"1"]),
)


def exchange(one: FloodState, other: FloodState) -> int:
    """What two members send each other after a comparison; how many items were news."""
    news = 0
    for giver, taker in ((one, other), (other, one)):
        for id in [id for id in giver.index.ids() if taker.wants(id)]:
            for item in sorted(giver.get(id), key=lambda item: -item.expires):
                news += taker.merge(item, NOW).verdict in ("new", "void")
    return news


@given(st.lists(ITEMS, max_size=30) | st.lists(DENSE, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=120)
def test_members_that_talk_until_there_is_no_news_hold_the_same(items: list[Item], rng: random.Random) -> None:
    """Whatever each heard first, in whatever order, lies and all."""
    states = [FloodState() for _ in range(3)]
    for item in items:
        for state in rng.sample(states, rng.randrange(1, 4)):
            state.merge(item, NOW)
    for _ in range(50):
        if not sum(exchange(a, b) for a, b in pairwise([*states, states[0]])):
            break
    else:
        raise AssertionError("there is always news")
    prints = {state.index.fingerprint() for state in states}
    assert len(prints) == 1
    assert len({tuple(item.id for topic in "ab" for item in state.items(topic)) for state in states}) == 1


@given(st.lists(ITEMS, max_size=30), st.integers(0, 20_000))
def test_a_state_keeps_its_promises(items: list[Item], later: int) -> None:
    limits = StateLimits(origin_items=3, origin_bytes=3_100, max_ttl_s=5_000, seen=4)
    state = FloodState(limits)
    heard: dict[bytes, set[bytes]] = {}
    for item in items:
        merged = state.merge(item, NOW)
        heard.setdefault(item.slot, set()).add(item.id)
        assert merged.verdict != "new" or item in state.get(item.id) or item in merged.dropped
        assert merged.verdict != "void" or len(heard[item.slot]) > 1
    for _ in range(2):
        held = [item for id in state.index.ids() for item in state.get(id)]
        assert len(state) == len(state.index) == len(state.index.ids())
        assert state.size_bytes == sum(item.size_bytes for item in held)
        assert len(state._seen) <= limits.seen
        for origin in ORIGINS:
            own = [item for item in held if item.origin == origin]
            assert len({item.slot for item in own}) <= limits.origin_items
            assert sum(item.size_bytes for item in own) <= limits.origin_bytes
        counted = [item for topic in "ab" for item in state.items(topic)]
        assert all(len(state.get(item.id)) == 1 for item in counted)
        names = [(item.origin, item.topic, item.key) for item in counted if item.key]
        assert len(names) == len(set(names))
        assert all(999 < item.expires <= NOW + limits.max_ttl_s + 3600 for item in counted)
        now = NOW + later
        dropped = state.expire(now)
        assert all(item not in state.get(item.id) for item in dropped)
        assert all(max(item.expires for item in state.get(id)) > now for id in state.index.ids())
    assert len(state.keep_origins(ORIGINS[:1])) == sum(
        item.origin == ORIGINS[1] for item in held if item not in dropped
    )
    assert all(item.origin == ORIGINS[0] for topic in "ab" for item in state.items(topic))


@given(st.lists(ITEMS, max_size=20))
def test_the_newest_of_a_key_stands_in_any_order(items: list[Item]) -> None:
    """Of what was signed once: the highest sequence under each origin, topic and key."""
    once: dict[bytes, Item] = {}
    for item in items:
        if item.expires > NOW and item.expires < 10**6:
            once.setdefault(item.slot, item)
    newest: dict[tuple[str, str, str], Item] = {}
    for item in once.values():
        name = (item.origin, item.topic, item.key or f"#{item.sequence}")
        if name not in newest or newest[name].sequence < item.sequence:
            newest[name] = item
    for order in (list(once.values()), list(reversed(once.values()))):
        state = FloodState()
        for item in order:
            state.merge(item, NOW)
        assert {item.id for topic in "ab" for item in state.items(topic)} == {item.id for item in newest.values()}


IDS = st.binary(min_size=3, max_size=3).map(lambda b: b[:2] + bytes(SLOT_BYTES - 2) + b[2:] * (ID_BYTES - SLOT_BYTES))


def index_of(ids: set[bytes]) -> SlotIndex:
    index = SlotIndex()
    for id in sorted(ids, key=lambda id: id[::-1]):
        index.put(id[:SLOT_BYTES], id[SLOT_BYTES:])
    return index


@given(st.sets(IDS, max_size=60), st.sets(IDS, max_size=60), st.integers(0, 3_000), st.integers(0, 2**32))
@settings(max_examples=60)
def test_a_comparison_finds_every_difference(mine: set[bytes], theirs: set[bytes], many: int, seed: int) -> None:
    rng = random.Random(seed)
    common = {rng.randbytes(ID_BYTES) for _ in range(many)}
    ours, others = index_of(mine | common), index_of(theirs | common)
    held, offered = set(ours.ids()), set(others.ids())
    found, questions = Reconciliation(ours, most=10_000), 0
    while (question := found.ask()) is not None:
        found.hear(answer_ranges(others, question))
        questions += 1
    assert found.whole
    assert sorted(found.missing) == sorted(offered - held)
    assert sorted(found.surplus) == sorted(held - offered)
    assert questions <= 1 + (len(held ^ offered) > 0) * (6 + len(held ^ offered) // 16)


@given(st.lists(st.tuples(st.booleans(), IDS), max_size=60))
def test_an_index_depends_on_what_it_holds_and_not_on_how_it_came_there(moves: list[tuple[bool, bytes]]) -> None:
    index, held = SlotIndex(), dict[bytes, bytes]()
    for put, id in moves:
        slot, mark = id[:SLOT_BYTES], id[SLOT_BYTES:]
        if put:
            index.put(slot, mark)
            held[slot] = mark
        else:
            index.discard(slot)
            held.pop(slot, None)
    fresh = index_of({slot + mark for slot, mark in held.items()})
    assert index.ids() == fresh.ids() == sorted(slot + mark for slot, mark in held.items())
    assert index.fingerprint() == fresh.fingerprint()
    middle = b"\x80" + bytes(SLOT_BYTES - 1)
    for low, high in ((LOWEST, middle), (middle, HIGHEST)):
        assert index.fingerprint(low, high) == fresh.fingerprint(low, high)
        assert index.ids(low, high) == [id for id in index.ids() if low <= id[:SLOT_BYTES] < high]


@given(st.binary(max_size=300))
def test_bytes_from_a_peer_are_understood_or_refused(data: bytes) -> None:
    index = index_of({bytes([n]) * ID_BYTES for n in range(1, 60)})
    for reads in (
        lambda: split_items("g", data),
        lambda: answer_ranges(index, data),
        lambda: Item.from_bytes("g", data),
    ):
        try:
            reads()
        except Invalid:
            continue
    asking = Reconciliation(index, most=100)
    asking.ask()
    try:
        asking.hear(data)
    except Invalid:
        return
    assert data == b"\x00" or data[:1] in (b"\x01", b"\x02")


@given(st.lists(ITEMS, max_size=5))
def test_items_come_back_from_the_wire_as_they_were(items: list[Item]) -> None:
    signed = [item.signed_by(next(k for k in (key(1), key(2)) if k.id == item.origin)) for item in items]
    back = split_items("g", join_items(signed))
    assert back == signed
    assert [item.id for item in back] == [item.id for item in signed]
    for item in back:
        item.check()
        with pytest.raises(Invalid):
            Item("h", *(getattr(item, name) for name in Item.__slots__[1:8])).check()


PEERS = [key(n).id for n in range(1, 5)]
MOVES = st.tuples(st.sampled_from(["offer", "ask", "settle", "miss", "put back", "abandon"]), st.sampled_from(PEERS),
                  st.integers(0, 9))  # fmt: skip


@given(st.lists(MOVES, max_size=80))
def test_each_wanted_id_is_asked_of_one_peer_at_a_time_and_lists_are_bounded(
    moves: list[tuple[str, PeerId, int]],
) -> None:
    want, asked = WantList(most=3), dict[bytes, PeerId]()
    for move, peer, number in moves:
        id = bytes([number])
        if move == "offer":
            want.offer(peer, id)
        elif move == "ask":
            for taken in want.take(peer, 2):
                assert taken not in asked
                asked[taken] = peer
        elif move == "settle":
            want.settle(id)
            asked.pop(id, None)
        elif move == "abandon":
            assert peer not in want.abandon(peer)
            assert want.queued(peer) == 0
        elif asked.get(id) == peer:
            del asked[id]
            if move == "miss":
                want.miss(id, peer)
            else:
                want.put_back(peer, id)
        assert len(want) == sum(want.queued(p) for p in PEERS) + len(asked)
        assert all(want.sources(held)[0] == p for held, p in asked.items())
        assert sum(len(want.sources(bytes([n]))) for n in range(10)) <= 4 * len(want)


@given(st.integers(1, 60), st.sets(st.integers(0, 59), max_size=20), st.integers(0, 2**32))
@settings(max_examples=30)
def test_news_finds_a_way_to_everybody_who_is_there(count: int, away: set[int], seed: int) -> None:
    """From any member that is up, over the links that each chose alone, past those who are away."""
    ids = [PeerId(random.Random(seed + n).randbytes(32).hex()) for n in range(count)]
    records = [PeerRecord(id, (), 0, b"") for id in ids]
    up = [id for n, id in enumerate(ids) if n not in away]
    links: dict[PeerId, list[PeerId]] = {}
    for me in up:
        peers = FloodPeers("g", me, PeerLimits(), random.Random(1), most=100)
        peers.refresh(records)
        for n in sorted(away & set(range(count))):
            peers.failed(ids[n], 0.0)
        links[me] = peers.neighbours(1.0)
        assert me not in links[me]
        assert set(links[me]) <= set(up)
        assert len(links[me]) <= 2 + count.bit_length() / 2 + 1
    if up:
        reached, todo = {up[0]}, [up[0]]
        while todo:
            for peer in links[todo.pop()]:
                if peer not in reached:
                    reached.add(peer)
                    todo.append(peer)
        assert reached == set(up)

"""Snapshots and the feed that brings them."""

from __future__ import annotations

import json
from contextlib import aclosing

import anyio
import pytest

from tessera.core.errors import Invalid
from tessera.devnet.snapshot import Boundary, Event, LossPoint, Peer, Snapshot, SnapshotFeed
from web_world import moment

pytestmark = pytest.mark.anyio


async def collect(feed: SnapshotFeed, seen: list[Snapshot], pause_s: float = 0.0) -> None:
    async with aclosing(feed.changes()) as changes:
        async for snapshot in changes:
            seen.append(snapshot)
            await anyio.sleep(pause_s)


async def test_a_reader_gets_the_newest_at_once_and_then_each_change() -> None:
    feed, seen = SnapshotFeed(moment(1)), []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect, feed, seen)
        for step in (2, 3):
            await anyio.wait_all_tasks_blocked()
            feed.publish(moment(step))
        await anyio.wait_all_tasks_blocked()
        feed.close()
    assert [snapshot.step for snapshot in seen] == [1, 2, 3]


async def test_a_slow_reader_skips_to_the_newest_and_sees_the_last() -> None:
    feed, slow, quick = SnapshotFeed(moment(0)), [], []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect, feed, slow, 0.05)
        tasks.start_soon(collect, feed, quick)
        for step in range(1, 21):
            await anyio.sleep(0.001)
            feed.publish(moment(step))
        feed.close()
    assert len(slow) < len(quick)
    assert slow[-1].step == quick[-1].step == 20


async def test_an_equal_snapshot_wakes_nobody() -> None:
    feed, seen = SnapshotFeed(moment(5)), []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect, feed, seen)
        await anyio.wait_all_tasks_blocked()
        feed.publish(moment(5))
        await anyio.wait_all_tasks_blocked()
        feed.close()
    assert len(seen) == 1


async def test_a_reader_that_leaves_is_forgotten() -> None:
    feed = SnapshotFeed(moment(0))
    with anyio.move_on_after(0.02):
        await collect(feed, [])
    assert not feed._waiting


async def test_a_closed_feed_ends_new_readers_and_refuses_more() -> None:
    feed, seen = SnapshotFeed(moment(7)), []
    feed.close()
    await collect(feed, seen)
    assert [snapshot.step for snapshot in seen] == [7]
    with pytest.raises(Invalid, match="closed"):
        feed.publish(moment(8))


def test_a_snapshot_is_ready_for_json_and_keeps_integers_exact() -> None:
    snapshot = moment(600, phase="serving", payments=4, claimed=True)
    again = json.loads(json.dumps(snapshot.to_dict(), allow_nan=False))
    assert again["peers"][0]["shares"] == snapshot.peers[0].shares > 2**53
    assert again["income"]["revenue"] == 40_000
    assert again["losses"][60]["val"] == snapshot.losses[60].val


def test_the_moments_that_the_tests_use_add_up() -> None:
    for step, payments, claimed in ((0, 0, False), (160, 0, False), (600, 3, False), (600, 4, True)):
        snapshot = moment(step, payments=payments, claimed=claimed)
        assert snapshot.income.adds_up
        assert snapshot.held_shares == snapshot.total_shares


def test_numbers_that_are_not_finite_are_absent() -> None:
    point = LossPoint(1, 10, float("nan"), float("inf"))
    snapshot = Snapshot(losses=[point], tokens_per_s=float("inf"), boundaries=[Boundary(0, float("nan"))])
    assert (point.train, point.val, snapshot.tokens_per_s) == (None, None, None)
    json.dumps(snapshot.to_dict(), allow_nan=False)


def test_text_from_peers_loses_control_characters_and_length() -> None:
    assert Event(0.0, "\x1b[2J" + "long" * 500).text.startswith("�[2J")
    assert len(Event(0.0, "long" * 500).text) == 300
    assert Peer("p\u202eeer", "a\nb").peer == "p�eer"
    assert Snapshot(sample="a\n\tb\x00").sample == "a\n\tb�"


def test_an_unknown_phase_or_status_is_refused() -> None:
    with pytest.raises(Invalid, match=r"a phase is one of starting, .*, not 'paused'"):
        Snapshot(phase="paused")  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="a status is one of"):
        Peer("p", "a", status="asleep")  # type: ignore[arg-type]


def test_only_recent_events_are_carried_and_too_long_a_curve_is_refused() -> None:
    snapshot = Snapshot(events=[Event(float(i), str(i)) for i in range(80)])
    assert [event.text for event in snapshot.events] == [str(i) for i in range(30, 80)]
    with pytest.raises(Invalid, match="use thinned"):
        Snapshot(losses=[LossPoint(i, i, 1.0) for i in range(8_193)])

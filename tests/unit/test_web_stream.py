"""The live stream, as an ASGI server sees it: everything once, then only what changed, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest

from tessera.core.errors import Unavailable
from tessera.devnet.snapshot import Event, Snapshot, SnapshotFeed
from tessera.web import stream
from tessera.web.render import SECTIONS, Renderer
from tessera.web.stream import ChartDelta, Readers, Updates
from web_world import STEPS, losses, moment

pytestmark = pytest.mark.anyio


class Reader:
    """An ASGI client that reads as it likes."""

    def __init__(self) -> None:
        self.body = b""
        self.started: dict[str, Any] = {}
        self.leave = anyio.Event()
        self.stalled = False

    async def receive(self) -> dict[str, Any]:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.stalled:
            await anyio.sleep_forever()
        if message["type"] == "http.response.start":
            self.started = message
        else:
            self.body += message["body"]

    def take(self) -> list[tuple[str, str]]:
        """(event, data) of what came since the last call."""
        events = []
        for block in self.body.decode().split("\n\n"):
            lines = block.split("\n")
            if lines[0].startswith("event: "):
                events.append((lines[0][7:], "\n".join(line.removeprefix("data: ") for line in lines[1:])))
        self.body = b""
        return events


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "INTERVAL_S", 0.01)


@asynccontextmanager
async def connected(feed: SnapshotFeed, readers: Readers | None = None):  # type: ignore[no-untyped-def]
    reader = Reader()
    async with anyio.create_task_group() as tasks:
        updates = Updates(feed, Renderer(), readers or Readers(), {})
        tasks.start_soon(updates, {"type": "http"}, reader.receive, reader.send)
        await until(lambda: b"event: chart" in reader.body)
        yield reader
        reader.leave.set()


async def until(met: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not met():
            await anyio.sleep(0.005)


async def test_a_reader_gets_every_section_and_the_chart_when_it_connects() -> None:
    async with connected(SnapshotFeed(moment(100))) as reader:
        assert (b"content-type", b"text/event-stream; charset=utf-8") in reader.started["headers"]
        assert not any(name == b"content-length" for name, _ in reader.started["headers"])
        events = dict(reader.take())
    assert set(events) == {*SECTIONS, "chart"}
    assert len(json.loads(events["chart"])["points"]) == 101
    assert "step 100 of 600" in events["status"]


async def test_only_what_changed_is_sent_again() -> None:
    feed = SnapshotFeed(moment(100))
    async with connected(feed) as reader:
        reader.take()
        feed.publish(replace(feed.snapshot(), events=[Event(5.0, "a worker sneezed")]))
        await until(lambda: b"sneezed" in reader.body)
        assert [name for name, _ in reader.take()] == ["events"]


async def test_the_chart_gets_only_new_points() -> None:
    feed = SnapshotFeed(moment(100))
    async with connected(feed) as reader:
        reader.take()
        feed.publish(moment(103))
        await until(lambda: b"event: chart" in reader.body)
        update = json.loads(dict(reader.take())["chart"])
    assert update["from"] == 101
    assert [point[0] for point in update["points"]] == [101, 102, 103]
    assert update["steps"] == STEPS


def test_a_chart_put_together_from_updates_equals_the_curve() -> None:
    delta, chart = ChartDelta(), []
    for step in (0, 5, 9, 7, 600, 599, 40):  # a run that goes back to a checkpoint takes its points back
        update = json.loads(delta.update(Snapshot(losses=losses(step))) or "null")
        chart = chart[: update["from"]] + update["points"]
        assert [point[0] for point in chart] == list(range(step + 1))
    assert delta.update(Snapshot(losses=losses(40))) is None


def test_a_long_curve_is_thinned_for_the_chart() -> None:
    points = losses(8_000)
    update = json.loads(ChartDelta().update(Snapshot(losses=points)) or "null")
    assert len(update["points"]) < 1_300
    assert update["points"][-1][0] == 8_000


async def test_the_stream_ends_with_the_feed() -> None:
    feed, readers = SnapshotFeed(moment(1)), Readers()
    async with connected(feed, readers):
        assert readers.count == 1
        feed.close()
        await until(lambda: readers.count == 0)


async def test_a_reader_that_leaves_gives_its_place_back() -> None:
    feed, readers = SnapshotFeed(moment(1)), Readers()
    async with connected(feed, readers) as reader:
        reader.leave.set()
        await until(lambda: readers.count == 0)
    assert not feed._waiting


async def test_a_reader_that_stops_reading_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SEND_S", 0.05)
    feed, readers = SnapshotFeed(moment(1)), Readers()
    async with connected(feed, readers) as reader:
        reader.stalled = True
        feed.publish(moment(2))
        await until(lambda: readers.count == 0)


async def test_silence_is_broken_by_a_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PING_S", 0.02)
    async with connected(SnapshotFeed(moment(1))) as reader:
        await until(lambda: b": still here" in reader.body)


async def test_a_full_house_is_refused() -> None:
    feed, readers = SnapshotFeed(moment(1)), Readers(limit=1)
    async with connected(feed, readers):
        with pytest.raises(Unavailable, match="all 1 live connections"):
            Updates(feed, Renderer(), readers, {})
    Updates(feed, Renderer(), readers, {})


async def test_no_text_can_end_an_event_or_start_another() -> None:
    hostile = "x\n\nevent: chart\ndata: {}\r\rdata: y\r\nretry: 1\u2028"
    snapshot = replace(moment(1), sample=hostile, sample_prompt=hostile)
    async with connected(SnapshotFeed(snapshot)) as reader:
        events = reader.take()
    assert [name for name, _ in events] == [*SECTIONS, "chart"]
    assert len(json.loads(dict(events)["chart"])["points"]) == 2


def test_a_snapshot_is_rendered_once_for_all_readers() -> None:
    renderer, snapshot = Renderer(), moment(3)
    assert renderer.fragments(snapshot) is renderer.fragments(snapshot)
    assert renderer.fragments(moment(4))["status"] != renderer.fragments(snapshot)["status"]

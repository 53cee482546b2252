"""The terminal view: it fits, it ends, and it says when something does not add up."""

from __future__ import annotations

import io
from dataclasses import replace

import anyio
import pytest
from rich.console import Console

from tessera.cli.live import LiveView, PlainView, choose_view, final_table, news
from tessera.cli.live_curve import draw_curve
from tessera.cli.live_frame import frame
from tessera.devnet.snapshot import Event, LossPoint, Peer, Snapshot, SnapshotFeed
from web_world import moment, transaction

pytestmark = pytest.mark.anyio

SERVED = moment(600, phase="serving", payments=4, claimed=True)


def rendered(renderable: object, width: int = 110) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=60, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("size", [(40, 12), (60, 20), (80, 24), (100, 30), (120, 50), (200, 80)])
@pytest.mark.parametrize("step", [0, 7, 430])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_the_picture_fits_the_terminal(size: tuple[int, int], step: int, stages: int) -> None:
    width, height = size
    lines = rendered(frame(moment(step, stages=stages), width, height), width)
    assert all(len(line) <= width for line in lines)
    if height >= 24:
        assert len(lines) <= height


def test_the_picture_shows_what_a_run_is_about() -> None:
    text = "\n".join(rendered(frame(moment(430), 120, 45), 120))
    parts = (
        "tessera-py", "training", "2.238 nats/token", "1.382 under bigram", "33.6 B/token", "14,252 tokens/s",
        "33.1 B/tok", "stage 3", "1,228,800", "step 430 of 600", "bigram model", "epoch 1 posted",
    )  # fmt: skip
    for part in parts:
        assert part in text


def test_a_served_model_shows_what_it_writes_and_where_to_ask() -> None:
    text = "\n".join(rendered(frame(SERVED, 120, 50), 120))
    for part in ("page http://127.0.0.1:8402/", "gateway http://127.0.0.1:8402/v1", "def abspath(path):", "os.fspath"):
        assert part in text
    lines = list(news(moment(600, phase="serving"), SERVED))
    assert "  |         cwd = os.getcwd()" in lines
    assert "gateway at http://127.0.0.1:8402/v1" in list(news(None, SERVED))


def test_the_curve_falls_and_the_lines_across_stay() -> None:
    rows = draw_curve(moment(600), 80, 16).plain.splitlines()
    assert len(rows) == 16
    assert all(len(row) <= 80 for row in rows)
    dots = [[i for i, char in enumerate(row[6:]) if 0x2800 < ord(char) < 0x2900] for row in rows[:-1]]
    assert dots[0][0] < 5
    assert dots[-1][-1] > 70
    assert sum(len(row) > 10 and row[-1] - row[0] > 65 for row in dots) == 2  # unigram and bigram


def test_a_curve_of_one_point_and_of_none_draw() -> None:
    one = Snapshot(losses=[LossPoint(0, 0, 6.9, 6.9)])
    assert "6.9" in draw_curve(one, 60, 8).plain
    assert "the curve begins with the first step" in draw_curve(Snapshot(), 60, 8).plain


def test_what_a_peer_calls_itself_is_not_markup() -> None:
    snapshot = replace(moment(10), peers=[Peer("[red]x[/red]", "[link=http://e]y", 0, "[bold]r")], phase_note="[red]n")
    text = "\n".join(rendered(frame(snapshot, 120, 45), 120) + rendered(final_table(snapshot), 120))
    assert "[red]x[/red]" in text
    assert "[red]n" in text
    assert "[link=…/e]y" in text


def test_the_closing_tables_add_up() -> None:
    text = "\n".join(rendered(final_table(SERVED)))
    assert "= all that were minted" in text
    assert "11,059.2000" in text
    assert "sum = revenue" in text
    assert "0.040000 tUSD" in text
    assert "≠" not in text


def test_the_closing_tables_say_when_they_do_not_add_up() -> None:
    broken = replace(SERVED, total_shares=SERVED.total_shares + 1, income=replace(SERVED.income, dust=7))
    text = "\n".join(rendered(final_table(broken)))
    assert "≠ 11,059.2000 that were minted" in text
    assert "sum ≠ revenue" in text


def test_news_tells_each_change_once() -> None:
    first, second = moment(150), moment(310)
    assert list(news(first, first)) == []
    lines = list(news(first, second))
    assert sum(line.startswith("step 310/600") for line in lines) == 1
    assert sum("shares posted in" in line for line in lines) == 1
    assert list(news(second, moment(311))) == []  # no new multiple of 25 steps


def test_news_names_payments_and_leaves_out_what_was_told() -> None:
    before = moment(600, phase="serving", payments=1)
    after = moment(600, phase="serving", payments=2)
    told = replace(after, events=[*after.events, Event(1.0, "again", transaction(101)), Event(2.0, "new")])
    assert list(news(before, told)) == [
        f"payment: 0.01 tUSD from {after.payments[1].payer} in {transaction(101)}",
        "new",
    ]


def test_news_says_when_a_worker_goes_and_comes_back() -> None:
    up = moment(10)
    down = replace(up, peers=[replace(up.peers[0], status="down"), *up.peers[1:]])
    assert [line.split(" is ")[1] for line in news(up, down)] == ["down"]
    assert [line.split(" is ")[1] for line in news(down, up)] == ["up"]


async def run_through(view: LiveView | PlainView) -> None:
    feed = SnapshotFeed(moment(0, phase="seating"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(view.run, feed)
        for snapshot in (moment(160), moment(320), SERVED):
            await anyio.sleep(0.05)
            feed.publish(snapshot)
        feed.close()


async def test_plain_output_has_no_control_characters() -> None:
    console = Console(file=io.StringIO(), width=80)
    view = choose_view(console)
    assert isinstance(view, PlainView)
    await run_through(view)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert not any(ord(char) < 32 and char != "\n" for char in text)
    assert text.splitlines()[0] == "seating"
    assert "step 160/600" in text
    assert "step 600/600" in text
    assert "serving" in text.splitlines()


async def test_the_live_view_redraws_in_place_and_leaves_the_last_picture() -> None:
    console = Console(file=io.StringIO(), width=100, height=40, force_terminal=True, color_system=None, _environ={})
    view = choose_view(console)
    assert isinstance(view, LiveView)
    await run_through(view)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1A" in text  # the cursor went up: redrawn in place
    assert "step 600 of 600" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is visible again

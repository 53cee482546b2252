"""Fetching a blob from several peers: slow ones, dying ones, liars; and what an interruption leaves."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest

from blob_world import DATA, MISSING, Counting, Liar, serve_wrong, served, stores
from tessera.core import encoding
from tessera.core.errors import Late, Misbehaviour, Missing, TesseraError, Unavailable
from tessera.core.ids import BlobId
from tessera.p2p import blob_part
from tessera.p2p.blob_index import CHUNK_BYTES
from tessera.p2p.blob_pace import Pace
from tessera.p2p.blob_store import BlobStore
from tessera.p2p.blobs import BLOBS, fetch, serve_blobs
from tessera.p2p.calls import error_head
from tessera.p2p.memory import MemoryNetwork
from tessera.p2p.transport import Stream, Transport

ONE_CHUNK = DATA[:CHUNK_BYTES]
HALF = CHUNK_BYTES // 2


# --- slow and dying peers -------------------------------------------------------------------------------------------


def test_a_slow_peer_does_not_hold_up_a_fast_one(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA * 2)

    async def body(network: MemoryNetwork, me: Transport, slow: Transport, fast: Transport) -> None:
        serve_blobs(slow, theirs)
        serve_blobs(fast, theirs)
        network.shape(me.id, slow.id, delay_s=0.05, rate_bytes_per_s=20e3)
        network.shape(me.id, fast.id, delay_s=0.01, rate_bytes_per_s=2e6)
        started = anyio.current_time()
        got = await fetch(me, [slow.record(), fast.record()], blob, mine, timeout_s=600)
        assert anyio.current_time() - started < 1.3 * len(DATA) * 2 / 2e6
        assert got.received_bytes < 1.05 * len(DATA) * 2
        assert got.path.read_bytes() == DATA * 2

    served(2, body)


def test_a_peer_that_stalls_in_the_middle_loses_its_chunks_to_others(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)

    async def body(network: MemoryNetwork, me: Transport, stalls: Transport, other: Transport) -> None:
        serve_blobs(stalls, theirs)
        serve_blobs(other, theirs)
        records = [stalls.record(), other.record()]
        started = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: fetch(me, records, blob, mine, timeout_s=600))
            await anyio.sleep(0.5)
            network.shape(me.id, stalls.id, rate_bytes_per_s=10.0)  # it lives, and sends next to nothing
        assert anyio.current_time() - started < 8
        assert mine.path(blob).read_bytes() == DATA

    served(2, body, rate_bytes_per_s=2e6)


def test_the_index_comes_from_the_second_peer_while_the_first_is_silent(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)

    async def body(network: MemoryNetwork, me: Transport, silent: Transport, other: Transport) -> None:
        async def say_nothing(stream: Stream) -> None:
            await anyio.sleep_forever()

        silent.serve(BLOBS, say_nothing)
        serve_blobs(other, theirs)
        started = anyio.current_time()
        await fetch(me, [silent.record(), other.record()], blob, mine, timeout_s=600)
        assert anyio.current_time() - started < 5

    served(2, body)


def test_a_pace_fades_and_silence_counts() -> None:
    pace = Pace()
    pace.begin(0.0)
    for second in range(1, 31):
        pace.note(1_000_000, float(second))
    assert pace.seconds(1_000_000, 30.0, streams=1) == pytest.approx(1.0, rel=0.02)
    assert pace.seconds(1_000_000, 30.0, streams=4) == pytest.approx(4.0, rel=0.02)
    assert pace.seconds(1_000_000, 60.0, streams=1) > 5.0
    pace.end(30.0)
    assert pace.seconds(1_000_000, 900.0, streams=1) == pytest.approx(1.0, rel=0.02), "nobody asked, so no silence"


# --- blame ----------------------------------------------------------------------------------------------------------


def cut_at_half(network: MemoryNetwork, me: Transport, first: Transport, halves: list[int]) -> Any:
    """A progress callback that cuts us off from `first` once half of a chunk is here."""

    def progress(here: int, size: int) -> None:
        if here >= HALF and not halves:
            halves.append(here)
            network.partition(me.id, first.id)

    return progress


def test_a_liar_that_sent_the_first_half_is_found_and_the_honest_one_is_not_blamed(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(ONE_CHUNK)

    async def body(network: MemoryNetwork, me: Transport, liar: Transport, honest: Transport) -> None:
        serve_wrong(liar, theirs, place=1000)
        serve_blobs(honest, theirs)
        halves: list[int] = []
        progress = cut_at_half(network, me, liar, halves)
        records = [liar.record(), honest.record()]
        got = await fetch(me, records, blob, mine, timeout_s=60, progress=progress)
        assert HALF <= halves[0] < 0.6 * CHUNK_BYTES
        assert got.dropped == (liar.id,)
        assert got.path.read_bytes() == ONE_CHUNK
        assert got.received_bytes > CHUNK_BYTES + HALF

    served(2, body, rate_bytes_per_s=1e6)


def test_a_liar_that_sent_the_second_half_is_found_and_the_honest_one_is_not_blamed(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(ONE_CHUNK)

    async def body(network: MemoryNetwork, me: Transport, honest: Transport, liar: Transport) -> None:
        serve_blobs(honest, theirs)
        serve_wrong(liar, theirs, place=-1000)
        halves: list[int] = []
        progress = cut_at_half(network, me, honest, halves)
        with pytest.raises(Misbehaviour) as caught:
            await fetch(me, [honest.record(), liar.record()], blob, mine, timeout_s=60, progress=progress)
        assert HALF <= halves[0] < 0.6 * CHUNK_BYTES
        assert caught.value.evidence == [liar.id]

    served(2, body, rate_bytes_per_s=1e6)


def test_a_beginning_that_rotted_on_disk_is_nobodys_fault(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)
    partial = mine.resume(theirs.index(blob))
    partial.append(1, 0, b"rotten" * 1000)
    partial.append(2, 0, DATA[2 * CHUNK_BYTES :][:9000])
    partial.close()

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, theirs)
        got = await fetch(me, [peer.record()], blob, mine, timeout_s=60)
        assert got.dropped == ()
        assert (got.kept_bytes, got.fetched_bytes) == (9000, len(DATA) - 9000)
        assert got.path.read_bytes() == DATA

    served(1, body)


def test_a_liar_among_honest_peers_is_named_and_nobody_else(tmp_path: Path) -> None:
    """It lies in two chunks only, so most of what it sends is used."""
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA * 3)

    async def body(network: MemoryNetwork, me: Transport, *peers: Transport) -> None:
        serve_blobs(peers[0], theirs)
        serve_wrong(peers[1], theirs, lies=lambda number: number % 2 == 1)
        serve_blobs(peers[2], theirs)
        got = await fetch(me, [peer.record() for peer in peers], blob, mine, timeout_s=60)
        assert got.dropped == (peers[1].id,)
        assert got.path.read_bytes() == DATA * 3

    served(3, body, rate_bytes_per_s=2e6)


def scripted(index: bytes, *messages: bytes) -> Any:
    """A peer that sends the right index, and these messages for a chunk."""

    async def answer(stream: Stream) -> None:
        request = encoding.decode(await stream.recv(1000), 1000)
        script = messages if "chunk" in request else (encoding.encode({"size": len(index)}), index)
        for message in script[:-1]:
            await stream.send(message)
        await stream.send(script[-1], last=True)

    return answer


SIZE = encoding.encode({"size": CHUNK_BYTES})


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ((encoding.encode({"size": CHUNK_BYTES - 1}), b""), "1048576 expected"),
        ((encoding.encode({"size": -1}), b""), "1048576 expected"),
        ((encoding.encode({"size": True}), b""), "its size or an error"),
        ((b"{", b""), "cannot be read"),
        ((SIZE, b"x"), "a piece of 1 bytes"),
        ((SIZE, b"x" * 65_536, b""), "a piece of 0 bytes when 983040"),
        ((SIZE, b"x" * 65_537, b""), "65536 expected"),
        ((SIZE, *(b"x" * 65_536 for _ in range(16)), b""), "not chunk 0"),
    ],
    ids=["short", "negative", "bool", "garbage", "crumbs", "early end", "long piece", "wrong bytes"],
)
def test_an_answer_that_breaks_the_rules_is_misbehaviour(
    tmp_path: Path, messages: tuple[bytes, ...], what: str
) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(ONE_CHUNK)

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        peer.serve(BLOBS, scripted(theirs.index(blob).to_bytes(), *messages))
        with pytest.raises(Misbehaviour, match=what) as caught:
            await fetch(me, [peer.record()], blob, mine, timeout_s=60)
        assert caught.value.evidence == [peer.id]

    served(1, body)


def test_a_peer_that_goes_on_after_the_end_is_dropped_and_its_right_bytes_are_kept(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(ONE_CHUNK)
    pieces = [ONE_CHUNK[start : start + 65_536] for start in range(0, CHUNK_BYTES, 65_536)]

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        peer.serve(BLOBS, scripted(theirs.index(blob).to_bytes(), SIZE, *pieces, b"more"))
        got = await fetch(me, [peer.record()], blob, mine, timeout_s=60)
        assert got.dropped == (peer.id,)
        assert got.path.read_bytes() == ONE_CHUNK

    served(1, body)


def test_what_a_peer_says_of_itself_or_others_names_nobody(tmp_path: Path) -> None:
    (mine,) = stores(tmp_path, "mine")

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        async def accuse(stream: Stream) -> None:
            await stream.send(error_head(Misbehaviour("somebody lied to me", evidence="none")), last=True)

        peer.serve(BLOBS, accuse)
        with pytest.raises(Unavailable, match="somebody lied to me"):
            await fetch(me, [peer.record()], MISSING, mine, timeout_s=60)

    served(1, body)


# --- interruptions --------------------------------------------------------------------------------------------------


def test_the_folder_is_good_at_any_moment_as_a_kill_would_leave_it(tmp_path: Path) -> None:
    """A copy of the folder, made while a fetch writes to it, goes on where that one was."""
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)
    copies: list[tuple[Path, int]] = []
    moments = sorted(random.Random(3).sample(range(len(DATA)), 4))

    def progress(here: int, size: int) -> None:
        assert size == len(DATA)
        if len(copies) < len(moments) and here >= moments[len(copies)]:
            copies.append((tmp_path / f"copy{len(copies)}", here))
            shutil.copytree(mine.folder, copies[-1][0])

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, theirs)
        await fetch(me, [peer.record()], blob, mine, timeout_s=60, progress=progress)
        for folder, here in copies:
            got = await fetch(me, [peer.record()], blob, BlobStore(folder), timeout_s=60)
            assert got.path.read_bytes() == DATA
            assert got.kept_bytes >= here
            assert got.received_bytes < (len(DATA) - here) * 1.01 + 10_000

    served(1, body, rate_bytes_per_s=10e6)
    assert len(copies) == len(moments)


def test_a_cancelled_fetch_has_written_what_came(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, theirs)
        counting, seen = Counting(me), [0]
        with pytest.raises(Late):
            await fetch(
                counting, [peer.record()], blob, mine, timeout_s=0.3, progress=lambda here, _: seen.append(here)  # type: ignore[arg-type]
            )  # fmt: skip
        partial = mine.resume(theirs.index(blob))
        assert partial.here_bytes == seen[-1] > 0
        assert counting.received_bytes - partial.here_bytes < 3 * 4096 + 1500
        partial.close()

    served(1, body, rate_bytes_per_s=10e6)


def test_progress_ends_with_everything(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)
    told: list[tuple[int, int]] = []

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, theirs)
        counting = Counting(me)
        got = await fetch(
            counting, [peer.record()], blob, mine, timeout_s=60, progress=lambda *news: told.append(news)  # type: ignore[arg-type]
        )  # fmt: skip
        assert got.received_bytes == counting.received_bytes

    served(1, body)
    assert told[0] == (0, len(DATA))
    assert told[-1] == (len(DATA), len(DATA))
    assert told == sorted(told)


def test_a_disk_that_fills_up_ends_the_fetch_blames_nobody_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)
    write_all, written = blob_part.write_all, 0

    def fills_up(fd: int, data: bytes, place: int) -> None:
        nonlocal written
        written += len(data)
        if written > 3_000_000:
            raise OSError(28, "No space left on device")
        write_all(fd, data, place)

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, theirs)
        monkeypatch.setattr(blob_part, "write_all", fills_up)
        started = anyio.current_time()
        with pytest.raises(Unavailable, match=r"^cannot write in .*: No space left on device; free some space"):
            await fetch(me, [peer.record()], blob, mine, timeout_s=60)
        assert anyio.current_time() - started < 0.5, "no use in trying again"
        monkeypatch.setattr(blob_part, "write_all", write_all)
        got = await fetch(me, [peer.record()], blob, mine, timeout_s=60)
        assert got.kept_bytes > 2_000_000
        assert got.path.read_bytes() == DATA

    served(1, body)


def test_no_room_is_known_before_a_chunk_is_fetched(tmp_path: Path) -> None:
    (theirs,) = stores(tmp_path, "theirs")
    blob = theirs.put(DATA)
    mine = BlobStore(tmp_path / "mine", quota_bytes=4_000_000)
    kept = mine.put(b"x" * 3_000_000)

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, theirs)
        counting = Counting(me)
        with pytest.raises(Unavailable, match="no room for") as caught:
            await fetch(counting, [peer.record()], blob, mine, timeout_s=60)  # type: ignore[arg-type]
        assert caught.value.fields["need_bytes"] >= len(DATA)
        assert caught.value.fields["have_bytes"] < 1_000_000
        assert counting.received_bytes < 2000
        assert mine.has(kept)

    served(1, body)


@pytest.mark.parametrize("error", [Missing("not here"), Unavailable("not now")])
def test_a_peer_that_has_it_not_or_not_now_is_no_liar(tmp_path: Path, error: TesseraError) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)

    class Poor(Liar):
        def open_chunk(self, blob: BlobId, number: int) -> Any:
            raise error

    async def body(network: MemoryNetwork, me: Transport, poor: Transport, rich: Transport) -> None:
        serve_blobs(poor, Poor(theirs))  # type: ignore[arg-type]
        serve_blobs(rich, theirs)
        got = await fetch(me, [poor.record(), rich.record()], blob, mine, timeout_s=60)
        assert got.dropped == ()
        assert got.path.read_bytes() == DATA

    served(2, body)

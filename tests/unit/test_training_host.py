"""The host: one seat for one peer and one account, a roster for the seated, a contract for exactly these workers."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from tessera.chain.faces import ModelShare
from tessera.core.errors import Conflict, Invalid, Refused
from tessera.p2p.memory import run_virtual
from tessera.training.book import SavedSeat
from tessera.training.protocols import JOIN, RUN
from tessera.training.roster import Roster
from training_run import Hosted, Ledger, hosted
from training_world import small_manifest

MANIFEST = small_manifest()


async def seat_all(world: Hosted) -> Roster:
    for peer in range(4):
        assert await world.join(peer) == peer
    return await world.host.seat_everyone()


async def roster_of(world: Hosted, peer: int) -> dict[str, Any]:
    return (await world.ask(peer, RUN, {"op": "roster"}))[0]


def test_seats_are_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            assert [await world.join(peer) for peer in (2, 0, 1)] == [0, 1, 2]
            assert [await world.join(peer) for peer in (1, 2, 0)] == [2, 0, 1]
            assert [seat.peer for seat in world.host.seats] == [world.keys[i].id for i in (2, 0, 1)]
            with pytest.raises(Conflict, match="3 of 4 seats are taken"):
                world.host.roster()

    run_virtual(main)


def test_a_joiner_gets_one_of_the_stages_with_the_fewest_workers(tmp_path: Path) -> None:
    async def main() -> None:
        manifest = small_manifest(replicas=2, most_replicas=3)
        async with hosted(manifest, tmp_path, rng=random.Random(5)) as world:
            given = [await world.join(peer) for peer in range(8)]
            assert [Counter(given[:4]), Counter(given[4:])] == [Counter(range(4))] * 2
            assert given[:4] != given[4:]  # at random
            assert len({await world.look(0) for _ in range(8)}) == 1  # who has a seat keeps it
            roster = await world.host.seat_everyone()
            assert [seat.stage for seat in roster.seats] == [0, 0, 1, 1, 2, 2, 3, 3]
            for stage in range(4):  # the first who came is the first of his stage
                assert [seat.peer for seat in roster.of_stage(stage)] == [
                    world.keys[peer].id for peer in range(8) if given[peer] == stage
                ]
            assert await ModelShare(world.ledger.chain, roster.share).worker_count() == 8

    run_virtual(main)


def test_who_looks_again_is_offered_the_same_stage(tmp_path: Path) -> None:
    """So that nobody draws until he likes it; another is offered when others have filled it."""

    async def main() -> None:
        async with hosted(MANIFEST, tmp_path, rng=random.Random(3)) as world:
            offered = [await world.look(0) for _ in range(12)]
            assert len(set(offered)) == 1
            for peer in range(1, 4):
                while peer == 1 and await world.look(peer) != offered[0]:
                    world.host._offered.clear()
                await world.join(peer)
            assert len({seat.stage for seat in world.host.seats}) == 3
            with pytest.raises(Conflict, match="look again"):
                await world.ask(0, JOIN, world.request(0, offered[0]))
            await world.join(0)
            assert {seat.stage for seat in world.host.seats} == set(range(4))

    run_virtual(main)


def test_the_contract_is_deployed_for_exactly_these_workers(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            roster = await seat_all(world)
            share = ModelShare(world.ledger.chain, roster.share)
            assert [await share.workers(i) for i in range(4)] == [key.account for key in world.accounts[:4]]
            assert await share.worker_count() == 4
            assert (await share.run_id()).hex() == MANIFEST.run_id
            assert await share.asset() == roster.coin
            assert world.host.phase == "training"

    run_virtual(main)


def test_the_roster_is_told_once_all_seats_are_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            await world.join(0)
            start = anyio.current_time()
            assert await roster_of(world, 0) == {"ready": False, "taken": 1}
            assert 1 < anyio.current_time() - start < 10  # the host held the question
            told: list[dict[str, Any]] = []

            async def wait() -> None:
                told.append(await roster_of(world, 0))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                roster = await seat_all(world)
            assert told[0]["ready"] is True
            assert Roster.from_value(MANIFEST.run_id, 4, told[0]).follows(roster)

    run_virtual(main)


def test_a_full_run_seats_nobody_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(small_manifest(most_replicas=1), tmp_path) as world:
            await seat_all(world)
            with pytest.raises(Conflict, match="all 4 seats of this run are taken"):
                await world.look(4)
            with pytest.raises(Refused, match="only seated workers"):
                await roster_of(world, 4)

    run_virtual(main)


def test_a_restarted_host_knows_its_seats_and_its_contract(tmp_path: Path) -> None:
    async def main() -> None:
        ledger = Ledger(MANIFEST)
        async with hosted(MANIFEST, tmp_path, ledger) as world:
            before = await seat_all(world)
            await world.host.close(patience_s=0)
        blocks = await ledger.chain.block_number()
        async with hosted(MANIFEST, tmp_path, ledger) as world:
            assert await world.join(2) == 2
            again = await world.host.seat_everyone()
            assert (again.peers, again.accounts, again.share) == (before.peers, before.accounts, before.share)
            assert again.seats[2].record.addrs == world.peers[2].record().addrs
            assert await ledger.chain.block_number() == blocks + 1  # the coin of this test; no second contract
            await world.host.close(patience_s=0)

    run_virtual(main)


def test_a_network_that_was_reset_is_noticed(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            await seat_all(world)
            await world.host.close(patience_s=0)
        async with hosted(MANIFEST, tmp_path) as world:  # on another, empty ledger
            with pytest.raises(Conflict, match="is not on this chain: was the network reset"):
                await world.host.seat_everyone()

    run_virtual(main)


def test_a_peer_that_comes_back_elsewhere_is_found_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            before = await seat_all(world)
            edition = world.host.edition
            moved = world.peers[1].record().sign(world.keys[1], ("memory:elsewhere",), 2_000_000_000)
            assert await world.join(1, record=moved.to_text()) == 1
            after = world.host.roster()
            assert after.seats[1].record.addrs == ("memory:elsewhere",)
            assert after.follows(before)
            assert world.host.edition != edition
            assert not after.follows(replace(after, share=after.coin))

    run_virtual(main)


def test_an_invitation_for_another_run_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            with pytest.raises(Conflict, match="the invitation is for another run, ask for a new one"):
                await world.join(0, run_id="ab" * 32)

    run_virtual(main)


@pytest.mark.parametrize(
    "changes",
    [
        {"record": None},
        {"record": "{}"},
        {"account": 7},
        {"account": "0x12"},
        {"seat": None},
        {"stage": "0"},
        {"binding": None},
        {"binding": "zz" * 65},
    ],
)
def test_a_request_that_cannot_be_read_takes_no_seat(changes: dict[str, Any], tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            with pytest.raises(Invalid):
                await world.join(0, **changes)
            assert world.host.seats == []

    run_virtual(main)


REPORT = {"step": 3, "losses": [[0, 4.5]], "validations": [], "wire_bytes": 7, "wire_tokens": 1}


def test_reports_reach_the_board_with_the_seat_that_sent_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            await world.join(3)
            await world.join(1)
            reply, _ = await world.ask(1, RUN, {"op": "report", "report": REPORT})
            assert reply == {"phase": "seating", "roster": world.host.edition}
            ((seat, report),) = world.reports
            assert (seat.stage, seat.peer, report.step, report.losses) == (1, world.keys[1].id, 3, [(0, 4.5)])

    run_virtual(main)


@pytest.mark.parametrize(
    "report",
    [
        None, [], {}, {**REPORT, "step": -1}, {**REPORT, "step": "3"}, {**REPORT, "shares": 10},
        {**REPORT, "rtt_ms": -1.0}, {**REPORT, "losses": [[0, 1.0]] * 1001}, {**REPORT, "losses": [[0]]},
    ],
)  # fmt: skip
def test_a_report_that_cannot_be_read_is_refused(report: object, tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            await world.join(0)
            with pytest.raises(Invalid, match="a report cannot be read"):
                await world.ask(0, RUN, {"op": "report", "report": report})
            with pytest.raises(Invalid, match="unknown operation"):
                await world.ask(0, RUN, {"op": "shares"})
            assert world.reports == []

    run_virtual(main)


def test_a_host_that_leaves_tells_every_worker(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            await seat_all(world)
            phases: list[str] = []

            async def report(peer: int) -> None:
                while not phases or phases[-1] != "closed":
                    reply, _ = await world.ask(peer, RUN, {"op": "report", "report": REPORT})
                    phases.append(reply["phase"])
                    await anyio.sleep(0.5)

            start = anyio.current_time()
            async with anyio.create_task_group() as tasks:
                for peer in range(4):
                    tasks.start_soon(report, peer)
                await anyio.sleep(1)
                await world.host.close(patience_s=30)
                assert anyio.current_time() - start < 5  # everybody had heard it
            with pytest.raises(Conflict, match="is closed"):
                await world.ask(0, JOIN, world.request(0))

    run_virtual(main)


def test_a_host_does_not_wait_for_ever_for_workers_that_are_gone(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            await seat_all(world)
            start = anyio.current_time()
            await world.host.close(patience_s=3)
            assert anyio.current_time() - start == pytest.approx(3, abs=0.2)

    run_virtual(main)


@pytest.mark.parametrize("content", [b"not a database" * 100, None])
def test_a_damaged_host_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    async def main() -> None:
        if content is None:
            async with hosted(MANIFEST, tmp_path) as world:
                await world.join(0)
                world.book.save_seats([SavedSeat(0, {})])
                await world.host.close(patience_s=0)
        else:
            (tmp_path / "host.sqlite").write_bytes(content)
        with pytest.raises(Invalid, match=r"host\.sqlite is damaged"):
            async with hosted(MANIFEST, tmp_path):
                pytest.fail("it opened")

    run_virtual(main)

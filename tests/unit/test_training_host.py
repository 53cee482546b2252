"""The host: one seat for one peer and one account, a roster for the seated, a contract for exactly these workers."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from tessera.chain.faces import Coin, ModelShare, Run
from tessera.core.errors import Conflict, Invalid, PaymentRequired, Refused
from tessera.core.signing import AccountKey
from tessera.p2p.memory import VirtualClock, run_virtual
from tessera.training.bond import Status, pay_stake, peer_bytes
from tessera.training.book import SavedSeat
from tessera.training.manifest import Settlement
from tessera.training.protocols import JOIN, RUN
from tessera.training.roster import Roster
from training_run import OPERATOR, Hosted, Ledger, hosted
from training_world import small_manifest

MANIFEST = small_manifest()


async def seat_all(world: Hosted) -> Roster:
    assert sorted([await world.join(peer) for peer in range(4)]) == [0, 1, 2, 3]
    return await world.host.seat_everyone()


def contract_of(world: Hosted) -> Run:
    return world.host._contract


async def roster_of(world: Hosted, peer: int) -> dict[str, Any]:
    return (await world.ask(peer, RUN, {"op": "roster"}))[0]


def test_seats_are_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            given = {peer: await world.join(peer) for peer in (2, 0, 1)}
            assert len(set(given.values())) == 3
            assert {peer: await world.join(peer) for peer in (1, 2, 0)} == given
            assert {seat.peer: seat.stage for seat in world.host.seats} == {
                world.keys[peer].id: stage for peer, stage in given.items()
            }
            with pytest.raises(Conflict, match="3 of 4 seats are taken"):
                world.host.roster()

    run_virtual(main)


def test_the_contract_draws_a_joiner_one_of_the_stages_with_the_fewest_workers(tmp_path: Path) -> None:
    async def main() -> None:
        manifest = small_manifest(replicas=2, most_replicas=3)
        async with hosted(manifest, tmp_path) as world:
            given: list[int] = []
            for peer in range(8):
                likely = await world.look(peer)
                assert likely == [s for s in range(4) if given.count(s) == len(given) // 4]
                given.append(await world.join(peer))
                assert given[-1] in likely
                assert await world.look(peer) == [given[-1]]  # who has a seat keeps it
            assert Counter(given) == Counter(dict.fromkeys(range(4), 2))
            roster = await world.host.seat_everyone()
            assert [seat.stage for seat in roster.seats] == [0, 0, 1, 1, 2, 2, 3, 3]
            for stage in range(4):  # the first who came is the first of his stage
                assert [seat.peer for seat in roster.of_stage(stage)] == [
                    world.keys[peer].id for peer in range(8) if given[peer] == stage
                ]
            assert await contract_of(world).worker_count() == 8

    run_virtual(main)


def test_a_seat_is_taken_at_the_drawn_stage_and_after_bonding_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            with pytest.raises(Conflict, match="bond first"):
                await world.ask(0, JOIN, world.request(0, 0))
            drawn = await world.bond(0)
            with pytest.raises(Conflict, match="the contract has not drawn stage"):
                await world.ask(0, JOIN, world.request(0, (drawn + 1) % 4))
            assert await world.join(0) == drawn

    run_virtual(main)


def test_whoever_stops_between_bond_and_seat_is_bonded_once_and_keeps_the_stage(tmp_path: Path) -> None:
    """The joiner, or the host: the chain knows."""

    async def main() -> None:
        ledger = Ledger(MANIFEST)
        coin = await ledger.coin()
        async with hosted(MANIFEST, tmp_path, ledger, coin) as world:
            drawn, run = await world.bond(0), contract_of(world).address
            await contract_of(world).bond(
                OPERATOR, world.accounts[1].account, peer_bytes(world.keys[1].id), 0, 0, 27, bytes(32), bytes(32)
            )  # and the host stopped before the draw
            await world.host.close(patience_s=0)
        async with hosted(MANIFEST, tmp_path, ledger, coin) as world:
            assert contract_of(world).address == run
            assert await world.look(0) == [drawn]
            assert [await world.bond(0), await world.join(0)] == [drawn, drawn]
            other = await world.join(1)
            assert other != drawn
            bonded = await contract_of(world).events(Run.Bonded)
            assert [event.account for event in bonded] == [world.accounts[peer].account for peer in (0, 1)]
            assert {await world.join(2), await world.join(3), drawn, other} == {0, 1, 2, 3}
            await world.host.seat_everyone()
            await world.host.close(patience_s=0)

    run_virtual(main)


def test_a_host_that_stops_after_the_start_finds_the_share_contract_again(tmp_path: Path) -> None:
    async def main() -> None:
        ledger = Ledger(MANIFEST)
        coin = await ledger.coin()
        async with hosted(MANIFEST, tmp_path, ledger, coin) as world:
            for peer in range(4):
                await world.join(peer)
            share = await world.host._begin()  # and not a word of it on the disk
            await world.host.close(patience_s=0)
        async with hosted(MANIFEST, tmp_path, ledger, coin) as world:
            assert (await world.host.seat_everyone()).share == share
            await world.host.close(patience_s=0)

    run_virtual(main)


STAKED = small_manifest(settlement=Settlement(stake_units=500, window_s=5, delay_s=60))


def test_a_stake_is_passed_on_by_the_host_and_taken_by_the_contract(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(STAKED, tmp_path) as world:
            key, run = world.accounts[0], contract_of(world)
            assert await world.bond(0) is None  # his stake is still to come
            paid = await pay_stake(
                world.ledger.chain, STAKED, run.address, world.coin, key, world.keys[0].id, VirtualClock()
            )  # he makes the play money that he lacks
            stage = await world.bond(0, authorization=paid.to_value())
            member, coin = await run.members(key.account), Coin(world.ledger.chain, world.coin)
            assert (member.status, member.stage, member.bond) == (Status.DRAWN, stage, 500)
            assert [await coin.balanceOf(a) for a in (key.account, run.address)] == [0, 500]
            assert await world.bond(0, authorization=paid.to_value()) == stage  # asked again, nothing is paid again
            with pytest.raises(Conflict, match="one account, one seat"):
                await world.bond(1, key.account)
            for wrong in ({}, {**paid.to_value(), "signature": "00"}, {**paid.to_value(), "valid_before": "1"}):
                with pytest.raises(Invalid):
                    await world.bond(1, authorization=wrong)
            with pytest.raises(Invalid, match="coin: invalid signature"):
                await world.bond(1, authorization=paid.to_value())

    run_virtual(main)


def test_a_joiner_without_the_money_hears_how_much_of_what_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def real(*args: object) -> bool:
        return False

    monkeypatch.setattr("tessera.training.bond._is_play_money", real)

    async def main() -> None:
        async with hosted(STAKED, tmp_path) as world:
            poor, run = AccountKey(b"\x55" * 32), contract_of(world).address
            await Coin(world.ledger.chain, world.coin).mint(OPERATOR, poor.account, 100)
            with pytest.raises(PaymentRequired, match=f"500 units of {world.coin} on chain 31337, and {poor.account}"):
                await pay_stake(world.ledger.chain, STAKED, run, world.coin, poor, world.keys[0].id, VirtualClock())

    run_virtual(main)


def test_a_joiner_who_went_away_frees_his_stage_after_an_hour(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(small_manifest(most_replicas=1), tmp_path) as world:
            drawn = await world.bond(4)
            rest = [await world.join(peer) for peer in range(3)]
            with pytest.raises(Conflict, match="all 4 seats of this run are taken"):
                await world.look(3)
            await anyio.sleep(3601)
            assert await world.look(3) == [drawn]
            assert sorted([*rest, await world.join(3)]) == [0, 1, 2, 3]
            with pytest.raises(Conflict, match="has left the run: join again from another --state-dir"):
                await world.bond(4)
            await world.host.seat_everyone()

    run_virtual(main)


def test_the_contract_is_deployed_for_exactly_these_workers(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            roster = await seat_all(world)
            share, run = ModelShare(world.ledger.chain, roster.share), Run(world.ledger.chain, roster.run)
            assert {await run.workers(i) for i in range(4)} == {key.account for key in world.accounts[:4]}
            assert await run.worker_count() == 4
            assert (await share.issuer(), await run.share()) == (run.address, share.address)
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
            assert await world.join(2) == before.stage_by_peer[world.keys[2].id]
            again = await world.host.seat_everyone()
            assert (again.peers, again.accounts, again.share) == (before.peers, before.accounts, before.share)
            moved = again.seat_of(world.keys[2].id)
            assert moved is not None
            assert moved.record.addrs == world.peers[2].record().addrs
            assert await ledger.chain.block_number() == blocks + 1  # the coin of this test; no second contract
            await world.host.close(patience_s=0)

    run_virtual(main)


@pytest.mark.slow
def test_a_network_that_was_reset_is_noticed(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            await seat_all(world)
            await world.host.close(patience_s=0)
        with pytest.raises(Conflict, match="is not on this chain: was the network reset"):
            async with hosted(MANIFEST, tmp_path):  # on another, empty ledger
                pytest.fail("it opened")

    run_virtual(main)


def test_a_peer_that_comes_back_elsewhere_is_found_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            before = await seat_all(world)
            edition = world.host.edition
            moved = world.peers[1].record().sign(world.keys[1], ("memory:elsewhere",), 2_000_000_000)
            stage = await world.join(1, record=moved.to_text())
            after = world.host.roster()
            assert after.seats[stage].record.addrs == ("memory:elsewhere",)
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
            stage = await world.join(1)
            reply, _ = await world.ask(1, RUN, {"op": "report", "report": REPORT})
            assert reply == {"phase": "seating", "roster": world.host.edition}
            ((seat, report),) = world.reports
            assert (seat.stage, seat.peer, report.step, report.losses) == (stage, world.keys[1].id, 3, [(0, 4.5)])

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

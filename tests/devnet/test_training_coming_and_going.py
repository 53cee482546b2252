"""A worker leaves in the middle, another has come to his stage: nobody loses a share, and the model does not notice.

Whole workers, real stages, real chain, virtual time.
"""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
import torch

from tessera.chain.faces import ModelShare
from tessera.p2p.memory import run_virtual
from tessera.training import attendance, membership
from tessera.training.book import ReceiptBook
from tessera.training.checkpoints import Checkpoints
from tessera.training.epochs import compute_epoch
from tessera.training.host import CANDIDATE_S
from tessera.training.receipts import Receipt, credited
from tessera.training.wishes import make_wish, read_wish
from training_whole import STAGES, STEPS, Life, WholeRun, write_data


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def folder_of(life: Life) -> Path:
    return life.home.run_folder(life.run.manifest.run_id)


async def params(run: WholeRun, lives: list[Life]) -> list[bytes]:
    return [Checkpoints(folder_of(life) / "checkpoints").load(STEPS) for life in lives]


async def announced(leaver: Life) -> None:
    """The leaver has read his owner's wish. The run stands still, for in virtual time a step takes no time."""
    leaver.run.host.phase = "paused"
    make_wish(folder_of(leaver), "leave")
    await anyio.sleep(5)


async def gone(life: Life, within_s: float = 120) -> None:
    with anyio.fail_after(within_s):
        await life.over.wait()
    life.run.host.phase = "training"


def receipts_of(run: WholeRun, lives: list[Life]) -> list[Receipt]:
    found: dict[str, Receipt] = {}
    for life in lives:
        book = ReceiptBook(folder_of(life) / "book.sqlite")
        found |= {str(receipt.to_row()): receipt for receipt in book.of_steps(run.manifest.run_id, range(STEPS))}
        book.close()
    return list(found.values())


def expected_shares(run: WholeRun, lives: list[Life]) -> dict[str, int]:
    """What the receipts in all books together say that each account earned."""
    shares: dict[str, int] = {}
    schedule, roster = run.manifest.schedule, run.host.roster()
    receipts = receipts_of(run, lives)
    for epoch in range(schedule.epochs):
        steps = schedule.epoch_range(epoch)
        credit = credited(receipts, roster.stage_by_peer, STAGES, steps, schedule.microbatches)
        assert sum(map(len, credit.values())) == STAGES * len(steps) * schedule.microbatches  # nothing is lost
        work = [(seat.account, seat.stage, len(credit.get(seat.peer, ()))) for seat in roster.everyone]
        leaves = compute_epoch(run.manifest, epoch, work)
        for account, count in leaves.leaves:
            shares[account] = shares.get(account, 0) + count
    return shares


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 0])
def test_a_stage_changes_hands_in_the_middle_and_nothing_is_lost(stage: int, tmp_path: Path) -> None:
    async def main() -> None:
        quiet = WholeRun(write_data(tmp_path / "quiet"), tmp_path / "quiet")
        async with quiet.open():
            await quiet.settled()
            undisturbed = await params(quiet, quiet.workers)

        run = WholeRun(write_data(tmp_path / "run"), tmp_path / "run")
        async with run.open() as tasks:
            leaver, successor = run.workers[stage], Life(run, STAGES)
            await run.at_step(4)
            await announced(leaver)
            tasks.start_soon(successor.live)
            await gone(leaver)
            assert read_wish(folder_of(leaver)) == "work"
            await run.settled()

            roster = run.host.roster()
            assert [seat.peer for seat in roster.of_stage(stage)] == [successor.home.peer_key.id]
            (past,) = roster.past
            assert (past.peer, roster.changes) == (leaver.home.peer_key.id, 2)
            lives = [successor if i == stage else run.workers[i] for i in range(STAGES)]
            assert await params(run, lives) == undisturbed

            share, due = ModelShare(run.ledger.chain, roster.share), expected_shares(run, [*run.workers, successor])
            for account in [*roster.accounts, past.account]:
                assert await share.balanceOf(account) == due[account] > 0
            assert await share.totalSupply() == sum(due.values())

    run_virtual(main)


@pytest.mark.slow
def test_a_leaver_who_stays_after_all_keeps_his_seat(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open():
            leaver = run.workers[1]
            await run.at_step(3)
            await announced(leaver)
            await anyio.sleep(3)  # nobody comes: he works on
            assert not leaver.over.is_set()
            make_wish(folder_of(leaver), "work")
            run.host.phase = "training"
            await run.settled()
            assert run.host.roster().past == ()
            assert run.host.roster().peers[1] == leaver.home.peer_key.id

    run_virtual(main)


@pytest.mark.slow
def test_a_joiner_who_goes_away_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """He dies once the contract has drawn his seat; the leaver works on, until another can be drawn to it."""

    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            leaver, first, second = run.workers[3], Life(run, STAGES), Life(run, STAGES + 1)
            await run.at_step(10)  # the first checkpoint
            await announced(leaver)
            tasks.start_soon(first.live)
            while not run.host._candidates:
                await anyio.sleep(0.01)
            await first.die()
            await anyio.sleep(CANDIDATE_S + 1)
            assert not leaver.over.is_set()
            assert run.host.roster().changes == 0
            tasks.start_soon(second.live)
            await gone(leaver, 1200)
            await run.settled()
            assert [seat.peer for seat in run.host.roster().of_stage(3)] == [second.home.peer_key.id]

    run_virtual(main)


@pytest.mark.slow
def test_a_worker_who_joins_and_stays_follows_the_first_of_his_stage(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            joiner = Life(run, STAGES)
            await run.at_step(3)
            tasks.start_soon(joiner.live)
            await run.settled()
            roster = run.host.roster()
            stage = roster.stage_of(joiner.home.peer_key.id)
            assert stage is not None
            assert [seat.stage for seat in roster.seats] == sorted([0, 1, 2, 3, stage])
            assert (roster.of_stage(stage)[1].peer, roster.changes) == (joiner.home.peer_key.id, 1)
            await anyio.sleep(5)
            assert await params(run, [joiner]) == await params(run, [run.workers[stage]])
            for life in run.workers:  # everybody has heard, and believes it
                assert life.seated is not None
                assert life.seated.roster.same_members(roster)

    run_virtual(main)


@pytest.mark.slow
def test_a_host_that_restarts_finds_who_came_and_went_on_the_chain(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            leaver, successor = run.workers[0], Life(run, STAGES)
            await run.at_step(3)
            await announced(leaver)
            tasks.start_soon(successor.live)
            await gone(leaver)
            await run.settled()
            before = run.host.roster()
            again = run.new_host()
            assert (await again.seat_everyone()).same_members(before)
            assert again.roster().changes == 2

    run_virtual(main)


@pytest.mark.slow
def test_what_the_leaver_signed_last_is_with_the_others_when_he_is_gone(tmp_path: Path) -> None:
    """In a pause, his last receipts may lie unread with his neighbours: they would be lost with him."""

    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            leaver, successor = run.workers[0], Life(run, STAGES)
            await run.at_step(4)
            await announced(leaver)  # in the pause, stage 1 ends a step before stage 0, and holds its breath
            tasks.start_soon(successor.live)
            await gone(leaver)
            me = leaver.home.peer_key.id
            signed = {receipt for receipt in receipts_of(run, [leaver]) if receipt.signer == me}
            kept = {receipt for receipt in receipts_of(run, run.workers[1:]) if receipt.signer == me}
            assert len(signed) >= 4
            assert kept == signed

    run_virtual(main)


@pytest.mark.slow
def test_who_is_gone_without_a_word_is_taken_off_the_list_and_another_is_drawn_to_his_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = ((membership, "LAST_ABSENT_S", 60), (membership, "TURN_S", 5), (attendance, "ASK_S", 5))
    for module, name, seconds in waits:
        monkeypatch.setattr(module, name, float(seconds))

    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            lost, joiner = run.workers[0], Life(run, STAGES)
            await run.settled()
            await lost.die()
            await anyio.sleep(40)
            assert run.host.roster().past == ()  # he is the only one of his stage, and has a little longer
            with anyio.fail_after(120):
                while not run.host.roster().past:
                    await anyio.sleep(1)
            assert run.host.roster().of_stage(0) == ()
            tasks.start_soon(joiner.live)
            with anyio.fail_after(120):
                while not run.host.roster().of_stage(0):
                    await anyio.sleep(1)
            roster = run.host.roster()
            assert [seat.peer for seat in roster.past] == [lost.home.peer_key.id]
            assert [seat.peer for seat in roster.of_stage(0)] == [joiner.home.peer_key.id]

    run_virtual(main)

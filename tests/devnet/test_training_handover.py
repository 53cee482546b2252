"""A worker leaves in the middle, another takes his stage: nobody loses a share, and the model does not notice.

Whole workers, real stages, real chain, virtual time.
"""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
import torch

from tessera.chain.faces import ModelShare
from tessera.p2p.memory import run_virtual
from tessera.training.book import ReceiptBook
from tessera.training.checkpoints import Checkpoints
from tessera.training.epochs import compute_epoch
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
    """The leaver's wish has reached the host: now somebody may come."""
    make_wish(folder_of(leaver), "leave")
    while not leaver.run.host._leaving:
        await anyio.sleep(0.1)


async def gone(life: Life, within_s: float = 120) -> None:
    with anyio.fail_after(within_s):
        await life.over.wait()


async def expected_shares(run: WholeRun) -> dict[str, int]:
    """What the roster's history says that each account earned, if every step was verified."""
    shares: dict[str, int] = {}
    schedule, tokens = run.manifest.schedule, run.manifest.tokens_per_step
    for epoch in range(schedule.epochs):
        stages, accounts, counts = [], [], []
        for steps, seats in run.host.roster().spans(schedule.epoch_range(epoch)):
            for seat in seats:
                stages.append(seat.stage)
                accounts.append(seat.account)
                counts.append(len(steps) * tokens)
        leaves = compute_epoch(run.manifest, epoch, accounts, counts, stages)
        assert leaves is not None
        for account, count in leaves.leaves:
            shares[account] = shares.get(account, 0) + count
    return shares


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stage_changes_hands_in_the_middle_and_nothing_is_lost(stage: int, tmp_path: Path) -> None:
    async def main() -> None:
        quiet = WholeRun(write_data(tmp_path / "quiet"), tmp_path / "quiet")
        async with quiet.open():
            await quiet.settled()
            undisturbed = await params(quiet, quiet.workers)

        run = WholeRun(write_data(tmp_path / "run"), tmp_path / "run")
        async with run.open() as tasks:
            leaver, successor = run.workers[stage], Life(run, STAGES)
            await run.at_step(3)
            await announced(leaver)
            tasks.start_soon(successor.live)
            await gone(leaver)
            assert read_wish(folder_of(leaver)) == "work"
            await run.settled()

            roster = run.host.roster()
            assert roster.peers[stage] == successor.home.peer_key.id
            (past,) = roster.past
            assert past.seat.peer == leaver.home.peer_key.id
            assert 3 <= past.until_step < STEPS
            lives = [successor if i == stage else run.workers[i] for i in range(STAGES)]
            assert await params(run, lives) == undisturbed

            share, due = ModelShare(run.ledger.chain, roster.share), await expected_shares(run)
            for account in [*roster.accounts, past.seat.account]:
                assert await share.balanceOf(account) == due[account]
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
            await run.settled()
            assert run.host.roster().past == ()
            assert run.host.roster().peers[1] == leaver.home.peer_key.id

    run_virtual(main)


@pytest.mark.slow
def test_a_successor_who_goes_away_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """He dies after the leaver has stopped for him; the leaver goes on, and the next successor gets the stage."""

    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            leaver, first, second = run.workers[3], Life(run, STAGES), Life(run, STAGES + 1)
            await run.at_step(10)  # the first checkpoint
            await announced(leaver)
            tasks.start_soon(first.live)
            while not (folder_of(first) / "checkpoints").exists():
                await anyio.sleep(0.01)
            run.ledger.away = True  # he gets as far as the state, and no signature reaches the chain
            while not list(folder_of(first).glob("checkpoints/*")):
                await anyio.sleep(0.01)
            await first.die()
            run.ledger.away = False
            await anyio.sleep(200)
            assert not leaver.over.is_set()
            tasks.start_soon(second.live)
            await gone(leaver, 1200)
            await run.settled()
            assert run.host.roster().peers[3] == second.home.peer_key.id

    run_virtual(main)


def test_a_host_that_restarts_in_between_finds_the_successor_on_the_chain(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            leaver, successor = run.workers[1], Life(run, STAGES)
            await run.at_step(3)
            await announced(leaver)
            tasks.start_soon(successor.live)
            await gone(leaver)
            await run.settled()
            kept = run.host._book.handovers()
            assert len(kept) == 1
            assert kept[0]["until_step"] == run.host.roster().past[0].until_step

    run_virtual(main)


@pytest.mark.slow
def test_the_leavers_book_holds_every_receipt_of_the_steps_that_he_is_paid_for(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            leaver, successor = run.workers[2], Life(run, STAGES)
            await run.at_step(6)
            await announced(leaver)
            tasks.start_soon(successor.live)
            await gone(leaver)
            (past,) = run.host.roster().past
            book = ReceiptBook(folder_of(leaver) / "book.sqlite")
            me = leaver.home.peer_key.id
            mine = {(r.step, r.direction) for r in book.of_steps(run.manifest.run_id, range(STEPS)) if r.worker == me}
            book.close()
            assert mine >= {(s, d) for s in range(past.until_step) for d in ("forward", "backward")}

    run_virtual(main)


def test_what_the_leaver_signed_last_is_with_the_others_when_he_is_gone(tmp_path: Path) -> None:
    """In a pause, his last receipts may lie unread with his neighbours: they would be lost with him."""

    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            leaver, successor = run.workers[0], Life(run, STAGES)
            await run.at_step(4)
            run.host.phase = "paused"  # stage 1 ends a step before stage 0, and holds its breath
            await anyio.sleep(5)
            await announced(leaver)
            tasks.start_soon(successor.live)
            await gone(leaver)
            (past,) = run.host.roster().past
            signed, kept = set(), set()
            for life in run.workers:
                book = ReceiptBook(folder_of(life) / "book.sqlite")
                for receipt in book.of_steps(run.manifest.run_id, range(past.until_step)):
                    if receipt.signer == leaver.home.peer_key.id:
                        (signed if life is leaver else kept).add(receipt)
                book.close()
            assert len(signed) == past.until_step >= 4
            assert kept == signed

    run_virtual(main)

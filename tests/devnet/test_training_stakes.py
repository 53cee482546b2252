"""A stake from the first look to the last withdrawal: whole workers, real stages, real chain, virtual time."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
import torch

from tessera.chain.faces import Coin, Run
from tessera.cli.owners import _withdraw
from tessera.devnet.access import OpenBond
from tessera.p2p.memory import run_virtual
from tessera.training.bond import Status, recall_bond
from tessera.training.manifest import Settlement
from tessera.training.status import read_status
from tessera.training.wishes import make_wish
from training_whole import STAGES, Life, WholeRun, write_data

STAKE, DELAY_S = 1_000_000, 60


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def bond_of(life: Life) -> OpenBond:
    manifest = life.run.manifest
    folder = life.home.run_folder(manifest.run_id)
    return OpenBond(life.home, folder, manifest, life.run.ledger.chain, recall_bond(folder))


@pytest.mark.slow
def test_a_stake_is_bonded_held_through_a_delay_and_paid_back(tmp_path: Path) -> None:
    async def main() -> None:
        settlement = Settlement(stake_units=STAKE, window_s=5, delay_s=DELAY_S, early_bps=20_000)
        manifest = write_data(tmp_path).model_copy(update={"settlement": settlement})
        whole = WholeRun(manifest, tmp_path)
        async with whole.open() as tasks:
            coin, run = Coin(whole.ledger.chain, whole.coin), Run(whole.ledger.chain, whole.roster.run)
            assert await coin.balanceOf(run.address) == await run.bonded() == STAGES * STAKE
            leaver, successor = whole.workers[2], Life(whole, STAGES)
            await whole.at_step(4)
            whole.host.phase = "paused"
            make_wish(leaver.home.run_folder(manifest.run_id), "leave")
            await anyio.sleep(5)
            assert (await run.members(leaver.home.account_key.account)).status == Status.LEAVING
            assert (await _withdraw(bond_of(leaver), whole.clock.time()))["withdrawn"] == 0
            tasks.start_soon(successor.live)
            with anyio.fail_after(120):
                await leaver.over.wait()
            whole.host.phase = "training"
            account = leaver.home.account_key.account
            assert (await run.members(account)).status == Status.LEFT
            told = await _withdraw(bond_of(leaver), whole.clock.time())
            assert (told["withdrawn"], told["bonded"]) == (0, STAKE)
            assert told["bond"].startswith("free from 20")
            await anyio.sleep(DELAY_S)
            assert (await _withdraw(bond_of(leaver), whole.clock.time()))["withdrawn"] == STAKE
            assert await coin.balanceOf(account) == STAKE
            assert (await _withdraw(bond_of(leaver), whole.clock.time()))["bond"] == "paid back"
            assert await coin.balanceOf(run.address) == await run.bonded() == STAGES * STAKE
            status = read_status(successor.home.run_folder(manifest.run_id))
            assert (status.stake, status.bond) == (STAKE, f"bonded; free {DELAY_S} s after leaving")

    run_virtual(main)

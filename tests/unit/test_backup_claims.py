"""A lost machine's identity and claims come back: its shares are redeemed and its income pulled from the backup."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from tessera.chain.faces import Coin
from tessera.cli import owners
from tessera.devnet.access import OpenBond
from tessera.p2p.memory import run_virtual
from tessera.training import backup_stream
from tessera.training.backup import take_backup
from tessera.training.backup_restore import restore_backup
from tessera.training.bond import recall_bond, remember_bond
from tessera.training.book import ReceiptBook
from tessera.training.home import Home
from tessera.training.roster import remember_run
from training_run import OPERATOR, Settlement, settle_all, settlement
from training_world import small_manifest

INCOME = 1_000_000  # units


@pytest.mark.slow
def test_a_lost_workers_shares_are_redeemed_and_its_income_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_stream, "SCRYPT_N", 1 << 10)
    manifest = small_manifest(steps=6, epoch_steps=3)

    async def main() -> None:
        async with settlement(manifest, tmp_path) as world:
            lost, *others = world.settlers
            await settle_all(others)  # the lost one never redeemed what the others posted
            account, coin = lost.account_key.account, Coin(world.ledger.chain, await world.share.asset())
            assert await world.share.balanceOf(account) == 0

            home = Home(tmp_path / "lost")
            home.keys.add("peer", lost.key.seed, replace=True)
            home.keys.add("account", lost.account_key.secret, replace=True)
            folder = home.run_folder(manifest.run_id)
            remember_bond(folder, manifest, world.run.address)
            remember_run(folder, manifest, world.roster)
            book = ReceiptBook(folder / "book.sqlite")
            for epoch in range(manifest.schedule.epochs):
                book.save_epoch(epoch, others[0].book.epoch(epoch) or "")
            take_backup(home, tmp_path / "backup", "correct horse battery")
            book.close()
            shutil.rmtree(home.path)  # the machine is gone

            await coin.mint(OPERATOR, world.share.address, INCOME)
            restore_backup(tmp_path / "backup", tmp_path / "found", lambda: "correct horse battery")
            monkeypatch.setattr(owners, "open_bond", partial(_open_bond, world))
            await owners.run_claim(tmp_path / "found", as_json=True)
            shares, total = await world.share.balanceOf(account), await world.share.totalSupply()
            claimed = await coin.balanceOf(account)
            assert 0 < shares < total
            assert claimed == INCOME * shares // total > 0
            await owners.run_claim(tmp_path / "found", as_json=True)
            assert await coin.balanceOf(account) == claimed  # nothing is paid twice

    run_virtual(main)


@asynccontextmanager
async def _open_bond(world: Settlement, state_dir: Path) -> AsyncIterator[OpenBond]:
    """As `devnet.access` does it, without the way over a peer link."""
    home = Home.existing(state_dir)
    folder = home.run_folder(world.manifest.run_id)
    yield OpenBond(home, folder, world.manifest, world.ledger.chain, recall_bond(folder))

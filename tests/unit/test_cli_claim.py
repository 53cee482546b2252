"""`tessera claim` and a bond: whoever never became a worker, or whom nobody let go, has it back too."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from tessera.chain.faces import Coin, Run
from tessera.cli.owners import _withdraw
from tessera.core.errors import Missing
from tessera.devnet.access import OpenBond
from tessera.p2p.memory import VirtualClock, run_virtual
from tessera.training.bond import Status, recall_bond, remember_bond
from tessera.training.home import Home
from tessera.training.host import CANDIDATE_S
from tessera.training.manifest import Settlement
from training_run import Ledger
from training_world import account_keys, peer_keys, small_manifest

STAKE, DELAY_S = 700, 60
MANIFEST = small_manifest(settlement=Settlement(stake_units=STAKE, delay_s=DELAY_S))


def bond_of(home: Home, ledger: Ledger, run: Run) -> OpenBond:
    folder = home.run_folder(MANIFEST.run_id)
    remember_bond(folder, MANIFEST, run.address)
    return OpenBond(home, folder, MANIFEST, ledger.chain, recall_bond(folder))


def test_a_joiner_who_was_never_taken_in_gets_his_stake_back(tmp_path: Path) -> None:
    async def main() -> None:
        ledger, home, clock = Ledger(MANIFEST), Home(tmp_path / "worker"), VirtualClock()
        coin = await ledger.coin()
        run = await ledger.deploy_run(coin)
        bond = bond_of(home, ledger, run)
        assert await _withdraw(bond, clock.time()) == {"withdrawn": 0, "bonded": 0, "bond": "nothing is bonded"}
        await ledger.bond(run, home.account_key, home.peer_key.id)
        told = await _withdraw(bond, clock.time())
        assert (told["bonded"], told["bond"]) == (STAKE, "bonded, waits for the workers")
        with pytest.raises(Missing, match="never seated"):
            bond.run()
        await anyio.sleep(CANDIDATE_S + 1)
        assert (await _withdraw(bond, clock.time()))["bond"].startswith("free from 20")
        await anyio.sleep(DELAY_S + 1)
        assert (await _withdraw(bond, clock.time()))["withdrawn"] == STAKE
        assert await Coin(ledger.chain, coin).balanceOf(home.account_key.account) == STAKE

    run_virtual(main)


def test_who_announced_to_leave_goes_alone_when_nobody_lets_him(tmp_path: Path) -> None:
    async def main() -> None:
        ledger, home, clock = Ledger(MANIFEST), Home(tmp_path / "worker"), VirtualClock()
        others = [(key, peer.id) for key, peer in zip(account_keys(3), peer_keys(3), strict=True)]
        run, _ = await ledger.begin([*others, (home.account_key, home.peer_key.id)])
        bond, account = bond_of(home, ledger, run), home.account_key.account
        assert (await _withdraw(bond, clock.time()))["bond"] == f"bonded; free {DELAY_S} s after leaving"
        await run.leave(home.account_key)
        assert (await _withdraw(bond, clock.time()))["bond"] == "bonded; wants to leave"
        await anyio.sleep(DELAY_S + 1)
        await _withdraw(bond, clock.time())
        assert (await run.members(account)).status == Status.LEFT
        await anyio.sleep(DELAY_S + 1)
        assert (await _withdraw(bond, clock.time()))["withdrawn"] == STAKE

    run_virtual(main)

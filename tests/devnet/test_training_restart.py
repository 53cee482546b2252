"""Whole workers: from an invitation to claimed income, with one of them killed in the middle and started again.

Real stages, real chain, in-memory links, virtual time. The killed worker comes back with nothing but its state
directory and its invitation; the run must end with the parameters, receipts and shares of an undisturbed one.
"""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
import torch

from tessera.core.errors import Misbehaviour
from tessera.core.ids import RunId
from tessera.p2p.memory import run_virtual
from tessera.training.epochs import compute_epoch
from training_whole import STAGES, STEPS, Outcome, WholeRun, outcome, pay, write_data
from training_world import account_keys, work_of


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("undisturbed")

    async def main() -> Outcome:
        run = WholeRun(write_data(folder), folder)
        async with run.open():
            await run.settled()
            await pay(run)
            return await outcome(run, run.roster)

    return run_virtual(main)


@pytest.mark.slow
def test_an_undisturbed_run_pays_for_every_token(undisturbed: Outcome, tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    accounts = [key.account for key in account_keys(STAGES)]
    work = work_of(accounts, [5 * manifest.schedule.microbatches] * STAGES)
    leaves = [compute_epoch(manifest, e, work) for e in range(3)]
    assert undisturbed.shares == [sum(e.shares_of(account) for e in leaves if e) for account in accounts]
    assert undisturbed.total == sum(e.total for e in leaves if e)
    assert len(undisturbed.receipts) == STEPS * 2 * (STAGES - 1)
    assert sorted(undisturbed.validations) == [0, 5, 10, 15]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_worker_killed_in_the_middle_comes_back_and_nothing_differs(
    stage: int, undisturbed: Outcome, tmp_path: Path
) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            victim = run.workers[stage]
            await run.at_step(12)
            await victim.die()
            await anyio.sleep(30)
            assert not any(report.trained for report in run.reports.values())
            tasks.start_soon(victim.live)
            await run.settled()
            await pay(run)
            assert await outcome(run, run.roster) == undisturbed
            assert run.reports[stage].sessions == 1  # of its second life

    run_virtual(main)


@pytest.mark.slow
def test_whoever_serves_knows_where_a_restarted_worker_is(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            await run.settled()
            await run.workers[2].die()
            before = run.host.roster().records
            tasks.start_soon(run.workers[2].live)
            await anyio.sleep(20)
            assert run.host.roster().records[2] != before[2]
            for worker in run.workers:
                assert worker.seated is not None
                found, expected = (roster.records for roster in (worker.seated.roster, run.host.roster()))
                assert [record.addrs for record in found] == [record.addrs for record in expected]

    run_virtual(main)


@pytest.mark.slow
def test_a_host_that_names_another_contract_is_not_followed(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open():
            await run.at_step(1)
            victim = run.workers[1]
            await victim.die()
            run.host._run_contract = (await run.ledger.deploy_run(run.coin)).address
            with pytest.raises(Misbehaviour, match="do not follow it"):
                await victim.live()

    run_virtual(main)


def test_the_run_is_the_same_for_everybody_who_has_the_same_text(tmp_path: Path) -> None:
    first, second = write_data(tmp_path / "a"), write_data(tmp_path / "b")
    assert first.run_id == second.run_id != RunId("0" * 64)

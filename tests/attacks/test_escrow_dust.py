"""Griefing by dust: tiny payments, tiny jobs and remainders, to stop others or to win by rounding."""

from __future__ import annotations

import pytest

from escrow_world import CLIENT, COMPLETED, DEADLINE, EVALUATOR, EXPIRED, GRACE, PROVIDER, STRANGER, FastEscrow
from fast_evm import Reverted


def test_dust_sent_to_the_escrow_changes_nothing() -> None:
    """No account is computed from the balance: what arrives by itself is nobody's, and stops nobody."""
    world = FastEscrow()
    job = world.submitted(1_000, bond=100)
    world.evm.send(STRANGER.account, world.coin, "mint(address,uint256)", world.escrow, 1)
    world.complete(job)
    assert (world.status(job), world.gains()) == (COMPLETED, (-1_000, 1_000, 0, 1))


def test_a_thousand_jobs_of_others_make_ones_own_no_dearer() -> None:
    world = FastEscrow()
    call = "createJob(address,address,uint256,string)"
    terms = (PROVIDER.account, EVALUATOR.account, DEADLINE, "x")
    world.call(CLIENT, call, *terms)
    alone = world.call(CLIENT, call, *terms).outcome.gas_used
    for _ in range(100):
        world.call(STRANGER, call, *terms)
    assert world.call(CLIENT, call, *terms).outcome.gas_used == alone


@pytest.mark.parametrize("budget", [1, 2, 3, 9_999, 10_001])
@pytest.mark.parametrize("part", [1, 3_333, 5_000, 9_999])
def test_no_unit_is_lost_or_made_by_rounding(budget: int, part: int) -> None:
    world = FastEscrow()
    job = world.submitted(budget, bond=7, on_silence=part)
    world.stay_silent(job)
    client, provider, evaluator, left = world.gains()
    assert (left, evaluator, client + provider) == (0, -7, 7)
    assert provider == budget * part // 10_000 + 7 - 7 * part // 10_000


def test_a_job_of_one_unit_cannot_be_split_against_anybody() -> None:
    """The budget's remainder is the client's, the bond's the provider's."""
    world = FastEscrow()
    job = world.submitted(1, bond=1, on_silence=9_999)
    world.stay_silent(job)
    assert (world.status(job), world.gains()) == (EXPIRED, (0, 1, -1, 0))


def test_a_provider_cannot_hold_the_client_up_by_changing_the_price() -> None:
    """He may make `fund` fail for a while; the client's way out is open all the time, and costs one call."""
    world = FastEscrow()
    job = world.submitted(1_000, bond=50, until=0)
    world.call(PROVIDER, "setBudget(uint256,uint256)", job, 1_001)
    with pytest.raises(Reverted, match="another budget"):
        world.call(CLIENT, "fund(uint256,uint256)", job, 1_000)
    world.call(CLIENT, "reject(uint256,bytes32)", job, bytes(32))
    assert world.gains() == (0, 0, 0, 0)


def test_an_open_job_locks_nobodys_money() -> None:
    """A client who never funds: the evaluator takes his bond back, even after the deadline."""
    world = FastEscrow()
    job = world.submitted(1_000, bond=50, until=0)
    world.evm.now = DEADLINE + GRACE
    world.call(EVALUATOR, "withdrawBond(uint256)", job)
    assert world.gains() == (0, 0, 0, 0)

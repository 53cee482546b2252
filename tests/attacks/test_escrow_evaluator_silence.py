"""Evaluator silence: work is delivered, and who should judge it says nothing.

Known from escrows after ERC-8183's shape: the deadline passes, the client is refunded, and keeps the work. Here the
job's terms say who gets the budget, the evaluator loses a bond, and nobody wins by provoking either.
"""

from __future__ import annotations

import pytest

from escrow_world import CLIENT, COMPLETED, DEADLINE, EVALUATOR, EXPIRED, GRACE, PROVIDER, FastEscrow
from fast_evm import Reverted

BUDGET, BOND = 1_000, 240


def outcomes(on_silence: int) -> dict[str, tuple[int, int, int]]:
    """What client, provider and evaluator gain after submission, by what the evaluator does."""
    found = {}
    world = FastEscrow()
    for judgement in (FastEscrow.complete, FastEscrow.reject, FastEscrow.stay_silent):
        evm = world.evm
        world.evm = evm.fork()
        job = world.submitted(BUDGET, BOND, on_silence)
        judgement(world, job)
        client, provider, evaluator, left = world.gains()
        assert left == 0
        found[judgement.__name__] = (client, provider, evaluator)
        world.evm = evm
    return found


@pytest.mark.parametrize("on_silence", [0, 1, 2_500, 9_999, 10_000])
def test_silence_is_never_worth_more_than_a_judgement(on_silence: int) -> None:
    """Neither to the evaluator alone nor to him and a party: a bribe for silence costs more than it brings."""
    found = outcomes(on_silence)
    complete, reject, silent = found["complete"], found["reject"], found["stay_silent"]
    assert complete == (-BUDGET, BUDGET, 0)
    assert reject == (0, 0, 0)
    assert silent[2] == -BOND
    assert silent[0] + silent[2] <= reject[0] + reject[2]
    assert silent[1] + silent[2] <= complete[1] + complete[2]
    assert sum(silent) == 0


def test_who_is_silent_cannot_speak_when_the_time_is_over() -> None:
    """Else he would wait for the refund in the mempool, and judge a moment before it."""
    world = FastEscrow()
    job = world.submitted(BUDGET, BOND)
    world.evm.now = DEADLINE + GRACE
    for judge in (world.complete, world.reject):
        with pytest.raises(Reverted, match="too late"):
            judge(job)
    world.stay_silent(job)
    assert world.status(job) == EXPIRED


def test_the_client_cannot_end_it_before_the_evaluator_had_his_time() -> None:
    """The standard refunds submitted work at the deadline: a client would see the work, and take it and the money."""
    world = FastEscrow()
    job = world.submitted(BUDGET, BOND, on_silence=0)
    world.evm.now = DEADLINE + GRACE - 1
    with pytest.raises(Reverted, match="not expired"):
        world.call(CLIENT, "claimRefund(uint256)", job)
    world.complete(job)
    assert world.status(job) == COMPLETED


def test_work_handed_in_late_cannot_make_the_evaluator_silent() -> None:
    """He has `grace` for it at least, and nobody hands in after the deadline."""
    world = FastEscrow()
    job = world.submitted(BUDGET, BOND, until=1)
    world.evm.now = DEADLINE
    with pytest.raises(Reverted, match="too late"):
        world.call(PROVIDER, "submit(uint256,bytes32)", job, bytes(32))
    world.evm.now = DEADLINE - 1
    world.call(PROVIDER, "submit(uint256,bytes32)", job, bytes(32))
    world.evm.now = DEADLINE + GRACE - 1
    world.reject(job)
    assert world.gains() == (0, 0, 0, 0)


def test_an_evaluator_without_work_to_judge_loses_nothing() -> None:
    world = FastEscrow()
    job = world.submitted(BUDGET, BOND, on_silence=10_000, until=1)
    world.stay_silent(job)
    assert world.gains() == (0, 0, 0, 0)


def test_nobody_is_made_an_evaluator_with_a_bond_against_his_will() -> None:
    """His allowance is there, but only he posts it; and before the money comes he takes it back."""
    world = FastEscrow()
    call = "createJob(address,address,uint256,string,address,uint256,uint256)"
    terms = (PROVIDER.account, EVALUATOR.account, DEADLINE, "x", "0x" + "00" * 20, 0, BOND)
    world.call(CLIENT, call, *terms)
    world.call(CLIENT, "setBudget(uint256,uint256)", 1, BUDGET)
    for anybody in (CLIENT, PROVIDER):
        with pytest.raises(Reverted, match="not the evaluator"):
            world.call(anybody, "postBond(uint256)", 1)
    with pytest.raises(Reverted, match="no bond here"):
        world.call(CLIENT, "fund(uint256,uint256)", 1, BUDGET)
    assert world.gains() == (0, 0, 0, 0)

"""Hooks that revert, burn gas, re-enter or answer endlessly: a job with money in it goes on as if they were not there.

The standard lets a hook refuse any action before the refund. A client would then mute the evaluator by his own hook,
and be refunded for delivered work, with a part of the bond.
"""

from __future__ import annotations

import pytest

from escrow_world import (
    CLIENT,
    COMPLETED,
    EXPIRED,
    HOOK,
    OPEN,
    PROVIDER,
    REASON,
    REJECTED,
    STRANGER,
    SUBMITTED,
    WORK,
    FastEscrow,
    compiled,
)  # fmt: skip
from fast_evm import Reverted
from tessera.chain.faces import JobEscrow

MOODS = {"reverts": 1, "burns gas": 2, "claims a refund": 3, "completes the job": 4}
BOMB = """
# pragma version 0.4.3
@external
def __default__():
    raw_revert(empty(Bytes[60_000]))
"""


def with_hook(mood: int) -> tuple[FastEscrow, str, int]:
    """A funded job whose hook turns bad."""
    world = FastEscrow()
    hook = world.evm.create(STRANGER.account, compiled(HOOK))
    job = world.submitted(1_000, bond=100, on_silence=5_000, hook=hook, until=1)
    world.evm.send(STRANGER.account, hook, "set_mode(uint256)", mood)
    return world, hook, job


@pytest.mark.parametrize("mood", MOODS.values(), ids=MOODS)
def test_a_bad_hook_stops_no_judgement(mood: int) -> None:
    world, _, job = with_hook(mood)
    sent = world.call(PROVIDER, "submit(uint256,bytes32)", job, WORK)
    assert world.status(job) == SUBMITTED
    failures = [topics for _, topics, _ in sent.outcome.logs if topics[0] == JobEscrow.HookFailed.TOPIC]
    assert len(failures) == 2  # before and after
    begun = world.evm.fork()
    world.complete(job)
    assert (world.status(job), world.gains()) == (COMPLETED, (-1_000, 1_000, 0, 0))
    world.evm = begun
    world.reject(job)
    assert (world.status(job), world.gains()) == (REJECTED, (0, 0, 0, 0))


@pytest.mark.parametrize("mood", MOODS.values(), ids=MOODS)
def test_a_bad_hook_stops_no_refund(mood: int) -> None:
    world, hook, job = with_hook(mood)
    begun = world.evm.fork()
    world.stay_silent(job)
    assert (world.status(job), world.gains()) == (EXPIRED, (0, 0, 0, 0))
    world.evm = begun
    world.call(PROVIDER, "submit(uint256,bytes32)", job, WORK)
    sent = world.stay_silent(job)
    assert (world.status(job), world.gains()) == (EXPIRED, (-450, 550, -100, 0))
    assert sent.outcome.gas_used < 100_000  # it was not even called
    assert all(address != bytes.fromhex(hook[2:]) for address, _, _ in sent.outcome.logs)


def test_a_hook_that_burns_gas_burns_a_known_amount() -> None:
    world, _, job = with_hook(MOODS["burns gas"])
    world.call(PROVIDER, "submit(uint256,bytes32)", job, WORK)
    assert world.complete(job).outcome.gas_used < 100_000 + 2 * 150_000


def test_a_hook_that_answers_endlessly_costs_no_more() -> None:
    """A long answer is paid by whoever copies it: nothing of it is copied."""
    world = FastEscrow()
    hook = world.evm.create(STRANGER.account, compiled(BOMB))
    call = "createJob(address,address,uint256,string,address)"
    job = int.from_bytes(
        world.call(CLIENT, call, PROVIDER.account, STRANGER.account, 2**40 - 1, "x", hook).result, "big"
    )
    with pytest.raises(Reverted, match="hook refused"):
        world.call(CLIENT, "setBudget(uint256,uint256)", job, 5)
    assert world.call(CLIENT, "reject(uint256,bytes32)", job, REASON).outcome.gas_used < 100_000 + 2 * 150_000


def test_an_open_job_is_taken_back_whatever_its_hook_does() -> None:
    for mood in MOODS.values():
        world = FastEscrow()
        hook = world.evm.create(STRANGER.account, compiled(HOOK))
        job = world.submitted(1_000, bond=100, hook=hook, until=OPEN)
        world.evm.send(STRANGER.account, hook, "set_mode(uint256)", mood)
        world.call(CLIENT, "reject(uint256,bytes32)", job, REASON)
        assert (world.status(job), world.gains()) == (REJECTED, (0, 0, 0, 0))

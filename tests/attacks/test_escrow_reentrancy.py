"""A coin that calls its payer, its payee and anybody else back in the middle of a transfer: the escrow's lock holds.

Known from The DAO (2016) and, for coins with callbacks, imBTC and Lendf.Me (2020).
"""

from __future__ import annotations

import pytest

from escrow_world import CLIENT, COMPLETED, EVALUATOR, EXPIRED, FUNDED, REJECTED, STRANGER, FastEscrow
from fast_evm import Reverted, encoded

COIN = """
# pragma version 0.4.3
balanceOf: public(HashMap[address, uint256])
target: address
payload: Bytes[512]
depth: uint256
answers: public(DynArray[bool, 64])

@external
def arm(target: address, payload: Bytes[512]):
    self.target = target
    self.payload = payload

@external
def mint(receiver: address, amount: uint256):
    self.balanceOf[receiver] += amount

@external
def approve(spender: address, amount: uint256) -> bool:
    return True

@internal
def _call_back():
    if self.target != empty(address) and self.depth < 3:
        self.depth += 1
        self.answers.append(raw_call(self.target, self.payload, revert_on_failure=False))
        self.depth -= 1

@external
def transfer(receiver: address, amount: uint256) -> bool:
    self._call_back()
    self.balanceOf[msg.sender] -= amount
    self.balanceOf[receiver] += amount
    self._call_back()
    return True

@external
def transferFrom(owner: address, receiver: address, amount: uint256) -> bool:
    self._call_back()
    self.balanceOf[owner] -= amount
    self.balanceOf[receiver] += amount
    self._call_back()
    return True
"""


@pytest.fixture
def world() -> FastEscrow:
    """With three jobs of others, whose money an attacker would like."""
    world = FastEscrow(COIN)
    for _ in range(3):
        world.submitted()
    return world


def arm(world: FastEscrow, signature: str, *values: object) -> None:
    world.evm.send(STRANGER.account, world.coin, "arm(address,bytes)", world.escrow, encoded(signature, values))


def answers(world: FastEscrow) -> list[int]:
    """How each call back ended: 1 where the escrow let it in."""
    found = []
    for place in range(64):
        try:
            sent = world.evm.send(STRANGER.account, world.coin, "answers(uint256)", place)
        except Reverted:
            break
        found.append(int.from_bytes(sent.result, "big"))
    return found


WAYS_BACK = [
    ("claimRefund(uint256)", (1,)),
    ("claimRefund(uint256)", (4,)),
    ("complete(uint256,bytes32)", (4, bytes(32))),
    ("reject(uint256,bytes32)", (4, bytes(32))),
    ("fund(uint256,uint256)", (4, 1_000)),
    ("withdraw(address)", (CLIENT.account,)),
    ("createJob(address,address,uint256,string)", (CLIENT.account, EVALUATOR.account, 2**40 - 1, "x")),
]


@pytest.mark.parametrize("way", WAYS_BACK, ids=[f"{call.split('(')[0]} {values[0]}" for call, values in WAYS_BACK])
def test_no_way_leads_back_in(world: FastEscrow, way: tuple[str, tuple[object, ...]]) -> None:
    """In each of the transfers: paying in, paying out, refunding, and after silence."""
    for last, status in ((world.complete, COMPLETED), (world.reject, REJECTED), (world.stay_silent, EXPIRED)):
        begun, before = world.evm.fork(), world.gains()
        arm(world, way[0], *way[1])
        job = world.submitted(bond=100)
        last(job)
        after = world.gains()
        assert world.status(job) == status
        assert after[3] == before[3] == 3_000
        assert sum(after) == sum(before)
        assert answers(world)
        assert not any(answers(world))
        world.evm = begun


def test_a_coin_that_reads_the_job_reads_it_whole(world: FastEscrow) -> None:
    """The view is open, to hooks above all: the status has moved before the money does."""
    job = world.submitted(until=0)
    arm(world, "jobs(uint256)", job)
    world.call(CLIENT, "fund(uint256,uint256)", job, 1_000)
    assert answers(world) == [1, 1]
    assert world.status(job) == FUNDED

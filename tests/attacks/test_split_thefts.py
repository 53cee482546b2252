"""Taking more from a split of income than one has a part in: a minority, foreign consent, a coin that calls back.

The last is known from The DAO (2016): whoever pays before it books is asked again while it pays.
"""

from __future__ import annotations

import pytest

from chain_support import CHAIN_ID, RUN_ID, TERMS, WORKERS, key, peer_of
from contract_vm import Deployed, Vm
from split_world import WORKERS_BPS, Splitting, make_split, splitting_world
from tessera.chain.consent import TallyConsent
from tessera.core.errors import Conflict, Invalid, Refused
from tessera.core.merkle import share_leaf

ATTACKER = key("attacker")
EVIL_COIN = """
# pragma version 0.4.3
balanceOf: public(HashMap[address, uint256])
target: address
data: Bytes[2048]
answered: public(uint256)

@external
def arm(target: address, data: Bytes[2048]):
    self.target = target
    self.data = data

@external
def mint(receiver: address, amount: uint256):
    self.balanceOf[receiver] += amount

@external
def transfer(receiver: address, amount: uint256) -> bool:
    self._call_back()
    self.balanceOf[msg.sender] -= amount
    self.balanceOf[receiver] += amount
    self._call_back()
    return True

@internal
def _call_back():
    if self.target != empty(address) and raw_call(self.target, self.data, revert_on_failure=False):
        self.answered += 1
"""


@pytest.fixture
async def s() -> Splitting:
    s = await splitting_world()
    await s.earn(10_000)
    return s


@pytest.mark.anyio
async def test_a_minority_gives_itself_nothing(s: Splitting) -> None:
    two = WORKERS[:2]
    for signers, reason in ((two, "too few signatures"), ([*two, ATTACKER], "not a worker's signature")):
        with pytest.raises((Refused, Invalid), match=reason):
            await s.propose({ATTACKER.account: 3_000}, signers)
    with pytest.raises(Conflict, match="not the waiting tally"):
        await s.split.post(ATTACKER, 0, bytes(32), 3_000, 0)
    with pytest.raises(Invalid, match="bad proof"):
        await s.split.claim(ATTACKER, 0, ATTACKER.account, 3_000, [])


@pytest.mark.anyio
async def test_all_workers_together_cannot_touch_what_the_shares_own_or_an_earlier_tally_gave(s: Splitting) -> None:
    earlier = await s.tally({WORKERS[0].account: 3_000})
    for amount in (1, 7_000):
        with pytest.raises(Refused, match="more than the workers' part"):
            await s.propose({ATTACKER.account: amount})
    await s.split.claim(ATTACKER, *earlier.claim(WORKERS[0].account))
    assert await s.world.coin.balanceOf(s.world.share.address) == 7_000


@pytest.mark.anyio
async def test_a_tally_signed_for_one_split_moves_nothing_in_another_of_the_same_run(s: Splitting) -> None:
    other = await make_split(s.world)
    await other.earn(10_000)
    root = share_leaf(0, ATTACKER.account, 100)
    signatures = [k.sign_digest(s.consent.tally(0, 0, root, 100)) for k in WORKERS]
    with pytest.raises(Invalid, match="not a worker's signature"):
        await other.split.propose(ATTACKER, 0, root, 100, signatures)
    await s.split.propose(ATTACKER, 0, root, 100, signatures)


@pytest.mark.parametrize("again", ["claim", "distribute"])
def test_a_coin_that_calls_back_while_it_pays_gets_nothing_twice(again: str) -> None:
    vm, run_id = Vm(), bytes.fromhex(RUN_ID)
    coin = Deployed.of_source(vm, "evil_split_coin", EVIL_COIN)
    run = Deployed.new(vm, "run", coin.address, run_id, TERMS._replace(stages=1, stake=0, invited=True))
    share = Deployed.new(vm, "model_share", "M", "M", coin.address, run_id, run.address)
    split = Deployed.new(vm, "income_split", coin.address, WORKERS_BPS)
    worker = WORKERS[0]
    run("bond", worker.account, peer_of(worker), 0, 0, 27, bytes(32), bytes(32))
    run("draw", worker.account)
    run("begin", share.address, [worker.account])
    split("begin", run.address)
    coin("mint", split.address, 10_000)
    claim = (0, worker.account, 1_000, [])
    calls = {"claim": split.data("claim", *claim), "distribute": split.data("distribute")}
    if again == "distribute":
        coin("arm", split.address, calls[again])
    assert split("distribute") == 10_000
    root = share_leaf(0, worker.account, 1_000)
    consent = TallyConsent(CHAIN_ID, split.address, RUN_ID)
    split("propose", 0, root, 1_000, [worker.sign_digest(consent.tally(0, 0, root, 1_000))])
    split("post", 0, root, 1_000, vm.timestamp)
    coin("arm", split.address, calls[again])
    assert split("claim", *claim) == 1_000
    assert coin("answered") == 0
    assert (coin("balanceOf", worker.account), coin("balanceOf", share.address)) == (1_000, 7_000)
    assert coin("balanceOf", split.address) == 2_000

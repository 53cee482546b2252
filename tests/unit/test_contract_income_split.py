"""The split of income as it ships, on a chain: how it divides, whom it pays, and everything it refuses."""

from __future__ import annotations

import pytest
from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from chain_support import CHAIN_ID, RUN_ID, TERMS, WORKERS, ascending, key, local_world
from contract_vm import Deployed, Reverted, Vm
from split_world import EVIDENCE, SLOW, WINDOW_S, WORKERS_BPS, Splitting, splitting_world
from tessera.chain.face import decode_events
from tessera.chain.faces import IncomeSplit, Run
from tessera.core.errors import Conflict, Invalid, Refused
from tessera.core.ids import RunId
from tessera.core.merkle import MerkleTree, share_leaf

pytestmark = pytest.mark.anyio
A, B, C, D = (worker.account for worker in WORKERS)
STRANGER, ROOT_32 = key("stranger"), b"\x07" * 32


@pytest.fixture
async def s() -> Splitting:
    return await splitting_world()


# --- the division -----------------------------------------------------------------------------------------------------


async def test_income_is_divided_between_workers_and_shares(s: Splitting) -> None:
    await s.world.coin.mint(WORKERS[0], s.split.address, 10_001)
    assert await s.split.undistributed() == 10_001
    receipt = await s.split.distribute(STRANGER)
    (told,) = decode_events(IncomeSplit.Distributed, s.split.address, receipt)
    assert (told.income, told.to_shares) == (10_001, 7_001)  # the workers' part is rounded down
    assert await s.world.coin.balanceOf(s.world.share.address) == 7_001
    assert (await s.split.unassigned(), await s.split.undistributed()) == (3_000, 0)


async def test_what_the_shares_get_is_income_of_their_holders(s: Splitting) -> None:
    await s.world.give({STRANGER.account: 10})
    await s.earn(10_000)
    await s.world.share.distribute(WORKERS[0])
    assert await s.world.share.claimable(STRANGER.account) == 7_000


async def test_single_units_are_divided_like_one_sum(s: Splitting) -> None:
    for _ in range(20):
        await s.earn(1)
    assert await s.split.unassigned() == 20 * WORKERS_BPS // 10_000
    assert await s.world.coin.balanceOf(s.world.share.address) == 20 - 20 * WORKERS_BPS // 10_000


async def test_before_the_run_is_named_the_money_waits() -> None:
    world = await local_world(SLOW)
    split = await IncomeSplit.deploy(world.chain, WORKERS[0], world.coin.address, WORKERS_BPS)
    await world.coin.mint(WORKERS[0], split.address, 1_000)
    await split.distribute(WORKERS[0])
    with pytest.raises(Refused, match="income_split: has not begun"):
        await split.propose(WORKERS[0], 0, ROOT_32, 1, [])
    await split.begin(WORKERS[0], world.run.address)
    await split.distribute(WORKERS[0])
    assert await split.unassigned() == 300


async def test_a_run_is_named_once_by_the_creator_when_it_has_begun(s: Splitting) -> None:
    world, creator = s.world, WORKERS[0]
    with pytest.raises(Refused, match="income_split: not the creator"):
        await s.split.begin(WORKERS[1], world.run.address)
    with pytest.raises(Conflict, match="income_split: has begun"):
        await s.split.begin(creator, world.run.address)
    fresh = await IncomeSplit.deploy(world.chain, creator, world.coin.address, 1)
    unbegun = await Run.deploy(world.chain, creator, world.coin.address, bytes.fromhex(RUN_ID), TERMS)
    with pytest.raises(Refused, match="income_split: the run has not begun"):
        await fresh.begin(creator, unbegun.address)
    foreign = await IncomeSplit.deploy(world.chain, creator, world.share.address, 1)
    with pytest.raises(Invalid, match="income_split: a run in another asset"):
        await foreign.begin(creator, world.run.address)
    assert (await s.split.run(), await s.split.share()) == (world.run.address, world.share.address)
    assert ((await s.split.run_id()).hex(), await s.split.window_s()) == (RUN_ID, WINDOW_S)


async def test_both_have_a_part_and_the_asset_is_a_contract(s: Splitting) -> None:
    for bps in (0, 10_000):
        with pytest.raises(Invalid, match="income_split: bad part"):
            await IncomeSplit.deploy(s.world.chain, WORKERS[0], s.world.coin.address, bps)
    with pytest.raises(Invalid, match="income_split: asset is no contract"):
        await IncomeSplit.deploy(s.world.chain, WORKERS[0], STRANGER.account, 1)


async def test_more_income_than_can_be_counted_is_refused(s: Splitting) -> None:
    await s.earn(1)
    await s.world.coin.mint(WORKERS[0], s.split.address, 2**128 - 1)
    with pytest.raises(Refused, match="income_split: too much income"):
        await s.split.distribute(WORKERS[0])


# --- tallies ----------------------------------------------------------------------------------------------------------


async def test_a_tally_pays_each_worker_once_whoever_sends_it(s: Splitting) -> None:
    await s.earn(10_000)
    tally = await s.tally({A: 1_000, B: 1_500})
    receipt = await s.split.claim(STRANGER, *tally.claim(B))
    (told,) = decode_events(IncomeSplit.Claimed, s.split.address, receipt)
    assert (told.tally, told.worker, told.amount) == (0, B, 1_500)
    assert await s.world.coin.balanceOf(B) == 1_500
    with pytest.raises(Conflict, match="income_split: already paid"):
        await s.split.claim(STRANGER, *tally.claim(B))
    assert (await s.split.tallies(0)).unclaimed == 1_000
    assert await s.split.unassigned() == 500


async def test_what_is_unclaimed_stays_claimable_whatever_comes_later(s: Splitting) -> None:
    await s.earn(10_000)
    first = await s.tally({A: 1_000, B: 2_000})
    await s.earn(10_000)
    second = await s.tally({A: 3_000})
    await s.split.claim(STRANGER, *second.claim(A))
    await s.split.claim(STRANGER, *first.claim(B))
    await s.split.claim(STRANGER, *first.claim(A))
    assert await s.world.coin.balanceOf(A) == 4_000
    assert await s.world.coin.balanceOf(s.split.address) == await s.split.unassigned() == 0


async def test_a_tally_takes_more_than_two_thirds_of_the_workers(s: Splitting) -> None:
    await s.earn(10_000)
    with pytest.raises(Refused, match="income_split: too few signatures"):
        await s.propose({A: 5}, WORKERS[:2])
    await s.world.change(leaver=D)
    with pytest.raises(Refused, match="income_split: too few signatures"):
        await s.propose({A: 5}, WORKERS[:2])  # exactly two thirds
    with pytest.raises(Invalid, match="income_split: not a worker's signature"):
        await s.propose({A: 5}, WORKERS)  # of whom one has left
    tally = await s.propose({A: 5}, WORKERS[:3])
    (told,) = decode_events(IncomeSplit.Proposed, s.split.address, tally.receipt)
    assert (told.tally, told.attempt, told.amount, told.signers) == (0, 0, 5, 3)


async def test_one_worker_cannot_count_twice_and_signers_ascend(s: Splitting) -> None:
    await s.earn(10_000)
    good = [k.sign_digest(s.consent.tally(0, 0, ROOT_32, 5)) for k in WORKERS]
    for signatures in ([good[0], good[1], good[1]], [*reversed(good)]):
        with pytest.raises(Invalid, match="income_split: signers not ascending"):
            await s.split.propose(STRANGER, 0, ROOT_32, 5, signatures)


async def test_no_tally_gives_out_more_than_the_workers_part(s: Splitting) -> None:
    await s.earn(10_000)
    for amount in (0, 3_001, 2**256 - 1):
        signatures = [k.sign_digest(s.consent.tally(0, 0, ROOT_32, amount)) for k in WORKERS]
        with pytest.raises(Refused, match="income_split: more than the workers' part"):
            await s.split.propose(STRANGER, 0, ROOT_32, amount, signatures)
    await s.tally({A: 2_999})
    with pytest.raises(Refused, match="income_split: more than the workers' part"):
        await s.propose({A: 2})


async def test_a_root_whose_leaves_are_more_than_its_amount_pays_its_amount_at_most(s: Splitting) -> None:
    await s.earn(10_000)
    tree = MerkleTree([share_leaf(0, A, 600), share_leaf(0, B, 600)])
    signatures = [k.sign_digest(s.consent.tally(0, 0, tree.root, 1_000)) for k in ascending(WORKERS)]
    receipt = await s.split.propose(STRANGER, 0, tree.root, 1_000, signatures)
    (told,) = decode_events(IncomeSplit.Proposed, s.split.address, receipt)
    await s.world.wait(WINDOW_S)
    await s.split.post(STRANGER, 0, tree.root, 1_000, told.opens_at)
    await s.split.claim(STRANGER, 0, A, 600, tree.proof(0))
    with pytest.raises(Refused, match="income_split: tally exhausted"):
        await s.split.claim(STRANGER, 0, B, 600, tree.proof(1))


async def test_tallies_come_once_each_in_order_and_one_at_a_time(s: Splitting) -> None:
    await s.earn(10_000)
    for number in (1, 2**256 - 1):
        signatures = [k.sign_digest(s.consent.tally(number, 0, ROOT_32, 5)) for k in WORKERS]
        with pytest.raises(Conflict, match="income_split: not the next tally"):
            await s.split.propose(STRANGER, number, ROOT_32, 5, signatures)
    waiting = await s.propose({A: 5})
    assert await s.split.pending() != bytes(32)
    with pytest.raises(Conflict, match="income_split: a tally is waiting"):
        await s.propose({A: 6})
    await s.world.wait(WINDOW_S)
    await s.split.post(STRANGER, *waiting.fields)
    assert await s.split.pending() == bytes(32)
    with pytest.raises(Conflict, match="income_split: not the waiting tally"):
        await s.split.post(STRANGER, *waiting.fields)


async def test_nothing_is_paid_before_the_window_is_over(s: Splitting) -> None:
    await s.earn(10_000)
    tally = await s.propose({A: 5})
    with pytest.raises(Refused, match="income_split: challenge window is open"):
        await s.split.post(STRANGER, *tally.fields)
    with pytest.raises(Invalid, match="income_split: bad proof"):
        await s.split.claim(STRANGER, *tally.claim(A))
    await s.world.wait(WINDOW_S)
    with pytest.raises(Refused, match="income_split: challenge window is over"):
        await s.strike(tally, WORKERS)
    await s.split.post(STRANGER, *tally.fields)
    await s.split.claim(STRANGER, *tally.claim(A))


async def test_a_third_strikes_a_tally_and_its_signatures_serve_no_more(s: Splitting) -> None:
    await s.earn(10_000)
    tally = await s.propose({A: 5})
    signatures = [k.sign_digest(s.consent.tally(0, 0, tally.fields[1], 5)) for k in WORKERS]
    with pytest.raises(Refused, match="income_split: too few signatures"):
        await s.strike(tally, WORKERS[:1])
    with pytest.raises(Refused, match="income_split: too few signatures"):
        await s.strike(tally, [])
    await s.strike(tally, WORKERS[:2])
    assert await s.split.attempt() == 1
    await s.world.wait(WINDOW_S)
    with pytest.raises(Conflict, match="income_split: not the waiting tally"):
        await s.split.post(STRANGER, *tally.fields)
    with pytest.raises(Invalid, match="income_split: not a worker's signature"):
        await s.split.propose(STRANGER, 0, tally.fields[1], 5, signatures)
    await s.tally({A: 5})


@pytest.mark.parametrize("change", ["tally", "worker", "amount", "proof", "no tally"])
async def test_only_what_was_posted_is_paid(s: Splitting, change: str) -> None:
    await s.earn(10_000)
    tally = await s.tally({A: 10, B: 30})
    await s.tally({A: 11, B: 30})
    number, worker, amount, proof = tally.claim(A)
    with pytest.raises(Invalid, match="income_split: bad proof"):
        await s.split.claim(
            STRANGER,
            {"tally": 1, "no tally": 9}.get(change, number),
            STRANGER.account if change == "worker" else worker,
            40 if change == "amount" else amount,
            [] if change == "proof" else proof,
        )


async def test_nobody_and_the_split_itself_are_no_workers(s: Splitting) -> None:
    for worker in ("0x" + "00" * 20, s.split.address):
        with pytest.raises(Invalid, match="income_split: bad worker"):
            await s.split.claim(STRANGER, 0, worker, 5, [])


async def test_a_signature_for_anything_else_does_not_count(s: Splitting) -> None:
    await s.earn(10_000)
    here = s.consent
    for other in (
        type(here)(CHAIN_ID + 1, here.split, RUN_ID),
        type(here)(CHAIN_ID, s.world.run.address, RUN_ID),
        type(here)(CHAIN_ID, here.split, RunId("66" * 32)),
    ):
        signatures = [k.sign_digest(other.tally(0, 0, ROOT_32, 5)) for k in WORKERS]
        with pytest.raises(Invalid, match="income_split: not a worker's signature"):
            await s.split.propose(STRANGER, 0, ROOT_32, 5, signatures)


async def test_the_digests_are_what_eip_712_says(s: Splitting) -> None:
    run_id = bytes.fromhex(RUN_ID)
    domain = {"name": "Tessera income split", "version": "1", "chainId": CHAIN_ID, "verifyingContract": s.split.address}
    for kind, values, ours, theirs in (
        ("Tally", {"tally": 3, "attempt": 2, "root": ROOT_32, "amount": 99},
         s.consent.tally(3, 2, ROOT_32, 99), s.split.tally_digest(3, 2, ROOT_32, 99)),
        ("Strike", {"tally": 3, "attempt": 2, "evidence": EVIDENCE},
         s.consent.strike(3, 2, EVIDENCE), s.split.strike_digest(3, 2, EVIDENCE)),
    ):  # fmt: skip
        message = {"runId": run_id, **values}
        words = {"runId": "bytes32", "root": "bytes32", "evidence": "bytes32"}
        fields = [{"name": name, "type": words.get(name, "uint256")} for name in message]
        signed = EthAccount.sign_message(encode_typed_data(domain, {kind: fields}, message), WORKERS[0].secret)
        assert bytes(signed.message_hash) == ours == await theirs, kind


async def test_a_coin_that_fails_to_pay_reverts_the_division() -> None:
    """And nothing is booked: an asset that answers false has paid nobody."""
    vm = Vm()
    coin = Deployed.of_source(vm, "broke_coin", BROKE_COIN)
    split = Deployed.new(vm, "income_split", coin.address, WORKERS_BPS)
    split("begin", coin.address)  # the coin answers what a run would
    with pytest.raises(Reverted, match="income_split: transfer failed"):
        split("distribute")
    assert split.read("received") == 0


BROKE_COIN = """
# pragma version 0.4.3
struct Terms:
    a: uint256
    b: uint256
    c: uint256
    d: uint256
    e: uint256
    f: uint256
    g: uint256
    h: uint256
    i: uint256
    j: bool

@external
@view
def balanceOf(account: address) -> uint256:
    return 1_000

@external
def transfer(receiver: address, amount: uint256) -> bool:
    return False

@external
@view
def asset() -> address:
    return self

@external
@view
def share() -> address:
    return self

@external
@view
def run_id() -> bytes32:
    return empty(bytes32)

@external
@view
def terms() -> Terms:
    return empty(Terms)
"""

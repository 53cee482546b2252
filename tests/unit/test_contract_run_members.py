"""Workers of a run come and go: who may, what they risk, where they are put, and what they get back."""

from __future__ import annotations

from collections import Counter

import pytest
from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from chain_support import (
    CHAIN_ID,
    RUN_ID,
    TERMS,
    WORKERS,
    QuickChain,
    World,
    in_one_transaction,
    key,
    local_world,
    make_world,
    memory_chain,
    peer_of,
    split,
)  # fmt: skip
from tessera.chain import abi
from tessera.chain.consent import NOBODY
from tessera.chain.face import decode_events
from tessera.chain.faces import Coin, ModelShare, Run
from tessera.core.errors import Conflict, Invalid, PaymentRequired, Refused
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
JOINER, STRANGER = key("joiner"), key("stranger")
LEAVER = WORKERS[1]
HOUR = 3_600
MAX_WORKERS = 128
BOND = keccak(b"bond(address,bytes32,uint256,uint256,uint8,bytes32,bytes32)")[:4]
DRAW = keccak(b"draw(address)")[:4]
BONDED, DRAWN, WORKER, LEAVING, LEFT, WITHDRAWN = (2**i for i in range(6))


@pytest.fixture
async def world() -> World:
    return await local_world()


async def status(world: World, who: AccountKey) -> int:
    return (await world.run.members(who.account)).status


async def present(world: World) -> set[Account]:
    return {await world.run.workers(i) for i in range(await world.run.worker_count())}


async def served(world: World, stages: int = 2) -> list[int]:
    return [await world.run.served(stage) for stage in range(stages)]


async def before_beginning(terms: Run.Term = TERMS) -> World:
    """A run that nobody has begun."""
    chain = memory_chain()
    client = QuickChain(chain.client().rpc)
    coin = await Coin.deploy(client, WORKERS[0])
    run = await Run.deploy(client, WORKERS[0], coin.address, bytes.fromhex(RUN_ID), terms)
    share = await ModelShare.deploy(client, WORKERS[0], "M", "M", coin.address, bytes.fromhex(RUN_ID), run.address)
    return World(client, coin, run, share, chain)


# --- terms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stages": 0}, "bad stages"),
        ({"stages": 129}, "bad stages"),
        ({"most": 0}, "bad stages"),
        ({"window_s": HOUR}, "bonds must outlast the challenge window"),
        ({"delay_s": 365 * 86_400 + 1}, "delay above a year"),
        ({"reward_bps": 5_001}, "reward above half"),
        ({"early_bps": 9_999}, "bad early weight"),
        ({"early_bps": 1_000_001}, "bad early weight"),
        ({"epochs": 0}, "bad schedule"),
        ({"epochs": 2**24 + 1}, "bad schedule"),
        ({"epoch_shares": 2**96 + 1}, "bad schedule"),
        ({"stake": 0}, "open to all without a stake"),
    ],
)
async def test_terms_under_which_a_run_cannot_work_are_refused(
    change: dict[str, int], reason: str, world: World
) -> None:
    with pytest.raises(Invalid, match=reason):
        await Run.deploy(world.chain, WORKERS[0], world.coin.address, bytes(32), TERMS._replace(**change))


async def test_the_asset_must_be_a_contract(world: World) -> None:
    with pytest.raises(Invalid, match="run: asset is no contract"):
        await Run.deploy(world.chain, WORKERS[0], STRANGER.account, bytes(32), TERMS)


async def test_the_contract_says_what_it_is(world: World) -> None:
    assert await world.run.asset() == world.coin.address
    assert await world.run.run_id() == bytes.fromhex(RUN_ID)
    assert await world.run.creator() == WORKERS[0].account
    assert await world.run.terms() == TERMS
    assert await world.run.share() == world.share.address
    domain = encode_typed_data(
        {"name": "Tessera run", "version": "1", "chainId": CHAIN_ID, "verifyingContract": world.run.address},
        {"Nothing": []},
        {},
    ).header
    assert await world.run.DOMAIN_SEPARATOR() == domain


# --- bonding ----------------------------------------------------------------------------------------------------------


async def test_a_bond_comes_by_the_workers_signature_and_makes_a_candidate(world: World) -> None:
    bonded = await world.run.bonded()
    receipt = await world.bond(JOINER, sender=STRANGER)
    (event,) = decode_events(Run.Bonded, world.run.address, receipt)
    assert (event.account, event.peer, event.amount) == (JOINER.account, peer_of(JOINER), TERMS.stake)
    member = await world.run.members(JOINER.account)
    assert (member.status, member.peer, member.bond) == (BONDED, peer_of(JOINER), TERMS.stake)
    assert await world.run.bonded() == bonded + TERMS.stake == await world.coin.balanceOf(world.run.address)
    assert await world.coin.balanceOf(JOINER.account) == 0
    assert not await world.run.is_worker(JOINER.account)


async def test_the_bonds_nonce_is_computed_alike_here_and_there(world: World) -> None:
    nonce = (await world.consent()).bond_nonce(JOINER.account, peer_of(JOINER))
    assert nonce == await world.run.bond_nonce(JOINER.account, peer_of(JOINER))


async def test_who_has_not_the_money_is_no_candidate(world: World) -> None:
    v, r, s = 27, bytes(32), bytes(32)
    with pytest.raises(Invalid, match="coin: invalid signature"):
        await world.run.bond(JOINER, JOINER.account, peer_of(JOINER), 0, 2**40, v, r, s)
    signature = await world.authorization(JOINER, peer_of(JOINER), TERMS.stake)
    with pytest.raises(PaymentRequired):
        await world.run.bond(
            JOINER, JOINER.account, peer_of(JOINER), 0, 2**40, signature[64], signature[:32], signature[32:64]
        )
    assert await status(world, JOINER) == 0


async def test_an_account_has_one_seat_ever(world: World) -> None:
    await world.bond(JOINER)
    for somebody in (JOINER, WORKERS[2]):
        with pytest.raises(Conflict, match="account had a seat"):
            await world.bond(somebody, peer=b"\1" * 32)
    await world.change(leaver=LEAVER.account)
    with pytest.raises(Conflict, match="account had a seat"):
        await world.bond(LEAVER, peer=b"\1" * 32)
    with pytest.raises(Conflict, match="account had a seat"):
        await world.run.bond(STRANGER, NOBODY, b"\1" * 32, 0, 2**40, 27, bytes(32), bytes(32))


async def test_a_peer_has_one_seat_ever(world: World) -> None:
    for peer in (peer_of(WORKERS[2]), bytes(32)):
        with pytest.raises(Conflict, match="peer had a seat"):
            await world.bond(JOINER, peer=peer)
    await world.change(leaver=LEAVER.account)
    with pytest.raises(Conflict, match="peer had a seat"):
        await world.bond(JOINER, peer=peer_of(LEAVER))


async def test_only_the_creator_brings_candidates_to_an_invited_run() -> None:
    world = await before_beginning(TERMS._replace(invited=True))
    with pytest.raises(Refused, match="only by invitation"):
        await world.bond(JOINER, sender=JOINER)
    await world.bond(JOINER, sender=WORKERS[0])
    assert await status(world, JOINER) == BONDED


async def test_a_run_without_a_stake_is_by_invitation_and_moves_no_money() -> None:
    world = await make_world(memory_chain().client(), terms=TERMS._replace(stake=0, invited=True))
    assert await world.run.bonded() == 0
    await world.change(leaver=LEAVER.account)
    await world.wait(TERMS.delay_s)
    await world.run.withdraw(STRANGER, LEAVER.account)
    assert await status(world, LEAVER) == WITHDRAWN


async def test_an_asset_that_takes_the_call_and_pays_nothing_bonds_nobody() -> None:
    """A wrapped coin whose fallback answers every call, for one: it has no EIP-3009 and does not say so."""
    chain = memory_chain().client()
    phantom = (
        await chain.send(WORKERS[0], None, bytes.fromhex("600d380380600d6000396000f3" + "60005f5260205ff3"))
    ).contract
    assert phantom
    run = await Run.deploy(chain, WORKERS[0], phantom, bytes.fromhex(RUN_ID), TERMS)
    with pytest.raises(Invalid, match="stake did not arrive"):
        await run.bond(WORKERS[0], JOINER.account, peer_of(JOINER), 0, 2**40, 27, bytes(32), bytes(32))


# --- the draw ---------------------------------------------------------------------------------------------------------


async def test_a_candidate_is_drawn_once_to_a_least_served_stage(world: World) -> None:
    await world.change(leaver=LEAVER.account)
    left = (await world.run.members(LEAVER.account)).stage
    assert await world.candidate(JOINER) == left
    assert await served(world) == [2, 2]
    assert await status(world, JOINER) == DRAWN
    with pytest.raises(Invalid, match="no candidate without a stage"):
        await world.run.draw(STRANGER, JOINER.account)


async def test_only_a_candidate_is_drawn(world: World) -> None:
    with pytest.raises(Invalid, match="no candidate without a stage"):
        await world.run.draw(STRANGER, JOINER.account)


async def test_the_draw_reaches_every_stage() -> None:
    world = await before_beginning(TERMS._replace(stages=4))
    drawn = [await world.candidate(key(f"candidate {i}")) for i in range(12)]
    assert all(Counter(drawn[i : i + 4]) == dict.fromkeys(range(4), 1) for i in (0, 4, 8))
    assert len({tuple(drawn[i : i + 4]) for i in (0, 4, 8)}) > 1  # no fixed order
    with pytest.raises(Refused, match="every stage is full"):
        await world.candidate(key("one too many"))


async def test_the_block_of_the_bond_cannot_draw(world: World) -> None:
    """Its hash is not known before it is made."""
    await world.coin.mint(JOINER, JOINER.account, TERMS.stake)
    v, r, s = split(await world.authorization(JOINER, peer_of(JOINER), TERMS.stake))
    bond = abi.encode(
        ("address", "bytes32", "uint256", "uint256", "uint8", "bytes32", "bytes32"),
        (JOINER.account, peer_of(JOINER), 0, 2**40, v, r, s),
    )
    calls = [BOND + bond, DRAW + abi.encode(("address",), (JOINER.account,))]
    with pytest.raises(Refused, match="too early to draw"):
        await in_one_transaction(world.chain, JOINER, [(world.run.address, call) for call in calls])
    await in_one_transaction(world.chain, JOINER, [(world.run.address, calls[0])])
    await in_one_transaction(world.chain, JOINER, [(world.run.address, calls[1])])
    assert await status(world, JOINER) == DRAWN


async def test_a_beacon_out_of_reach_is_replaced(world: World) -> None:
    await world.bond(JOINER)
    beacon = (await world.run.members(JOINER.account)).beacon
    assert world.local
    for _ in range(256):
        world.local.mine()
    receipt = await world.run.draw(STRANGER, JOINER.account)
    assert await status(world, JOINER) == BONDED
    assert (await world.run.members(JOINER.account)).beacon == receipt.block_number > beacon + 256
    await world.run.draw(STRANGER, JOINER.account)
    assert await status(world, JOINER) == DRAWN


async def test_the_oldest_beacon_within_reach_draws(world: World) -> None:
    await world.bond(JOINER)
    assert world.local
    for _ in range(255):
        world.local.mine()
    await world.run.draw(STRANGER, JOINER.account)
    assert await status(world, JOINER) == DRAWN


# --- beginning --------------------------------------------------------------------------------------------------------


async def test_only_the_creator_begins_and_only_once() -> None:
    world = await before_beginning()
    stages = [await world.candidate(founder) for founder in WORKERS[:2]]
    assert sorted(stages) == [0, 1]
    founders = [founder.account for founder in WORKERS[:2]]
    with pytest.raises(Refused, match="not the creator"):
        await world.run.begin(STRANGER, world.share.address, founders)
    receipt = await world.run.begin(WORKERS[0], world.share.address, founders)
    (event,) = decode_events(Run.Began, world.run.address, receipt)
    assert (event.share, event.workers) == (world.share.address, 2)
    assert await present(world) == set(founders)
    with pytest.raises(Conflict, match="has begun"):
        await world.run.begin(WORKERS[0], world.share.address, founders)


async def test_founders_are_candidates_each_once_and_serve_every_stage() -> None:
    world = await before_beginning()
    founders = [founder.account for founder in WORKERS[:2]]
    with pytest.raises(Invalid, match="no candidate with a stage"):
        await world.run.begin(WORKERS[0], world.share.address, founders)
    await world.candidate(WORKERS[0])
    for some in ([], founders[:1]):
        with pytest.raises(Invalid, match="a stage without a worker"):
            await world.run.begin(WORKERS[0], world.share.address, some)
    await world.candidate(WORKERS[1])
    with pytest.raises(Invalid, match="no candidate with a stage"):
        await world.run.begin(WORKERS[0], world.share.address, [*founders, founders[0]])
    await world.run.begin(WORKERS[0], world.share.address, founders)


async def test_the_share_is_this_runs_own_and_earns_in_its_asset() -> None:
    world = await before_beginning()
    other_coin = await Coin.deploy(world.chain, WORKERS[0])
    other_run = await Run.deploy(world.chain, WORKERS[0], world.coin.address, bytes.fromhex(RUN_ID), TERMS)
    for coin, run_id, issuer, reason in (
        (world.coin, RUN_ID, other_run, "another contract issues that share"),
        (world.coin, "66" * 32, world.run, "a share of another run"),
        (other_coin, RUN_ID, world.run, "a share that earns in another asset"),
    ):
        share = await ModelShare.deploy(
            world.chain, WORKERS[0], "M", "M", coin.address, bytes.fromhex(run_id), issuer.address
        )
        with pytest.raises(Invalid, match=reason):
            await world.run.begin(WORKERS[0], share.address, [])


# --- joining and leaving by consent -----------------------------------------------------------------------------------


async def test_who_joins_signs_from_then_on_and_counts(world: World) -> None:
    await world.candidate(JOINER)
    receipt = await world.change(joiner=JOINER.account, signers=WORKERS[:3])
    (event,) = decode_events(Run.Changed, world.run.address, receipt)
    assert (event.number, event.joiner, event.leaver) == (0, JOINER.account, NOBODY)
    assert await present(world) == {*(k.account for k in WORKERS), JOINER.account}
    assert await world.run.peers(peer_of(JOINER)) == JOINER.account
    with pytest.raises(Refused, match="too few signatures"):  # three of five are not more than two thirds
        await world.propose({STRANGER.account: 5}, WORKERS[:3])
    await world.propose({STRANGER.account: 5}, [*WORKERS[:3], JOINER])


async def test_who_leaves_signs_no_more_and_counts_no_more(world: World) -> None:
    await world.change(leaver=LEAVER.account, signers=WORKERS[:3])
    assert await present(world) == {k.account for k in WORKERS if k is not LEAVER}
    assert not await world.run.is_worker(LEAVER.account)
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.propose({STRANGER.account: 5}, WORKERS[:3])
    with pytest.raises(Refused, match="too few signatures"):
        await world.propose({STRANGER.account: 5}, WORKERS[2:])
    await world.propose({STRANGER.account: 5}, [WORKERS[0], *WORKERS[2:]])


@pytest.mark.parametrize("place", range(4))
async def test_the_others_stay_whoever_leaves(place: int, world: World) -> None:
    signers = [k for k in WORKERS if k is not WORKERS[place]]
    await world.change(leaver=WORKERS[place].account, signers=signers)
    assert await present(world) == {k.account for k in signers}


async def test_one_may_join_as_another_leaves(world: World) -> None:
    await world.candidate(JOINER)
    await world.change(joiner=JOINER.account, leaver=LEAVER.account)
    assert await present(world) == {*(k.account for k in WORKERS if k is not LEAVER), JOINER.account}
    changes = [await world.run.changes(number) for number in range(2)]
    assert [(c.joiner, c.leaver) for c in changes] == [(JOINER.account, LEAVER.account), (NOBODY, NOBODY)]
    assert await world.run.change_count() == 1


async def test_of_two_accounts_that_name_one_peer_the_workers_take_one_in(world: World) -> None:
    """Naming somebody's peer keeps nobody out, and earns no seat."""
    squatter, peer = key("squatter"), peer_of(JOINER)
    await world.bond(squatter, peer=peer)
    await world.run.draw(STRANGER, squatter.account)
    await world.candidate(JOINER)
    await world.change(joiner=JOINER.account)
    world.workers.append(JOINER)
    with pytest.raises(Conflict, match="peer had a seat"):
        await world.change(joiner=squatter.account)


async def test_the_change_digest_is_what_eip_712_says(world: World) -> None:
    value = {"runId": bytes.fromhex(RUN_ID), "number": 0, "joiner": JOINER.account, "leaver": LEAVER.account}
    kinds = ("bytes32", "uint256", "address", "address")
    signable = encode_typed_data(
        {"name": "Tessera run", "version": "1", "chainId": CHAIN_ID, "verifyingContract": world.run.address},
        {"Change": [{"name": name, "type": kind} for name, kind in zip(value, kinds, strict=True)]},
        value,
    )
    signed = EthAccount.sign_message(signable, LEAVER.secret)
    digest = (await world.consent()).change(0, JOINER.account, LEAVER.account)
    assert bytes(signed.message_hash) == digest == await world.run.change_digest(0, JOINER.account, LEAVER.account)
    assert bytes(signed.signature) == LEAVER.sign_digest(digest)


async def test_two_thirds_of_the_workers_are_not_enough(world: World) -> None:
    with pytest.raises(Refused, match="too few signatures"):
        await world.change(leaver=LEAVER.account, signers=WORKERS[:2])


async def test_signatures_serve_one_change(world: World) -> None:
    digest = (await world.consent()).change(0, NOBODY, LEAVER.account)
    signatures = [k.sign_digest(digest) for k in WORKERS[:3]]
    for joiner, leaver in ((NOBODY, WORKERS[2].account), (LEAVER.account, NOBODY), (JOINER.account, LEAVER.account)):
        with pytest.raises(Invalid, match="not a worker's signature"):
            await world.run.change(STRANGER, 0, joiner, leaver, signatures)
    await world.run.change(STRANGER, 0, NOBODY, LEAVER.account, signatures)
    for number in (0, 2):
        with pytest.raises(Conflict, match="not the next change"):
            await world.run.change(STRANGER, number, NOBODY, LEAVER.account, signatures)


async def test_only_candidates_with_a_stage_join_and_only_workers_leave(world: World) -> None:
    for nobody in (NOBODY, JOINER.account):
        with pytest.raises(Invalid, match="empty change"):
            await world.change(joiner=nobody, leaver=nobody)
    with pytest.raises(Invalid, match="not a worker"):
        await world.change(leaver=JOINER.account)
    for candidate in (WORKERS[3], JOINER):
        with pytest.raises(Invalid, match="no candidate with a stage"):
            await world.change(joiner=candidate.account)
    await world.bond(JOINER)
    with pytest.raises(Invalid, match="no candidate with a stage"):
        await world.change(joiner=JOINER.account)


async def test_the_last_worker_goes_by_exit_and_the_run_is_over(world: World) -> None:
    while len(world.workers) > 1:
        await world.change(leaver=world.workers[-1].account)
        world.workers.pop()
    (last,) = world.workers
    with pytest.raises(Refused, match="last worker"):
        await world.change(leaver=last.account)
    await world.epoch({STRANGER.account: 5})
    await world.run.leave(last)
    await world.wait(TERMS.delay_s)
    await world.run.exit(last)
    with pytest.raises(Refused, match="too few signatures"):
        await world.propose({STRANGER.account: 5}, [])
    await world.wait(TERMS.delay_s)
    for worker in WORKERS:
        await world.run.withdraw(STRANGER, worker.account)
    assert await world.run.bonded() == await world.coin.balanceOf(world.run.address) == 0


@pytest.mark.slow
async def test_there_are_at_most_128_workers() -> None:
    terms = TERMS._replace(stages=1, most=200)
    crowd = [key(f"worker {number}") for number in range(MAX_WORKERS)]
    world = await make_world(QuickChain(memory_chain().client().rpc), terms=terms, founders=crowd)
    await world.candidate(JOINER)
    with pytest.raises(Refused, match="too many workers"):
        await world.change(joiner=JOINER.account)
    receipt = await world.change(joiner=JOINER.account, leaver=crowd[0].account)
    assert await world.run.worker_count() == MAX_WORKERS
    assert receipt.gas_used < 3_000_000


# --- candidates who never become workers ------------------------------------------------------------------------------


async def test_a_candidate_is_given_up_after_an_hour_and_gets_his_bond_back(world: World) -> None:
    await world.change(leaver=LEAVER.account)
    await world.candidate(JOINER)
    drawn = key("never drawn")
    await world.bond(drawn)
    with pytest.raises(Refused, match="candidate may still be taken in"):
        await world.run.expire(STRANGER, JOINER.account)
    await world.wait(HOUR + 1)
    for candidate in (JOINER, drawn):
        await world.run.expire(STRANGER, candidate.account)
        with pytest.raises(Invalid, match="no candidate"):
            await world.run.expire(STRANGER, candidate.account)
    assert sum(await served(world)) == 3
    with pytest.raises(Invalid, match="no candidate with a stage"):
        await world.change(joiner=JOINER.account, signers=[k for k in WORKERS if k is not LEAVER])
    await world.wait(TERMS.delay_s)
    await world.run.withdraw(STRANGER, JOINER.account)
    assert await world.coin.balanceOf(JOINER.account) == TERMS.stake


async def test_workers_are_no_candidates(world: World) -> None:
    with pytest.raises(Invalid, match="no candidate"):
        await world.run.expire(STRANGER, LEAVER.account)


async def test_before_the_run_begins_strangers_cannot_send_candidates_away() -> None:
    """They wait for each other then, for as long as it takes; who does not want to wait may go."""
    world = await before_beginning()
    for founder in WORKERS:
        await world.candidate(founder)
    await world.wait(HOUR + 1)
    with pytest.raises(Refused, match="has not begun"):
        await world.run.expire(STRANGER, WORKERS[1].account)
    await world.run.expire(WORKERS[1], WORKERS[1].account)
    await world.run.expire(WORKERS[0], WORKERS[2].account)
    assert sum(await served(world)) == 2


# --- leaving alone ----------------------------------------------------------------------------------------------------


async def test_who_announces_to_leave_works_on_and_his_stage_looks_for_another(world: World) -> None:
    stage = (await world.run.members(LEAVER.account)).stage
    await world.run.leave(LEAVER)
    assert await status(world, LEAVER) == LEAVING
    assert (await served(world))[stage] == 1
    assert await world.run.is_worker(LEAVER.account)
    await world.epoch({STRANGER.account: 5}, WORKERS[:3])
    assert await world.candidate(JOINER) == stage
    for who in (LEAVER, STRANGER):
        with pytest.raises(Invalid, match="not a worker"):
            await world.run.leave(who)
    await world.change(joiner=JOINER.account, leaver=LEAVER.account)
    assert await served(world) == [2, 2]


async def test_who_is_not_let_go_goes_a_delay_later(world: World) -> None:
    with pytest.raises(Refused, match="has not announced to leave"):
        await world.run.exit(LEAVER)
    await world.run.leave(LEAVER)
    with pytest.raises(Refused, match="too early to leave alone"):
        await world.run.exit(LEAVER)
    await world.wait(TERMS.delay_s)
    receipt = await world.run.exit(LEAVER)
    (changed,) = decode_events(Run.Changed, world.run.address, receipt)
    assert (changed.number, changed.joiner, changed.leaver) == (0, NOBODY, LEAVER.account)
    assert await status(world, LEAVER) == LEFT
    assert sum(await served(world)) == 3


async def test_a_bond_is_free_a_delay_after_leaving_and_paid_once_to_who_bonded(world: World) -> None:
    with pytest.raises(Refused, match="nothing to withdraw"):
        await world.run.withdraw(LEAVER, LEAVER.account)
    receipt = await world.change(leaver=LEAVER.account)
    (left,) = decode_events(Run.Left, world.run.address, receipt)
    assert left.free_at == (await world.run.members(LEAVER.account)).since
    with pytest.raises(Refused, match="bond is still at risk"):
        await world.run.withdraw(LEAVER, LEAVER.account)
    await world.wait(TERMS.delay_s)
    await world.run.withdraw(STRANGER, LEAVER.account)
    assert await world.coin.balanceOf(LEAVER.account) == TERMS.stake
    assert await world.coin.balanceOf(STRANGER.account) == 0
    with pytest.raises(Refused, match="nothing to withdraw"):
        await world.run.withdraw(LEAVER, LEAVER.account)
    assert await world.run.bonded() == 3 * TERMS.stake == await world.coin.balanceOf(world.run.address)


async def test_what_the_leaver_has_earned_stays_his(world: World) -> None:
    await world.give({LEAVER.account: 10})
    tree = await world.epoch({LEAVER.account: 30})
    await world.change(leaver=LEAVER.account)
    await world.share.redeem(LEAVER, 1, LEAVER.account, 30, tree.proof(0))
    await world.earn(4_000)
    assert await world.share.claimable(LEAVER.account) == 4_000

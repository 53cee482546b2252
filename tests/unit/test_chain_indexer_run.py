"""What the index tells of a run is what its contract says, and each figure's transaction proves it."""

from __future__ import annotations

from typing import TypeVar

import pytest

from chain_support import TERMS, WORKERS, Proposal, World, ascending, key, local_world, peer_of
from tessera.chain.client import RpcChain
from tessera.chain.face import Event, decode_events
from tessera.chain.faces import ModelShare, Run
from tessera.chain.indexer.engine import Indexer
from tessera.chain.indexer.model_share import MODEL_SHARE
from tessera.chain.indexer.run import RUN, Member, RunView
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
E = TypeVar("E", bound=Event)
HOLDER, CHALLENGER, JOINER, LATE = key("holder").account, key("challenger"), key("joiner"), key("late candidate")
CHEAT, LIAR, LEAVER, LAST = WORKERS
EVIDENCE, SUBJECT = b"\x09" * 32, b"\x0a" * 32
WINDOW_S, HOUR = 600, 3_600
SLOW = TERMS._replace(window_s=WINDOW_S)
REWARD = TERMS.stake * TERMS.reward_bps // 10_000
STATUS = ("bonded", "drawn", "joined", "leaving", "left", "withdrawn", "slashed")  # in the contract's order


@pytest.fixture
async def world() -> World:
    return await local_world(SLOW)


async def told_of(world: World) -> tuple[Indexer, RunView]:
    index = Indexer(None, world.chain, [RUN.at(world.run.address), MODEL_SHARE.at(world.share.address)])
    await index.update()
    return index, RunView(index.queries)


async def event(world: World, kind: type[E], tx_hash: str) -> E:
    """The one event of this kind in a transaction."""
    assert isinstance(world.chain, RpcChain)
    receipt = await world.chain.receipt(tx_hash)
    assert receipt is not None
    address = world.share.address if kind is ModelShare.Posted else world.run.address
    (found,) = decode_events(kind, address, receipt)
    return found


async def strike(world: World, proposal: Proposal, attempt: int) -> None:
    digest = (await world.consent()).strike(proposal.epoch, attempt, EVIDENCE)
    signatures = [worker.sign_digest(digest) for worker in ascending(world.workers[:2])]
    await world.run.strike(LEAVER, *proposal.fields, EVIDENCE, signatures)


async def slash(world: World, worker: AccountKey) -> None:
    digest = (await world.consent()).slash(worker.account, EVIDENCE, CHALLENGER.account)
    signatures = [k.sign_digest(digest) for k in ascending(world.workers) if k != worker]
    await world.run.slash(LEAVER, worker.account, EVIDENCE, CHALLENGER.account, signatures)


async def contradict(world: World, liar: AccountKey) -> None:
    receipt = (await world.consent()).receipt
    one, two = b"\x01" * 32, b"\x02" * 32
    signed = [liar.sign_digest(receipt(SUBJECT, content)) for content in (one, two)]
    await world.run.contradict(CHALLENGER, liar.account, SUBJECT, one, signed[0], two, signed[1])


async def go(world: World, leaver: AccountKey) -> None:
    """Leave with the others' consent."""
    await world.run.leave(leaver)
    await world.change(leaver=leaver.account)
    world.workers.remove(leaver)


async def every_way(world: World) -> None:
    """Somebody for each way in which a member can go, and one who stays."""
    await world.candidate(JOINER)
    await slash(world, CHEAT)
    world.workers.remove(CHEAT)
    await contradict(world, LIAR)
    world.workers.remove(LIAR)
    await world.change(joiner=JOINER.account)
    world.workers.append(JOINER)
    await go(world, LEAVER)
    await world.wait(TERMS.delay_s)
    await world.run.withdraw(CHALLENGER, LEAVER.account)
    await go(world, LAST)
    await world.bond(LATE)


async def assert_told_as_stored(world: World, told: Member) -> None:
    stored = await world.run.members(told.account)
    assert (told.peer, STATUS.index(told.status), told.stake) == (
        "0x" + stored.peer.hex(),
        stored.status.bit_length() - 1,
        stored.bond,
    )
    assert told.stage == (stored.stage if "drawn" in told.proofs else None)
    assert told.free_at is None or "withdrawn" in told.proofs or told.free_at == stored.since


async def test_every_member_is_told_as_the_contract_has_it(world: World) -> None:
    await every_way(world)
    index, view = await told_of(world)
    members = view.members()
    assert [member.account for member in members[:2]] == [LATE.account, JOINER.account]  # the newest first
    assert {member.account: member.status for member in members} == {
        CHEAT.account: "slashed",
        LIAR.account: "slashed",
        LEAVER.account: "withdrawn",
        LAST.account: "left",
        JOINER.account: "joined",
        LATE.account: "bonded",
    }
    for member in members:
        await assert_told_as_stored(world, member)
        assert view.member(member.account) == member
    assert [member.account for member in view.members(limit=1)] == [LATE.account]
    assert view.member(HOLDER) is None
    index.close()


async def test_stakes_add_up_and_their_transactions_prove_them(world: World) -> None:
    await every_way(world)
    index, view = await told_of(world)
    total = view.stake()
    assert total.amount == await world.run.bonded() == sum(member.stake for member in view.members())
    assert (await event(world, Run.Bonded, total.tx_hash)).peer == peer_of(LATE)
    told = {member.account: member for member in view.members()}
    left, cheat = told[LEAVER.account].proofs, told[CHEAT.account].proofs
    assert (await event(world, Run.Bonded, left["bonded"])).amount == TERMS.stake
    assert (await event(world, Run.Drawn, left["drawn"])).stage == told[LEAVER.account].stage
    assert (await event(world, Run.Began, left["joined"])).workers == len(WORKERS)
    assert (await event(world, Run.Left, left["left"])).free_at == told[LEAVER.account].free_at
    assert (await event(world, Run.Withdrawn, left["withdrawn"])).amount == TERMS.stake
    assert (await event(world, Run.Changed, told[JOINER.account].proofs["joined"])).joiner == JOINER.account
    assert (await event(world, Run.Slashed, cheat["slashed"])).worker == CHEAT.account
    index.close()


async def test_disputes_are_told_with_their_evidence_and_reward(world: World) -> None:
    await every_way(world)
    index, view = await told_of(world)
    by_receipts, by_verdict = view.slashes()
    assert [(s.worker, s.challenger, s.evidence, s.amount, s.reward) for s in (by_receipts, by_verdict)] == [
        (LIAR.account, CHALLENGER.account, "0x" + SUBJECT.hex(), TERMS.stake, REWARD),
        (CHEAT.account, CHALLENGER.account, "0x" + EVIDENCE.hex(), TERMS.stake, REWARD),
    ]
    assert view.slashes(CHEAT.account) == [by_verdict]
    assert view.slashes(LEAVER.account) == []
    assert (await event(world, Run.Slashed, by_receipts.tx_hash)).evidence == SUBJECT
    rewarded = view.rewarded(CHALLENGER.account)
    assert (rewarded.amount, rewarded.count) == (2 * REWARD, 2)
    assert rewarded.amount == await world.coin.balanceOf(CHALLENGER.account)
    assert rewarded.tx_hash == by_receipts.tx_hash
    index.close()


async def test_epochs_are_told_with_every_proposal_what_struck_it_and_what_became_of_it(world: World) -> None:
    """Attempts count strikes and not proposals: epochs 0 and 1 are both proposed at attempt 0, and one is struck."""
    await world.epoch({HOLDER: 7})
    struck = await world.propose({HOLDER: 90})
    await strike(world, struck, 0)
    await world.epoch({HOLDER: 9})
    waiting = await world.propose({HOLDER: 5})
    index, view = await told_of(world)
    third, second, first = view.epochs()
    assert [epoch.number for epoch in (first, second, third)] == [0, 1, 2]
    assert [(p.attempt, p.shares, p.strike is None) for e in (first, second, third) for p in e.proposals] == [
        (0, 7, True),
        (0, 90, False),
        (1, 9, True),
        (1, 5, True),
    ]
    assert first.posting
    assert second.posting
    assert third.posting is None
    assert (second.posting.shares, second.posting.root) == (9, second.proposals[1].root)
    assert (await event(world, ModelShare.Posted, second.posting.tx_hash)).epoch == 1
    (last,) = third.proposals
    assert (last.root, last.opens_at, last.signers) == ("0x" + waiting.root.hex(), waiting.opens_at, len(WORKERS))
    assert (await event(world, Run.Proposed, last.tx_hash)).root == waiting.root
    against = second.proposals[0].strike
    assert against
    assert (against.evidence, against.signers) == ("0x" + EVIDENCE.hex(), 2)
    assert (await event(world, Run.Struck, against.tx_hash)).attempt == 0
    assert view.epoch(1) == second
    assert view.epoch(3) is None
    index.close()


async def test_founders_are_named_once_only_they_can_be_meant() -> None:
    """The run begins with four of five who have a stage. One leaves, so he was a founder; the fifth is given up."""
    world = await unbegun()
    for candidate in (*WORKERS, LATE):
        await world.candidate(candidate)
    await world.run.begin(WORKERS[0], world.share.address, [worker.account for worker in WORKERS])
    await world.run.leave(LEAVER)
    index, view = await told_of(world)

    def told() -> dict[str, str]:
        return {member.account: member.status for member in view.members()}

    await world.candidate(JOINER)
    await index.update()
    unknown = dict.fromkeys([CHEAT.account, LIAR.account, LAST.account, LATE.account, JOINER.account], "drawn")
    assert told() == {**unknown, LEAVER.account: "leaving"}
    await world.wait(HOUR + 1)
    await world.run.expire(CHALLENGER, LATE.account)
    await index.update()
    known = dict.fromkeys([CHEAT.account, LIAR.account, LAST.account], "joined")
    assert told() == {**known, LEAVER.account: "leaving", LATE.account: "left", JOINER.account: "drawn"}
    index.close()


async def unbegun() -> World:
    """A run that nobody has begun, on the chain of another."""
    world = await local_world(SLOW)
    run_id = await world.run.run_id()
    run = await Run.deploy(world.chain, WORKERS[0], world.coin.address, run_id, SLOW)
    share = await ModelShare.deploy(world.chain, WORKERS[0], "M", "M", world.coin.address, run_id, run.address)
    return World(world.chain, world.coin, run, share, world.local)

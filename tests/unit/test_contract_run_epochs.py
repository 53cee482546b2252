"""Epochs of a run: who proposes them, what waits, what strikes them out, and what becomes shares."""

from __future__ import annotations

import pytest
from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from chain_support import CHAIN_ID, RUN_ID, TERMS, WORKERS, Proposal, World, ascending, key, local_world, make_world
from tessera.chain import abi
from tessera.chain.consent import Consent
from tessera.chain.face import decode_events
from tessera.chain.faces import Coin, ModelShare, Run
from tessera.core.errors import Conflict, Invalid, Refused
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
HOLDER, STRANGER = key("holder").account, key("stranger")
ROOT_32, EVIDENCE = b"\x07" * 32, b"\x09" * 32
WINDOW_S = 600
SLOW = TERMS._replace(window_s=WINDOW_S, epochs=5, early_bps=30_000, epoch_shares=100)


@pytest.fixture
async def world() -> World:
    return await local_world(SLOW)


async def strike(world: World, proposal: Proposal, signers: list[AccountKey], *, attempt: int = 0) -> None:
    digest = (await world.consent()).strike(proposal.epoch, attempt, EVIDENCE)
    signatures = [k.sign_digest(digest) for k in ascending(signers)]
    await world.run.strike(STRANGER, *proposal.fields, EVIDENCE, signatures)


# --- proposing --------------------------------------------------------------------------------------------------------


async def test_an_epoch_needs_more_than_two_thirds_of_the_workers(world: World) -> None:
    with pytest.raises(Refused, match="too few signatures"):
        await world.propose({HOLDER: 10}, WORKERS[:2])
    proposal = await world.propose({HOLDER: 10}, WORKERS[:3])
    (event,) = decode_events(Run.Proposed, world.run.address, proposal.receipt)
    assert (event.epoch, event.attempt, event.root, event.shares, event.signers) == (0, 0, proposal.root, 10, 3)


async def test_exactly_two_thirds_are_not_enough(world: World) -> None:
    await world.change(leaver=WORKERS[3].account)
    with pytest.raises(Refused, match="too few signatures"):
        await world.propose({HOLDER: 10}, WORKERS[:2])
    await world.propose({HOLDER: 10}, WORKERS[:3])


async def test_what_waits_can_be_read(world: World) -> None:
    assert await world.run.pending() == bytes(32)
    proposal = await world.propose({HOLDER: 10})
    kinds = ("uint256", "bytes32", "uint256", "uint256")
    assert await world.run.pending() == keccak(abi.encode(kinds, proposal.fields))
    await world.wait(WINDOW_S)
    await world.run.post(STRANGER, *proposal.fields)
    assert await world.run.pending() == bytes(32)


async def test_one_worker_cannot_count_twice_and_signers_ascend(world: World) -> None:
    digest = (await world.consent()).epoch(0, 0, ROOT_32, 5)
    good = [k.sign_digest(digest) for k in WORKERS]
    for signatures in ([good[0], good[1], good[1]], [*reversed(good)]):
        with pytest.raises(Invalid, match="signers not ascending"):
            await world.run.propose(STRANGER, 0, ROOT_32, 5, signatures)


async def test_a_strangers_signature_does_not_count(world: World) -> None:
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.propose({HOLDER: 10}, [*WORKERS[:3], STRANGER])


@pytest.mark.parametrize("change", ["chain", "contract", "run", "epoch", "attempt", "root", "shares"])
async def test_a_signature_for_anything_else_does_not_count(world: World, change: str) -> None:
    run = HOLDER if change == "contract" else world.run.address
    consent = Consent(CHAIN_ID + (change == "chain"), run, RUN_ID if change != "run" else type(RUN_ID)("66" * 32))
    root = ROOT_32 if change != "root" else bytes(32)
    digest = consent.epoch(int(change == "epoch"), int(change == "attempt"), root, 5 + (change == "shares"))
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.run.propose(STRANGER, 0, ROOT_32, 5, [k.sign_digest(digest) for k in WORKERS])


async def test_the_digests_are_what_eip_712_says(world: World) -> None:
    consent, run_id = await world.consent(), bytes.fromhex(RUN_ID)
    words = {"runId": "bytes32", "evidence": "bytes32", "root": "bytes32", "subject": "bytes32", "content": "bytes32",
             "worker": "address", "challenger": "address"}  # fmt: skip
    for kind, values, ours, theirs in (
        ("Epoch", {"epoch": 3, "attempt": 2, "root": ROOT_32, "shares": 99},
         consent.epoch(3, 2, ROOT_32, 99), world.run.epoch_digest(3, 2, ROOT_32, 99)),
        ("Strike", {"epoch": 3, "attempt": 2, "evidence": EVIDENCE},
         consent.strike(3, 2, EVIDENCE), world.run.strike_digest(3, 2, EVIDENCE)),
        ("Slash", {"worker": HOLDER, "evidence": EVIDENCE, "challenger": STRANGER.account},
         consent.slash(HOLDER, EVIDENCE, STRANGER.account),
         world.run.slash_digest(HOLDER, EVIDENCE, STRANGER.account)),
        ("Receipt", {"subject": ROOT_32, "content": EVIDENCE},
         consent.receipt(ROOT_32, EVIDENCE), world.run.receipt_digest(ROOT_32, EVIDENCE)),
    ):  # fmt: skip
        message = {"runId": run_id, **values}
        fields = [{"name": name, "type": words.get(name, "uint256")} for name in message]
        domain = {"name": "Tessera run", "version": "1", "chainId": CHAIN_ID, "verifyingContract": world.run.address}
        signed = EthAccount.sign_message(encode_typed_data(domain, {kind: fields}, message), WORKERS[0].secret)
        assert bytes(signed.message_hash) == ours == await theirs, kind


async def test_epochs_come_once_each_and_in_order(world: World) -> None:
    consent = await world.consent()
    for epoch in (1, 2**256 - 1):
        signatures = [k.sign_digest(consent.epoch(epoch, 0, ROOT_32, 5)) for k in WORKERS]
        with pytest.raises(Conflict, match="not the next epoch"):
            await world.run.propose(STRANGER, epoch, ROOT_32, 5, signatures)
    first = await world.propose({HOLDER: 5})
    signatures = [k.sign_digest(consent.epoch(0, 0, first.root, 5)) for k in WORKERS]
    with pytest.raises(Conflict, match="a proposal is waiting"):
        await world.run.propose(STRANGER, 0, first.root, 5, signatures)
    await world.wait(WINDOW_S)
    await world.run.post(STRANGER, *first.fields)
    with pytest.raises(Conflict, match="not the next epoch"):
        await world.run.propose(STRANGER, 0, first.root, 5, signatures)


async def test_the_most_that_an_epoch_can_become_falls_with_the_schedule(world: World) -> None:
    caps = [await world.run.cap(epoch) for epoch in range(7)]
    assert caps == [300, 250, 200, 150, 100, 0, 0]
    with pytest.raises(Invalid, match="too many shares"):
        await world.propose({HOLDER: 301})
    await world.epoch({HOLDER: 300})
    with pytest.raises(Invalid, match="too many shares"):
        await world.propose({HOLDER: 251})


async def test_after_the_schedule_epochs_are_empty(world: World) -> None:
    digest_of = (await world.consent()).epoch
    for epoch in range(6):
        signatures = [k.sign_digest(digest_of(epoch, 0, bytes(32), 0)) for k in WORKERS]
        await world.run.propose(STRANGER, epoch, bytes(32), 0, signatures)
        opens_at = (await world.run.events(Run.Proposed))[-1].opens_at
        await world.wait(WINDOW_S)
        await world.run.post(STRANGER, epoch, bytes(32), 0, opens_at)
    with pytest.raises(Invalid, match="too many shares"):
        await world.propose({HOLDER: 1})
    assert await world.share.totalSupply() == 0


async def test_a_schedule_of_one_epoch_has_the_plain_weight(world: World) -> None:
    run = await Run.deploy(world.chain, WORKERS[0], world.coin.address, bytes(32), SLOW._replace(epochs=1))
    assert [await run.cap(epoch) for epoch in range(2)] == [100, 0]


async def test_nothing_is_proposed_before_the_run_begins(world: World) -> None:
    run = await Run.deploy(world.chain, WORKERS[0], world.coin.address, bytes.fromhex(RUN_ID), TERMS)
    with pytest.raises(Refused, match="has not begun"):
        await run.propose(STRANGER, 0, ROOT_32, 5, [])


# --- posting and striking ---------------------------------------------------------------------------------------------


async def test_shares_exist_when_the_window_is_over_and_not_before(world: World) -> None:
    proposal = await world.propose({HOLDER: 10})
    await world.wait(WINDOW_S - 1)
    with pytest.raises(Refused, match="challenge window is open"):
        await world.run.post(STRANGER, *proposal.fields)
    assert await world.share.totalSupply() == 0
    await world.wait(1)
    await world.run.post(STRANGER, *proposal.fields)
    assert await world.share.totalSupply() == 10
    with pytest.raises(Conflict, match="not the waiting proposal"):
        await world.run.post(STRANGER, *proposal.fields)


@pytest.mark.parametrize("change", range(4))
async def test_only_what_was_proposed_is_posted(world: World, change: int) -> None:
    proposal = await world.propose({HOLDER: 10})
    await world.wait(WINDOW_S)
    fields: list[int | bytes] = list(proposal.fields)
    fields[change] = bytes(32) if change == 1 else fields[change] - 1 if change == 3 else fields[change] + 1  # type: ignore[operator]
    with pytest.raises(Conflict, match="not the waiting proposal"):
        await world.run.post(STRANGER, *fields)  # type: ignore[arg-type]


async def test_a_third_of_the_workers_strikes_a_proposal_and_it_never_becomes_shares(world: World) -> None:
    bad = await world.propose({HOLDER: 10})
    with pytest.raises(Refused, match="too few signatures"):
        await strike(world, bad, WORKERS[:1])
    await strike(world, bad, WORKERS[:2])
    (struck,) = await world.run.events(Run.Struck)
    assert (struck.epoch, struck.attempt, struck.evidence, struck.signers) == (0, 0, EVIDENCE, 2)
    await world.wait(WINDOW_S)
    with pytest.raises(Conflict, match="not the waiting proposal"):
        await world.run.post(STRANGER, *bad.fields)
    signatures = [k.sign_digest((await world.consent()).epoch(0, 0, bad.root, 10)) for k in WORKERS]
    with pytest.raises(Invalid, match="not a worker's signature"):  # the next attempt is signed anew
        await world.run.propose(STRANGER, 0, bad.root, 10, signatures)
    good = await world.propose({HOLDER: 9})
    with pytest.raises(Invalid, match="not a worker's signature"):  # and struck anew
        await strike(world, good, WORKERS[:2])
    await world.wait(WINDOW_S)
    await world.run.post(STRANGER, *good.fields)
    assert await world.share.totalSupply() == 9


async def test_nothing_is_struck_after_its_window_or_when_it_does_not_wait(world: World) -> None:
    proposal = await world.propose({HOLDER: 10})
    with pytest.raises(Conflict, match="not the waiting proposal"):
        await world.run.strike(STRANGER, 0, ROOT_32, 10, proposal.opens_at, EVIDENCE, [])
    await world.wait(WINDOW_S)
    with pytest.raises(Refused, match="challenge window is over"):
        await strike(world, proposal, WORKERS)


async def test_striking_takes_at_least_one_worker(world: World) -> None:
    proposal = await world.propose({HOLDER: 10})
    with pytest.raises(Refused, match="too few signatures"):
        await strike(world, proposal, [])
    with pytest.raises(Invalid, match="not a worker's signature"):
        await strike(world, proposal, [STRANGER])


async def test_a_run_whose_last_worker_was_slashed_is_struck_by_nobody() -> None:
    """No worker is left: a third of nobody is not enough."""
    world = await local_world(SLOW)
    for worker in WORKERS[1:]:
        await world.change(leaver=worker.account)
        world.workers.remove(worker)
    proposal = await world.propose({HOLDER: 10})
    receipt = (await world.consent()).receipt
    one, other = (WORKERS[0].sign_digest(receipt(ROOT_32, content)) for content in (ROOT_32, EVIDENCE))
    await world.run.contradict(STRANGER, WORKERS[0].account, ROOT_32, ROOT_32, one, EVIDENCE, other)
    assert await world.run.worker_count() == 0
    with pytest.raises(Refused, match="too few signatures"):
        await strike(world, proposal, [])


async def test_the_largest_schedule_can_be_posted(world: World) -> None:
    """No proposal may be too large to post: it would wait for ever, and every other behind it."""
    largest = TERMS._replace(epochs=2**24, epoch_shares=2**96, early_bps=1_000_000)
    run = await Run.deploy(world.chain, WORKERS[0], world.coin.address, bytes(32), largest)
    assert await run.cap(0) == 100 * 2**96
    assert await run.cap(2**24 - 1) == 2**96
    assert 2**24 * await run.cap(0) < 2**128
    assert await run.cap(2**24) == 0


async def test_runs_do_not_share_signatures(world: World) -> None:
    other = await make_world(world.chain, terms=SLOW)
    digest = (await world.consent()).epoch(0, 0, ROOT_32, 5)
    with pytest.raises(Invalid, match="not a worker's signature"):
        await other.run.propose(STRANGER, 0, ROOT_32, 5, [k.sign_digest(digest) for k in WORKERS])
    assert isinstance(other.coin, Coin)
    assert isinstance(other.share, ModelShare)


def test_a_digest_of_what_cannot_be_is_refused() -> None:
    consent = Consent(CHAIN_ID, Account(HOLDER), RUN_ID)
    for ask in (
        lambda: consent.epoch(-1, 0, ROOT_32, 0),
        lambda: consent.epoch(0, 2**256, ROOT_32, 0),
        lambda: consent.epoch(0, 0, b"", 0),
        lambda: consent.strike(0, 0, bytes(31)),
        lambda: consent.bond_nonce(HOLDER, bytes(33)),
    ):
        with pytest.raises(Invalid):
            ask()

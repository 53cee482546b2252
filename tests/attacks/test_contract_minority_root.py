"""A root for which too few stand: a minority's, or a majority's that counts whom the run has put out."""

from __future__ import annotations

from typing import Any

import pytest

from chain_support import TERMS, WORKERS, World, ascending, key, local_world
from tessera.chain.faces import ModelShare
from tessera.core.errors import Conflict, Invalid, Refused
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
ATTACKER, STRANGER = key("attacker"), key("stranger")
EVIDENCE, ONE, OTHER = (bytes([i]) * 32 for i in range(1, 4))
SLOW = TERMS._replace(window_s=600)


@pytest.fixture
async def world() -> World:
    return await local_world(SLOW)


async def test_a_minority_gets_nothing_by_any_road(world: World) -> None:
    two = WORKERS[:2]
    for signers, reason in (
        (two, "too few signatures"),
        ([*two, ATTACKER], "not a worker's signature"),
        ([two[0], two[0], two[1]], "signers not ascending"),
    ):
        with pytest.raises((Refused, Invalid), match=reason):
            await world.propose({ATTACKER.account: 10**18}, signers)
    with pytest.raises(Refused, match="not the issuer"):
        await ModelShare(world.chain, world.share.address).post(two[0], 0, EVIDENCE, 10**18)
    with pytest.raises(Conflict, match="not the waiting proposal"):
        await world.run.post(two[0], 0, EVIDENCE, 10**18, 0)
    assert await world.share.totalSupply() == 0


@pytest.mark.parametrize("way", ["let go", "left alone", "slashed", "contradicted"])
async def test_who_is_no_worker_any_more_is_no_part_of_a_majority(world: World, way: str) -> None:
    """Three of four were more than two thirds; without one of them the same three are not."""
    gone = WORKERS[0]
    await put_out(world, gone, way)
    assert await world.run.worker_count() == 3
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.propose({ATTACKER.account: 10**18}, WORKERS[:3])
    with pytest.raises(Refused, match="too few signatures"):
        await world.propose({ATTACKER.account: 10**18}, WORKERS[1:3])
    await world.propose({STRANGER.account: 5}, WORKERS[1:])


async def test_signatures_gathered_before_somebody_was_put_out_do_not_outlive_him(world: World) -> None:
    """The set that counts is the one of the moment in which the proposal comes."""
    digest = (await world.consent()).epoch(0, 0, EVIDENCE, 5)
    signatures = [k.sign_digest(digest) for k in WORKERS[:3]]
    await put_out(world, WORKERS[0], "contradicted")
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.run.propose(ATTACKER, 0, EVIDENCE, 5, signatures)


async def test_a_bought_majority_can_be_struck_while_it_waits_and_a_slashed_one_cannot_vote_again(world: World) -> None:
    bad = await world.propose({ATTACKER.account: 10**18}, WORKERS[:3])
    await put_out(world, WORKERS[0], "contradicted")
    digest = (await world.consent()).strike(0, 0, EVIDENCE)
    with pytest.raises(Invalid, match="not a worker's signature"):  # nor strike what the honest propose
        await world.run.strike(ATTACKER, *bad.fields, EVIDENCE, [WORKERS[0].sign_digest(digest)])
    await world.run.strike(STRANGER, *bad.fields, EVIDENCE, [WORKERS[3].sign_digest(digest)])  # one of three
    await world.wait(SLOW.window_s)
    with pytest.raises(Conflict, match="not the waiting proposal"):
        await world.run.post(ATTACKER, *bad.fields)
    assert await world.share.totalSupply() == 0


async def put_out(world: World, gone: AccountKey, way: str) -> None:
    consent, others = await world.consent(), ascending(k for k in WORKERS if k is not gone)
    if way == "let go":
        await world.change(leaver=gone.account)
    elif way == "left alone":
        await world.run.leave(gone)
        await world.wait(SLOW.delay_s)
        await world.run.exit(gone)
    elif way == "slashed":
        digest = consent.slash(gone.account, EVIDENCE, STRANGER.account)
        verdict = [k.sign_digest(digest) for k in others]
        await world.run.slash(STRANGER, gone.account, EVIDENCE, STRANGER.account, verdict)
    else:
        receipts: Any = [gone.sign_digest(consent.receipt(EVIDENCE, content)) for content in (ONE, OTHER)]
        await world.run.contradict(STRANGER, gone.account, EVIDENCE, ONE, receipts[0], OTHER, receipts[1])
    assert not await world.run.is_worker(gone.account)

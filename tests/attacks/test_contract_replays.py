"""Signatures shown again: on another chain, to another contract, for another run or attempt, or in another spelling.

Known from every bridge and vault whose digest left out one of them; the flipped `s` from Bitcoin's malleability (2014).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chain_support import (
    CHAIN_ID,
    NOBODY,
    RUN_ID,
    TERMS,
    WORKERS,
    World,
    key,
    local_world,
    peer_of,
    split,
)
from tessera.chain.consent import Consent
from tessera.chain.faces import Coin, ModelShare, Run
from tessera.chain.local import LocalChain
from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Invalid
from tessera.core.ids import Account, RunId

pytestmark = pytest.mark.anyio
ATTACKER, LEAVER, CHEAT = key("attacker"), WORKERS[1], WORKERS[3]
ROOT_32, EVIDENCE, ONE, OTHER = (bytes([i]) * 32 for i in range(1, 5))
ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
SLOW = TERMS._replace(window_s=600)


@pytest.fixture
async def world() -> World:
    return await local_world(SLOW)


def elsewhere(run: Account) -> dict[str, Consent]:
    """The same workers' consent to the same thing, given for something else."""
    return {
        "another chain": Consent(CHAIN_ID + 1, run, RUN_ID),
        "another contract": Consent(CHAIN_ID, ATTACKER.account, RUN_ID),
        "another run": Consent(CHAIN_ID, run, RunId("66" * 32)),
    }


@pytest.mark.parametrize("where", ["another chain", "another contract", "another run"])
async def test_consent_given_elsewhere_counts_for_nothing_here(world: World, where: str) -> None:
    consent, run = elsewhere(world.run.address)[where], world.run

    def signed(digest: bytes) -> list[bytes]:
        return [k.sign_digest(digest) for k in WORKERS[:3]]

    with pytest.raises(Invalid, match="not a worker's signature"):
        await run.propose(ATTACKER, 0, ROOT_32, 5, signed(consent.epoch(0, 0, ROOT_32, 5)))
    with pytest.raises(Invalid, match="not a worker's signature"):
        await run.change(ATTACKER, 0, NOBODY, LEAVER.account, signed(consent.change(0, NOBODY, LEAVER.account)))
    verdict = signed(consent.slash(CHEAT.account, EVIDENCE, ATTACKER.account))
    with pytest.raises(Invalid, match="not a worker's signature"):
        await run.slash(ATTACKER, CHEAT.account, EVIDENCE, ATTACKER.account, verdict)
    proposal = await world.propose({ATTACKER.account: 5})
    with pytest.raises(Invalid, match="not a worker's signature"):
        await run.strike(ATTACKER, *proposal.fields, EVIDENCE, signed(consent.strike(0, 0, EVIDENCE)))
    one, other = (CHEAT.sign_digest(consent.receipt(EVIDENCE, content)) for content in (ONE, OTHER))
    with pytest.raises(Invalid, match="not his receipt"):
        await run.contradict(ATTACKER, CHEAT.account, EVIDENCE, ONE, one, OTHER, other)


async def test_a_bond_signed_on_another_chain_moves_nothing_here(world: World) -> None:
    """The same keys make contracts with the same addresses everywhere: only the chain's id tells them apart."""
    other_chain = LocalChain(None, chain_id=CHAIN_ID + 1, clock=FakeClock(0), dev=True)
    client, joiner = other_chain.client(), key("joiner")
    coin = await Coin.deploy(client, WORKERS[0])
    run = await Run.deploy(client, WORKERS[0], coin.address, bytes.fromhex(RUN_ID), SLOW)
    assert (coin.address, run.address) == (world.coin.address, world.run.address)
    there = World(client, coin, run, ModelShare(client, run.address))
    signature = await there.authorization(joiner, peer_of(joiner), SLOW.stake)
    await world.coin.mint(joiner, joiner.account, SLOW.stake)
    with pytest.raises(Invalid, match="coin: invalid signature"):
        await world.run.bond(ATTACKER, joiner.account, peer_of(joiner), 0, 2**40, *split(signature))
    assert await world.coin.balanceOf(joiner.account) == SLOW.stake


async def test_consent_serves_once_each_kind_in_its_own_way(world: World) -> None:
    """Changes and epochs are numbered, proposals by attempt, and a bond is lost once."""
    consent = await world.consent()
    first = [k.sign_digest(consent.epoch(0, 0, ROOT_32, 5)) for k in WORKERS]
    await world.run.propose(ATTACKER, 0, ROOT_32, 5, first)
    opens_at = (await world.run.events(Run.Proposed))[0].opens_at
    struck = [k.sign_digest(consent.strike(0, 0, EVIDENCE)) for k in WORKERS]
    await world.run.strike(ATTACKER, 0, ROOT_32, 5, opens_at, EVIDENCE, struck)
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.run.propose(ATTACKER, 0, ROOT_32, 5, first)
    again = await world.propose({ATTACKER.account: 5})
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.run.strike(ATTACKER, *again.fields, EVIDENCE, struck)
    goes = [k.sign_digest(consent.change(0, NOBODY, LEAVER.account)) for k in WORKERS]
    await world.run.change(ATTACKER, 0, NOBODY, LEAVER.account, goes)
    with pytest.raises(Conflict, match="not the next change"):
        await world.run.change(ATTACKER, 0, NOBODY, LEAVER.account, goes)


@pytest.mark.parametrize(
    "spell",
    [
        lambda r, s, v: r + (ORDER - s).to_bytes(32, "big") + bytes([55 - v]),  # the twin that ecrecover would accept
        lambda r, s, v: r + s.to_bytes(32, "big") + bytes([v - 27]),
        lambda r, s, v: r + s.to_bytes(32, "big"),
    ],
    ids=["high s", "v of 0 and 1", "64 bytes"],
)
async def test_a_signature_has_one_spelling(world: World, spell: Callable[[bytes, int, int], bytes]) -> None:
    """Otherwise one worker would count twice, or one receipt be shown as two."""
    digest = (await world.consent()).epoch(0, 0, ROOT_32, 5)
    good = [k.sign_digest(digest) for k in WORKERS[:3]]
    other = spell(good[0][:32], int.from_bytes(good[0][32:64], "big"), good[0][64])
    for signatures in ([other, *good[1:]], [good[0], other, *good[1:]]):
        with pytest.raises(Invalid, match="not a worker's signature"):
            await world.run.propose(ATTACKER, 0, ROOT_32, 5, signatures)
    with pytest.raises(Invalid, match="signers not ascending"):
        await world.run.propose(ATTACKER, 0, ROOT_32, 5, [good[0], *good])

"""A signature is shown again where it was not given: another chain, contract, mandate, intent or shape.

Known from Wintermute's Optimism deployment (2022, replayed across chains) and every pre-EIP-155 transaction.
"""

from __future__ import annotations

import pytest

from chain_support import CHAIN_ID
from spend_world import (
    AGENT,
    CHILD,
    COSIGNER,
    FUNDS,
    LABEL,
    OWNER,
    PAYEE,
    RELAYER,
    THIEF,
    Spending,
    spending_world,
)
from tessera.chain.faces import SpendPolicy
from tessera.chain.spending import cosign_digest, mandate_id, revoke_digest, spend_digest
from tessera.core.errors import Conflict, Invalid, Refused

pytestmark = pytest.mark.anyio
ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141


@pytest.fixture
async def world() -> Spending:
    return await spending_world()


async def test_a_signature_of_another_chain_pays_nothing(world: Spending) -> None:
    payment = world.payment()
    signature = AGENT.sign_digest(spend_digest(CHAIN_ID + 1, world.policy.address, payment))
    with pytest.raises(Invalid, match="not the agent's signature"):
        await world.send(payment, signature)


async def test_a_signature_for_another_contract_pays_nothing(world: Spending) -> None:
    """Same owner, same label, same terms: even the mandate's id is the same in both."""
    twin = await SpendPolicy.deploy(world.policy.chain, OWNER)
    for policy in (world.policy, twin):
        await policy.open(OWNER, LABEL, world.terms(), world.limits(), [PAYEE])
        await world.coin.approve(OWNER, policy.address, FUNDS)
    payment = world.payment(mandate=mandate_id(OWNER.account, LABEL))
    await world.send(payment, world.sign(payment))
    with pytest.raises(Invalid, match="not the agent's signature"):
        await twin.spend(RELAYER, payment, world.sign(payment))
    assert await world.left() == FUNDS - 50


async def test_a_signature_for_one_owners_mandate_does_not_fit_anothers(world: Spending) -> None:
    """An id counted from one could change owners in a reorganisation; a hash over the owner cannot."""
    await world.policy.open(THIEF, LABEL, world.terms(), world.limits(any_payee=True), [])
    payment = world.payment(mandate=mandate_id(THIEF.account, LABEL))
    with pytest.raises(Invalid, match="not the agent's signature"):
        await world.send(payment._replace(mandate=world.mandate), world.sign(payment))
    assert await world.left() == FUNDS


async def test_a_signature_for_a_childs_mandate_does_not_fit_its_parents(world: Spending) -> None:
    child = await world.delegate(world.mandate, AGENT, AGENT)  # even where both have the same agent
    payment = world.payment(mandate=child)
    with pytest.raises(Invalid, match="not the agent's signature"):
        await world.send(payment._replace(mandate=world.mandate), world.sign(payment))


@pytest.mark.parametrize("shape", ["high s", "v 0", "64 bytes", "empty", "r 0"])
async def test_a_flipped_or_malformed_signature_pays_nothing(world: Spending, shape: str) -> None:
    payment = world.payment()
    good = world.sign(payment)
    r, s, v = good[:32], int.from_bytes(good[32:64], "big"), good[64]
    bad = {
        "high s": r + (ORDER - s).to_bytes(32, "big") + bytes([55 - v]),  # the twin that ecrecover would accept
        "v 0": good[:64] + bytes([v - 27]),
        "64 bytes": good[:64],
        "empty": b"",
        "r 0": bytes(32) + good[32:],
    }[shape]
    with pytest.raises(Invalid, match="not the agent's signature"):
        await world.send(payment, bad)
    await world.send(payment, good)
    with pytest.raises((Invalid, Conflict)):
        await world.send(payment, bad)
    assert await world.left() == FUNDS - 50


async def test_signatures_of_one_kind_do_not_pass_for_another(world: Spending) -> None:
    payment = world.payment(amount=70)
    spend, cosign = world.sign(payment), world.cosign(payment)
    with pytest.raises(Invalid, match="not the agent's signature"):
        await world.send(payment, world.cosign(payment, AGENT), cosign)
    with pytest.raises(Refused, match="needs the co-signer"):
        await world.send(payment, spend, world.sign(payment, COSIGNER))
    with pytest.raises(Refused, match="may not stop this"):
        await world.policy.revoke(THIEF, world.mandate, spend)


@pytest.mark.parametrize("where", ["chain", "contract", "mandate"])
async def test_an_end_signed_elsewhere_ends_nothing_here(world: Spending, where: str) -> None:
    digest = revoke_digest(
        CHAIN_ID + (where == "chain"),
        world.coin.address if where == "contract" else world.policy.address,
        LABEL if where == "mandate" else world.mandate,
    )
    with pytest.raises(Refused, match="may not stop this"):
        await world.policy.revoke(THIEF, world.mandate, AGENT.sign_digest(digest))
    await world.pay()


async def test_a_co_signature_of_another_chain_or_contract_does_not_count(world: Spending) -> None:
    payment = world.payment(amount=70)
    for chain_id, policy in ((CHAIN_ID + 1, world.policy.address), (CHAIN_ID, world.coin.address)):
        elsewhere = COSIGNER.sign_digest(cosign_digest(chain_id, policy, payment))
        with pytest.raises(Refused, match="needs the co-signer"):
            await world.send(payment, world.sign(payment), elsewhere)


async def test_a_payment_is_not_repeated_through_a_child(world: Spending) -> None:
    payment = await world.pay()
    child = await world.delegate(world.mandate, AGENT, CHILD)
    with pytest.raises(Conflict, match="intent is already paid"):
        await world.pay(CHILD, mandate=child, intent=payment.intent)
    assert await world.left() == FUNDS - 50

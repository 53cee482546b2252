"""Spending mandates on a chain: what an agent may pay, who may change that, and everything that is refused."""

from __future__ import annotations

from typing import Any

import pytest
from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from chain_support import CHAIN_ID
from spend_world import (
    AGENT,
    APPROVED,
    CHILD,
    COSIGNER,
    DAY,
    FUNDS,
    GRANDCHILD,
    HOUR,
    LABEL,
    OPERATOR,
    OTHER_PAYEE,
    OWNER,
    PAYEE,
    PURPOSE,
    RELAYER,
    THIEF,
    Spending,
    spending_world,
)
from tessera.chain import abi
from tessera.chain.face import decode_events
from tessera.chain.faces import SpendPolicy
from tessera.chain.spending import cosign_digest, mandate_id, revoke_digest, spend_digest
from tessera.core.errors import Conflict, Invalid, Missing, PaymentRequired, Refused
from tessera.core.hashing import keccak
from tessera.core.signing import AccountKey
from tessera.incentives.spend_twin import NO_ONE, Limits

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world() -> Spending:
    return await spending_world()


# --- paying -----------------------------------------------------------------------------------------------------------


async def test_a_signed_payment_goes_from_the_owner_straight_to_the_payee(world: Spending) -> None:
    payment = world.payment()
    receipt = await world.send(payment, world.sign(payment))
    (spent,) = decode_events(SpendPolicy.Spent, world.policy.address, receipt)
    assert (spent.mandate, spent.intent, spent.payee) == (world.mandate, payment.intent, PAYEE)
    assert (spent.amount, spent.purpose) == (50, PURPOSE)
    assert await world.coin.balanceOf(PAYEE) == 50
    assert await world.left() == FUNDS - 50
    assert await world.coin.balanceOf(world.policy.address) == 0
    assert await world.policy.paid(world.mandate, payment.intent)


async def test_an_intent_is_paid_once(world: Spending) -> None:
    payment = await world.pay()
    with pytest.raises(Conflict, match="intent is already paid"):
        await world.send(payment, world.sign(payment))
    with pytest.raises(Conflict, match="intent is already paid"):  # another amount is not another intent
        await world.pay(intent=payment.intent, amount=1)
    assert await world.left() == FUNDS - 50


async def test_a_refused_payment_leaves_its_intent_open(world: Spending) -> None:
    payment = world.payment(amount=101)
    with pytest.raises(Refused, match="above the cap per payment"):
        await world.send(payment, world.sign(payment))
    await world.pay(intent=payment.intent)


async def test_a_payment_has_its_hours(world: Spending) -> None:
    with pytest.raises(Refused, match="payment is not yet valid"):
        await world.pay(valid_after=world.now)
    with pytest.raises(Invalid, match="payment is expired"):
        await world.pay(valid_before=world.now)
    await world.pay(valid_after=world.now - 1, valid_before=world.now + 1)


async def test_only_listed_payees_are_paid(world: Spending) -> None:
    with pytest.raises(Refused, match="payee is not listed"):
        await world.pay(payee=OTHER_PAYEE)
    await world.pay()


async def test_an_empty_list_means_nobody(world: Spending) -> None:
    mandate = await world.open(payees=[])
    with pytest.raises(Refused, match="payee is not listed"):
        await world.pay(mandate=mandate)


async def test_anybody_is_paid_only_where_the_mandate_says_so(world: Spending) -> None:
    mandate = await world.open(world.limits(any_payee=True), payees=[])
    await world.pay(mandate=mandate, payee=OTHER_PAYEE)
    for nobody in (NO_ONE, world.policy.address):
        with pytest.raises(Invalid, match="bad payee"):
            await world.pay(mandate=mandate, payee=nobody)


async def test_a_payment_of_nothing_is_refused(world: Spending) -> None:
    with pytest.raises(Invalid, match="nothing to pay"):
        await world.pay(amount=0)


async def test_one_payment_stays_within_its_cap(world: Spending) -> None:
    with pytest.raises(Refused, match="above the cap per payment"):
        await world.pay(amount=101, cosigner=COSIGNER)
    with pytest.raises(Refused, match="above the cap per payment"):
        await world.pay(amount=2**256 - 1, cosigner=COSIGNER)
    await world.pay(amount=100, cosigner=COSIGNER)


async def test_a_period_stays_within_its_cap(world: Spending) -> None:
    for _ in range(5):
        await world.pay()
    with pytest.raises(Refused, match="above the cap per period"):
        await world.pay(amount=1)
    assert await world.policy.available(world.mandate) == 0
    assert await world.policy.spent(world.mandate) == 250


async def test_no_window_of_a_period_exceeds_the_cap_at_any_edge(world: Spending) -> None:
    """A period of its own beginning (a calendar day) would let 500 go within a minute."""
    world.wait(DAY // 6 - 1)  # the last second of a tick
    for _ in range(5):
        await world.pay()
    for _ in range(6):
        with pytest.raises(Refused, match="above the cap per period"):
            await world.pay(amount=1)
        world.wait(DAY // 6)
    with pytest.raises(Refused, match="above the cap per period"):
        await world.pay(amount=1)  # a day later to the second
    world.wait(1)
    for _ in range(5):
        await world.pay()


async def test_a_unit_comes_back_at_most_a_sixth_of_the_period_late(world: Spending) -> None:
    for _ in range(5):
        await world.pay()  # in the first second of a tick
    world.wait(DAY + DAY // 6 - 1)
    assert await world.policy.available(world.mandate) == 0
    world.wait(1)
    assert await world.policy.available(world.mandate) == 100


async def test_the_room_that_is_left_is_told(world: Spending) -> None:
    assert await world.policy.available(world.mandate) == 100
    for _ in range(4):
        await world.pay()
    assert await world.policy.available(world.mandate) == 50
    world.wait(10 * DAY)
    assert await world.policy.available(world.mandate) == 0
    with pytest.raises(Missing, match="no such mandate"):
        await world.policy.available(LABEL)
    with pytest.raises(Missing, match="no such mandate"):
        await world.policy.spent(LABEL)


async def test_above_the_threshold_the_co_signer_signs_too(world: Spending) -> None:
    await world.pay(amount=60)
    with pytest.raises(Refused, match="needs the co-signer"):
        await world.pay(amount=61)
    await world.pay(amount=61, cosigner=COSIGNER)


@pytest.mark.parametrize("wrong", [AGENT, OWNER, OPERATOR])
async def test_nobody_stands_in_for_the_co_signer(world: Spending, wrong: AccountKey) -> None:
    with pytest.raises(Refused, match="needs the co-signer"):
        await world.pay(amount=61, cosigner=wrong)


@pytest.mark.parametrize("field", ["payee", "amount", "intent", "purpose", "mandate"])
async def test_the_co_signer_signs_one_payment(world: Spending, field: str) -> None:
    payment = world.payment(amount=70)
    values = {"payee": OTHER_PAYEE, "amount": 71, "intent": LABEL, "purpose": LABEL, "mandate": LABEL}
    other = payment._replace(**{field: values[field]})
    with pytest.raises(Refused, match="needs the co-signer"):
        await world.send(payment, world.sign(payment), world.cosign(other))


async def test_without_a_co_signer_nothing_above_the_threshold_is_paid(world: Spending) -> None:
    mandate = await world.open(cosigner=NO_ONE)
    await world.pay(mandate=mandate, amount=60)
    for signature in (None, b"", bytes(65)):
        payment = world.payment(mandate=mandate, amount=61)
        with pytest.raises(Refused, match="needs the co-signer"):
            await world.send(payment, world.sign(payment), signature)


async def test_an_expired_mandate_pays_nothing(world: Spending) -> None:
    mandate = await world.open(world.limits(expires_at=world.now + 100))
    world.wait(99)
    await world.pay(mandate=mandate)
    world.wait(1)
    with pytest.raises(Refused, match="mandate is expired"):
        await world.pay(mandate=mandate)


async def test_an_unknown_mandate_pays_nothing(world: Spending) -> None:
    with pytest.raises(Missing, match="no such mandate"):
        await world.pay(mandate=LABEL)


async def test_the_owners_allowance_is_a_limit_of_its_own(world: Spending) -> None:
    await world.coin.approve(OWNER, world.policy.address, 49)
    with pytest.raises(Refused, match="amount exceeds allowance"):
        await world.pay()
    await world.coin.approve(OWNER, world.policy.address, APPROVED)
    await world.coin.transfer(OWNER, OTHER_PAYEE, FUNDS - 49)
    with pytest.raises(PaymentRequired, match="amount exceeds balance"):
        await world.pay()
    assert await world.policy.spent(world.mandate) == 0


async def test_a_coin_that_fails_to_pay_reverts_the_payment(world: Spending) -> None:
    """Its code answers false to everything."""
    liar = (await world.local.client().send(OWNER, None, bytes.fromhex("6005600c60003960056000f360206000f3"))).contract
    assert liar
    mandate = await world.open(asset=liar)
    payment = world.payment(mandate=mandate)
    with pytest.raises(Refused, match="transfer failed"):
        await world.send(payment, world.sign(payment))
    assert not await world.policy.paid(mandate, payment.intent)


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signer", [OWNER, OPERATOR, COSIGNER, THIEF])
async def test_only_the_agent_signs_payments(world: Spending, signer: AccountKey) -> None:
    with pytest.raises(Invalid, match="not the agent's signature"):
        await world.pay(signer)


@pytest.mark.parametrize("kind", ["Spend", "Cosign", "Revoke"])
async def test_the_digests_are_what_eip_712_says(world: Spending, kind: str) -> None:
    payment = world.payment()
    names = ("mandate", "payee", "amount", "intent", "purpose", "validAfter", "validBefore")
    kinds = ("bytes32", "address", "uint256", "bytes32", "bytes32", "uint256", "uint256")
    length = 1 if kind == "Revoke" else 7
    signable = encode_typed_data(
        {
            "name": "Tessera spend policy",
            "version": "1",
            "chainId": CHAIN_ID,
            "verifyingContract": world.policy.address,
        },
        {kind: [{"name": name, "type": t} for name, t in zip(names[:length], kinds[:length], strict=True)]},
        dict(zip(names[:length], payment[:length], strict=True)),
    )
    signed = EthAccount.sign_message(signable, AGENT.secret)
    where, policy = (CHAIN_ID, world.policy.address), world.policy
    ours, theirs = {
        "Spend": (spend_digest(*where, payment), await policy.digest(payment)),
        "Cosign": (cosign_digest(*where, payment), await policy.cosign_digest(payment)),
        "Revoke": (revoke_digest(*where, world.mandate), await policy.revoke_digest(world.mandate)),
    }[kind]
    assert bytes(signed.message_hash) == ours == theirs
    assert bytes(signed.signature) == AGENT.sign_digest(ours)


async def test_the_domain_is_this_chains_and_this_contracts(world: Spending) -> None:
    kind = keccak(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)")
    names = keccak(b"Tessera spend policy") + keccak(b"1")
    bound = abi.encode(("uint256", "address"), (CHAIN_ID, world.policy.address))
    assert await world.policy.DOMAIN_SEPARATOR() == keccak(kind + names + bound)


# --- opening ----------------------------------------------------------------------------------------------------------


async def test_what_was_opened_can_be_read(world: Spending) -> None:
    mandate = await world.policy.mandates(world.mandate)
    assert mandate[:7] == (OWNER.account, *world.terms())
    assert (mandate.parent, mandate.root, mandate.level) == (bytes(32), world.mandate, 0)
    assert await world.policy.limits(world.mandate) == world.limits()
    assert await world.policy.payees(world.mandate, PAYEE)
    assert not await world.policy.payees(world.mandate, OTHER_PAYEE)


async def test_opening_tells_everything(world: Spending) -> None:
    limits = world.limits(any_payee=True)
    receipt = await world.policy.open(OWNER, LABEL, world.terms(), limits, [PAYEE, OTHER_PAYEE])
    mandate, where = mandate_id(OWNER.account, LABEL), world.policy.address
    (opened,) = decode_events(SpendPolicy.Opened, where, receipt)
    assert (opened.mandate, opened.owner, opened.agent, opened.parent) == (
        mandate, OWNER.account, AGENT.account, bytes(32),
    )  # fmt: skip
    assert (opened.agent, opened.operator, opened.cosigner, opened.asset, opened.period, opened.delay) == world.terms()
    (limited,) = decode_events(SpendPolicy.Limited, where, receipt)
    told = (limited.per_payment, limited.per_period, limited.cosign_above, limited.expires_at, limited.any_payee)
    assert (limited.mandate, told) == (mandate, limits)
    listed = decode_events(SpendPolicy.Listed, where, receipt)
    assert [(e.mandate, e.payee, e.allowed) for e in listed] == [
        (mandate, PAYEE, True), (mandate, OTHER_PAYEE, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("terms", "limits", "reason"),
    [
        ({"asset": PAYEE}, {}, "asset is no contract"),
        ({"delay": HOUR - 1}, {}, "bad delay"),
        ({"delay": 366 * DAY + 1}, {}, "bad delay"),
        ({"period": 59}, {}, "bad period"),
        ({"period": 366 * DAY + 1}, {}, "bad period"),
        ({"agent": NO_ONE}, {}, "bad agent"),
        ({"agent": OWNER.account}, {}, "bad agent"),
        ({"agent": OPERATOR.account}, {}, "bad agent"),
        ({"agent": COSIGNER.account}, {}, "bad agent"),
        ({}, {"per_payment": 2**128}, "cap too large"),
        ({}, {"per_period": 2**128}, "cap too large"),
    ],
)
async def test_a_mandate_must_make_sense(
    world: Spending, terms: dict[str, Any], limits: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Invalid, match=reason):
        await world.open(world.limits(**limits), **terms)


async def test_the_widest_mandate_still_counts_right(world: Spending) -> None:
    widest = 2**128 - 1
    limits = Limits(widest, widest, widest, 2**256 - 1)
    mandate = await world.open(limits, period=60, delay=366 * DAY)
    await world.pay(mandate=mandate, amount=5_000)
    assert await world.policy.available(mandate) == widest - 5_000


async def test_a_label_serves_once_for_each_owner(world: Spending) -> None:
    await world.policy.open(OWNER, LABEL, world.terms(), world.limits(), [])
    with pytest.raises(Conflict, match="label is taken"):
        await world.policy.open(OWNER, LABEL, world.terms(), world.limits(), [])
    await world.policy.open(THIEF, LABEL, world.terms(), world.limits(), [])
    assert mandate_id(OWNER.account, LABEL) != mandate_id(THIEF.account, LABEL)


async def test_who_opens_a_mandate_opens_it_over_his_own_money(world: Spending) -> None:
    await world.policy.open(THIEF, LABEL, world.terms(agent=CHILD.account), world.limits(), [PAYEE])
    with pytest.raises(Refused, match="amount exceeds allowance"):
        await world.pay(CHILD, mandate=mandate_id(THIEF.account, LABEL))
    assert await world.left() == FUNDS


# --- handing down -----------------------------------------------------------------------------------------------------


async def test_a_child_counts_against_every_mandate_above(world: Spending) -> None:
    child = await world.delegate(world.mandate, AGENT, CHILD)
    grandchild = await world.delegate(child, CHILD, GRANDCHILD)
    await world.pay(GRANDCHILD, mandate=grandchild, amount=10)
    await world.pay(CHILD, mandate=child, amount=20)
    await world.pay(amount=40)
    assert [await world.policy.spent(m) for m in (world.mandate, child, grandchild)] == [70, 30, 10]
    assert [await world.policy.available(m) for m in (world.mandate, child, grandchild)] == [100, 100, 100]
    for _ in range(3):
        await world.pay()
    assert [await world.policy.available(m) for m in (world.mandate, child, grandchild)] == [30, 30, 30]


@pytest.mark.parametrize(
    ("wider", "change", "reason"),
    [
        ({"per_payment": 1_000}, {"amount": 101}, "above the cap per payment"),
        ({"cosign_above": 1_000}, {"amount": 61}, "needs the co-signer"),
        ({"any_payee": True}, {"payee": OTHER_PAYEE}, "payee is not listed"),
    ],
)
async def test_a_child_can_do_no_more_than_its_parent(
    world: Spending, wider: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    child = await world.delegate(world.mandate, AGENT, CHILD, world.limits(**wider))
    grandchild = await world.delegate(child, CHILD, GRANDCHILD, world.limits(**wider))
    for signer, mandate in ((CHILD, child), (GRANDCHILD, grandchild)):
        with pytest.raises(Refused, match=reason):
            await world.pay(signer, mandate=mandate, **change)


async def test_a_childs_longer_life_and_shorter_period_do_not_help(world: Spending) -> None:
    child = await world.delegate(world.mandate, AGENT, CHILD, world.limits(expires_at=2**64), period=60)
    for _ in range(5):
        await world.pay(CHILD, mandate=child)
        world.wait(100)
    with pytest.raises(Refused, match="above the cap per period"):
        await world.pay(CHILD, mandate=child)
    world.wait(10 * DAY)
    with pytest.raises(Refused, match="mandate is expired"):
        await world.pay(CHILD, mandate=child)


async def test_a_childs_own_limits_bind_it_and_nobody_else(world: Spending) -> None:
    child = await world.delegate(world.mandate, AGENT, CHILD, world.limits(per_payment=10, per_period=15))
    await world.pay(CHILD, mandate=child, amount=10)
    with pytest.raises(Refused, match="above the cap per payment"):
        await world.pay(CHILD, mandate=child, amount=11)
    with pytest.raises(Refused, match="above the cap per period"):
        await world.pay(CHILD, mandate=child, amount=6)
    await world.pay(amount=60)


async def test_an_intent_is_paid_once_by_a_parent_and_its_children_together(world: Spending) -> None:
    child = await world.delegate(world.mandate, AGENT, CHILD)
    payment = await world.pay(CHILD, mandate=child)
    with pytest.raises(Conflict, match="intent is already paid"):
        await world.pay(intent=payment.intent)
    await world.pay(mandate=await world.open(), intent=payment.intent)  # another mandate, another book


async def test_only_the_agent_hands_down(world: Spending) -> None:
    for sender in (OWNER, OPERATOR, COSIGNER, THIEF):
        with pytest.raises(Refused, match="not the agent"):
            await world.delegate(world.mandate, sender, CHILD)
    with pytest.raises(Refused, match="not the agent"):
        await world.delegate(LABEL, AGENT, CHILD)


async def test_handing_down_ends_at_the_grandchild(world: Spending) -> None:
    child = await world.delegate(world.mandate, AGENT, CHILD)
    grandchild = await world.delegate(child, CHILD, GRANDCHILD)
    with pytest.raises(Refused, match="too many levels"):
        await world.delegate(grandchild, GRANDCHILD, THIEF)
    mandate = await world.policy.mandates(grandchild)
    assert mandate[:7] == (OWNER.account, *world.terms(agent=GRANDCHILD.account))
    assert (mandate.parent, mandate.root, mandate.level) == (child, world.mandate, 2)


async def test_a_child_must_make_sense_too(world: Spending) -> None:
    for nonsense in (COSIGNER, OWNER, OPERATOR):
        with pytest.raises(Invalid, match="bad agent"):
            await world.delegate(world.mandate, AGENT, nonsense)
    with pytest.raises(Invalid, match="bad period"):
        await world.delegate(world.mandate, AGENT, CHILD, period=59)
    await world.delegate(world.mandate, AGENT, CHILD)
    with pytest.raises(Conflict, match="label is taken"):
        await world.delegate(world.mandate, AGENT, GRANDCHILD)


# --- revoking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [OWNER, OPERATOR, AGENT])
async def test_whoever_may_ends_a_mandate_at_once(world: Spending, who: AccountKey) -> None:
    receipt = await world.policy.revoke(who, world.mandate)
    (event,) = decode_events(SpendPolicy.Revoked, world.policy.address, receipt)
    assert (event.mandate, event.sender) == (world.mandate, who.account)
    with pytest.raises(Refused, match="mandate is revoked"):
        await world.pay()
    assert await world.policy.available(world.mandate) == 0
    assert await world.policy.revoked(world.mandate)


@pytest.mark.parametrize("who", [OWNER, OPERATOR, AGENT])
async def test_an_agent_without_gas_ends_its_mandate_by_signature(world: Spending, who: AccountKey) -> None:
    digest = revoke_digest(CHAIN_ID, world.policy.address, world.mandate)
    receipt = await world.policy.revoke(RELAYER, world.mandate, who.sign_digest(digest))
    (event,) = decode_events(SpendPolicy.Revoked, world.policy.address, receipt)
    assert event.sender == who.account
    with pytest.raises(Refused, match="mandate is revoked"):
        await world.pay()


async def test_nobody_else_ends_a_mandate(world: Spending) -> None:
    digest = revoke_digest(CHAIN_ID, world.policy.address, world.mandate)
    for stranger in (COSIGNER, THIEF, CHILD):
        with pytest.raises(Refused, match="may not stop this"):
            await world.policy.revoke(stranger, world.mandate)
        with pytest.raises(Refused, match="may not stop this"):
            await world.policy.revoke(AGENT, world.mandate, stranger.sign_digest(digest))
    with pytest.raises(Refused, match="may not stop this"):
        await world.policy.revoke(OWNER, LABEL)


async def test_a_malformed_signature_is_not_an_empty_operators(world: Spending) -> None:
    mandate = await world.open(operator=NO_ONE)
    for malformed in (b"\x01", bytes(65)):
        with pytest.raises(Refused, match="may not stop this"):
            await world.policy.revoke(THIEF, mandate, malformed)


async def test_who_ends_a_parent_ends_its_children(world: Spending) -> None:
    child = await world.delegate(world.mandate, AGENT, CHILD)
    grandchild = await world.delegate(child, CHILD, GRANDCHILD)
    with pytest.raises(Refused, match="may not stop this"):
        await world.policy.revoke(GRANDCHILD, child)
    await world.policy.revoke(AGENT, grandchild)
    with pytest.raises(Refused, match="mandate is revoked"):
        await world.pay(GRANDCHILD, mandate=grandchild)
    await world.pay(CHILD, mandate=child)
    await world.policy.revoke(OWNER, world.mandate)
    with pytest.raises(Refused, match="mandate is revoked"):
        await world.pay(CHILD, mandate=child)


# --- changing limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [OWNER, OPERATOR, AGENT])
async def test_tightening_counts_at_once(world: Spending, who: AccountKey) -> None:
    narrower = world.limits(per_payment=10, per_period=15, cosign_above=5, expires_at=world.now + HOUR)
    await world.policy.tighten(who, world.mandate, narrower, [])
    assert await world.policy.limits(world.mandate) == narrower
    await world.pay(amount=5)
    with pytest.raises(Refused, match="needs the co-signer"):
        await world.pay(amount=6)
    with pytest.raises(Refused, match="above the cap per payment"):
        await world.pay(amount=11)
    world.wait(HOUR)
    with pytest.raises(Refused, match="mandate is expired"):
        await world.pay(amount=1)


async def test_a_cap_below_what_is_spent_lets_nothing_more_go(world: Spending) -> None:
    for _ in range(4):
        await world.pay()
    await world.policy.tighten(OPERATOR, world.mandate, world.limits(per_period=20), [])
    assert await world.policy.available(world.mandate) == 0
    with pytest.raises(Refused, match="above the cap per period"):
        await world.pay(amount=1)


async def test_payees_are_dropped_at_once(world: Spending) -> None:
    receipt = await world.policy.tighten(OPERATOR, world.mandate, world.limits(), [PAYEE])
    (event,) = decode_events(SpendPolicy.Listed, world.policy.address, receipt)
    assert (event.payee, event.allowed) == (PAYEE, False)
    with pytest.raises(Refused, match="payee is not listed"):
        await world.pay()


@pytest.mark.parametrize(
    "looser",
    [{"per_payment": 101}, {"per_period": 251}, {"cosign_above": 61}, {"expires_at": 2**40}, {"any_payee": True}],
)
async def test_nothing_is_loosened_at_once(world: Spending, looser: dict[str, Any]) -> None:
    for who in (OWNER, OPERATOR):
        with pytest.raises(Refused, match="looser limits must be proposed"):
            await world.policy.tighten(who, world.mandate, world.limits(**looser), [])


async def test_nobody_else_tightens(world: Spending) -> None:
    with pytest.raises(Refused, match="may not stop this"):
        await world.policy.tighten(THIEF, world.mandate, world.limits(), [])


@pytest.mark.parametrize("who", [OWNER, OPERATOR])
async def test_a_looser_limit_waits_in_the_open(world: Spending, who: AccountKey) -> None:
    looser = world.limits(per_payment=200, cosign_above=200, any_payee=True)
    receipt = await world.policy.propose(who, world.mandate, looser, [OTHER_PAYEE])
    (event,) = decode_events(SpendPolicy.Proposed, world.policy.address, receipt)
    told = (event.per_payment, event.per_period, event.cosign_above, event.expires_at, event.any_payee)
    assert (event.mandate, event.due, told) == (world.mandate, world.now + 2 * DAY, looser)
    assert event.payees == [OTHER_PAYEE]
    world.wait(2 * DAY - 1)
    with pytest.raises(Refused, match="proposal is not yet due"):
        await world.policy.loosen(RELAYER, world.mandate, looser, [OTHER_PAYEE])
    world.wait(1)
    await world.policy.loosen(RELAYER, world.mandate, looser, [OTHER_PAYEE])
    assert await world.policy.limits(world.mandate) == looser
    await world.pay(amount=200, payee=OTHER_PAYEE)
    with pytest.raises(Missing, match="no such proposal"):
        await world.policy.loosen(RELAYER, world.mandate, looser, [OTHER_PAYEE])


async def test_what_was_proposed_and_nothing_else_comes_into_force(world: Spending) -> None:
    looser = world.limits(per_payment=200)
    with pytest.raises(Missing, match="no such proposal"):
        await world.policy.loosen(RELAYER, world.mandate, looser, [])
    await world.policy.propose(OPERATOR, world.mandate, looser, [])
    world.wait(2 * DAY)
    for limits, payees in ((looser._replace(per_payment=201), []), (looser, [OTHER_PAYEE])):
        with pytest.raises(Missing, match="no such proposal"):
            await world.policy.loosen(RELAYER, world.mandate, limits, payees)


async def test_a_forgotten_proposal_lapses(world: Spending) -> None:
    looser = world.limits(per_payment=200)
    await world.policy.propose(OPERATOR, world.mandate, looser, [])
    world.wait(9 * DAY)
    with pytest.raises(Refused, match="proposal has lapsed"):
        await world.policy.loosen(RELAYER, world.mandate, looser, [])


async def test_tightening_drops_what_was_proposed_before(world: Spending) -> None:
    """Otherwise an owner who narrows a mandate in alarm would see it widened two days later."""
    looser = world.limits(per_payment=200)
    await world.policy.propose(OPERATOR, world.mandate, looser, [])
    await world.policy.tighten(OWNER, world.mandate, world.limits(per_payment=10), [])
    world.wait(2 * DAY)
    with pytest.raises(Missing, match="no such proposal"):
        await world.policy.loosen(RELAYER, world.mandate, looser, [])


async def test_a_later_proposal_takes_the_place_of_an_earlier_one(world: Spending) -> None:
    first, second = world.limits(per_payment=200), world.limits(per_payment=201)
    await world.policy.propose(OPERATOR, world.mandate, first, [])
    world.wait(DAY)
    await world.policy.propose(OPERATOR, world.mandate, second, [])
    world.wait(DAY)
    with pytest.raises(Missing, match="no such proposal"):
        await world.policy.loosen(RELAYER, world.mandate, first, [])
    with pytest.raises(Refused, match="proposal is not yet due"):
        await world.policy.loosen(RELAYER, world.mandate, second, [])


async def test_an_absurd_proposal_never_comes_into_force(world: Spending) -> None:
    absurd = world.limits(per_period=2**128)
    await world.policy.propose(OPERATOR, world.mandate, absurd, [])
    world.wait(2 * DAY)
    with pytest.raises(Invalid, match="cap too large"):
        await world.policy.loosen(RELAYER, world.mandate, absurd, [])


async def test_only_owner_and_operator_propose(world: Spending) -> None:
    for who in (AGENT, COSIGNER, THIEF):
        with pytest.raises(Refused, match="not owner or operator"):
            await world.policy.propose(who, world.mandate, world.limits(), [])


async def test_a_child_is_replaced_not_loosened(world: Spending) -> None:
    child = await world.delegate(world.mandate, AGENT, CHILD)
    with pytest.raises(Refused, match="a child cannot be loosened"):
        await world.policy.propose(OWNER, child, world.limits(), [])


async def test_a_looser_limit_does_not_bring_back_what_was_revoked(world: Spending) -> None:
    looser = world.limits(per_payment=200, expires_at=world.now + 50 * DAY)
    await world.policy.propose(OPERATOR, world.mandate, looser, [])
    await world.policy.revoke(AGENT, world.mandate)
    world.wait(2 * DAY)
    await world.policy.loosen(RELAYER, world.mandate, looser, [])
    with pytest.raises(Refused, match="mandate is revoked"):
        await world.pay()


async def test_an_expired_mandate_is_renewed_after_the_delay(world: Spending) -> None:
    world.wait(10 * DAY)
    longer = world.limits()
    await world.policy.propose(OWNER, world.mandate, longer, [])
    world.wait(2 * DAY)
    await world.policy.loosen(RELAYER, world.mandate, longer, [])
    await world.pay()

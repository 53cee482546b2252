"""Mandates, intents and their signatures."""

from __future__ import annotations

from typing import Any

import pytest
from eth_account import Account as EthAccount

from agents_world import (
    AGENT,
    APPROVER,
    ASSET,
    ATTACKER,
    COIN,
    CONTRACT,
    NOW,
    PAYER,
    SELLER,
    make_intent,
    make_mandate,
    units,
)
from tessera.agents.approvals import Call
from tessera.agents.intents import authorize, intent_id, payment_nonce, resource_name
from tessera.agents.mandates import (
    Mandate,
    SignedMandate,
    Spent,
    check_payment,
    parse_asset,
    sign_mandate,
    verify_chain,
)
from tessera.core.errors import Invalid, Refused, UnitMismatch
from tessera.core.signing import recover_account

CHILD = {"payer": PAYER.account, "agent": ATTACKER.account}


def child_of(parent: Mandate, **changes: Any) -> Mandate:
    return make_mandate(agent=ATTACKER.account, parent=parent.id, **changes)


def test_a_mandate_is_signed_as_eip_712_says() -> None:
    mandate = make_mandate(purposes=("data", "chat"))
    fields = [("payer", "address"), ("agent", "address"), ("approver", "address"), ("perPayment", "uint256"),
              ("perPeriod", "uint256"), ("period", "uint256"), ("approveAbove", "uint256"), ("balanceBps", "uint256"),
              ("payees", "address[]"), ("anyPayee", "bool"), ("purposes", "string[]"), ("expiresAt", "uint256"),
              ("parent", "bytes32"), ("salt", "bytes32")]  # fmt: skip
    types = {"Mandate": [{"name": name, "type": kind} for name, kind in fields]}
    domain = {"name": "Tessera mandate", "version": "1", "chainId": 31_337, "verifyingContract": CONTRACT}
    values = [mandate.payer, mandate.agent, mandate.approver, 100, 250, 86_400, 100, 10_000, list(mandate.payees),
              False, ["chat", "data"], mandate.expires_at, bytes(32), bytes(32)]  # fmt: skip
    message = dict(zip([name for name, _ in fields], values, strict=True))
    signed = EthAccount.sign_typed_data(PAYER.secret, domain, types, message)
    assert bytes(signed.signature) == sign_mandate(mandate, PAYER).signature


def test_an_authorization_and_an_approval_are_signed_as_eip_712_says() -> None:
    intent = make_intent(make_mandate())
    made = authorize(intent, COIN, AGENT, NOW + 60)
    fields = {"from": "address", "to": "address", "value": "uint256", "validAfter": "uint256",
              "validBefore": "uint256", "nonce": "bytes32"}  # fmt: skip
    types = {"TransferWithAuthorization": [{"name": name, "type": kind} for name, kind in fields.items()]}
    domain = {"name": "Test USD", "version": "2", "chainId": 31_337, "verifyingContract": CONTRACT}
    message = {"from": AGENT.account, "to": SELLER, "value": 40, "validAfter": 0, "validBefore": NOW + 60,
               "nonce": intent.nonce(AGENT.account)}  # fmt: skip
    assert bytes(EthAccount.sign_typed_data(AGENT.secret, domain, types, message).signature) == made.signature
    call = Call("send_email", {"to": "x@example.com"}, "11" * 32, "22" * 32)
    kinds = {"tool": "string", "arguments": "string", "mandate": "bytes32", "nonce": "bytes32", "expiresAt": "uint256"}
    types = {"Approval": [{"name": name, "type": kind} for name, kind in kinds.items()]}
    message = {"tool": "send_email", "arguments": '{"to":"x@example.com"}', "mandate": b"\x11" * 32,
               "nonce": b"\x22" * 32, "expiresAt": NOW}  # fmt: skip
    signed = EthAccount.sign_typed_data(APPROVER.secret, {"name": "Tessera approval", "version": "1"}, types, message)
    assert recover_account(call.signing_digest(NOW), bytes(signed.signature)) == APPROVER.account


def test_a_mandate_survives_its_journey_and_nothing_else_does() -> None:
    signed = sign_mandate(make_mandate(purposes=("data",), balance_bps=500), PAYER)
    assert SignedMandate.decode(signed.encode()) == signed
    for data in (b"{}", b"[]", signed.encode().replace(b'"any_payee":false', b'"any_payee":0'),
                 signed.encode().replace(b'"payer":', b'"payor":')):  # fmt: skip
        with pytest.raises(Invalid):
            SignedMandate.decode(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"agent": PAYER.account}, {"approver": AGENT.account}, {"approver": PAYER.account}, {"period_s": 59},
        {"balance_bps": 10_001}, {"expires_at": 0}, {"purposes": ("Data",)}, {"salt": "00"}, {"parent": "xy"},
        {"per_period": 2**128}, {"payees": tuple(f"0x{i + 1:040x}" for i in range(33))}, {"any_payee": 1},
        {"asset": ASSET.lower()}, {"asset": "USDC"}, {"period_s": 60.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_mandate_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        make_mandate(**changes)


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("per_payment", {"per_payment": 101}), ("per_period", {"per_period": 251}),
        ("per_period", {"period_s": 3_600}), ("approve_above", {"approve_above": 101}),
        ("payees", {"any_payee": True}), ("payees", {"payees": (ATTACKER.account,)}),
        ("expires_at", {"expires_at": NOW + 31 * 86_400}), ("balance_bps", {"balance_bps": 5_001}),
        ("purposes", {"purposes": ("*",)}), ("payer", {"payer": ATTACKER.account, "agent": PAYER.account}),
        ("asset", {"asset": f"eip155:1/{CONTRACT}"}),
    ],
    ids=str,
)  # fmt: skip
def test_a_child_lies_within_its_parent(rule: str, changes: dict[str, Any]) -> None:
    parent = make_mandate(balance_bps=5_000, purposes=("data",))
    fields = {"agent": ATTACKER.account, "balance_bps": 5_000, "purposes": ("data",), "parent": parent.id}
    make_mandate(**fields).check_within(parent)
    with pytest.raises(Refused) as caught:
        make_mandate(**(fields | changes)).check_within(parent)
    assert caught.value.rule == f"child_{rule}"


def test_only_the_payer_signs_a_root_and_only_the_agent_above_a_child() -> None:
    root = make_mandate()
    child = child_of(root)
    verify_chain([sign_mandate(child, AGENT), sign_mandate(root, PAYER)])
    for chain in (
        [sign_mandate(root, AGENT)],
        [sign_mandate(child, PAYER), sign_mandate(root, PAYER)],
        [sign_mandate(child, AGENT)],
        [sign_mandate(root, PAYER), sign_mandate(root, PAYER)],
        [sign_mandate(child, AGENT)] * 3 + [sign_mandate(root, PAYER)],
        [],
    ):
        with pytest.raises(Invalid):
            verify_chain(chain)


@pytest.mark.parametrize(
    ("rule", "amount", "changes"),
    [
        ("mandate_expired", 1, {"now": NOW + 30 * 86_400}), ("payee", 1, {"payee": ATTACKER.account}),
        ("purpose", 1, {"purpose": "poetry"}), ("per_payment", 101, {"approved": True}),
        ("per_period", 60, {"spent": Spent(paid=101, pending=90)}), ("approval", 91, {}),
        ("balance", 59, {"balance": units(100), "spent": Spent(paid=11)}),
    ],
    ids=str,
)  # fmt: skip
def test_each_limit_refuses_what_is_just_above_it(rule: str, amount: int, changes: dict[str, Any]) -> None:
    mandate = make_mandate(approve_above=90, balance_bps=6_300, purposes=("data",))
    good = {"payee": SELLER, "purpose": "data", "spent": Spent(), "now": NOW, "balance": units(1_000)}

    def check(amount: int, **fields: Any) -> None:
        fields = good | fields
        check_payment(mandate, fields.pop("payee"), units(amount), fields.pop("purpose"), **fields)

    with pytest.raises(Refused) as caught:
        check(amount, **changes)
    assert caught.value.rule == rule
    just_inside = {"mandate_expired": {"now": NOW + 30 * 86_400 - 1}, "payee": {}, "purpose": {}}
    check(amount if rule in just_inside else amount - 1, **just_inside.get(rule, changes))


def test_a_payment_in_two_halves_is_as_large_a_part_of_the_balance_as_in_one() -> None:
    mandate = make_mandate(balance_bps=500)
    check_payment(mandate, SELLER, units(50), "", spent=Spent(), now=NOW, balance=units(1_000))
    with pytest.raises(Refused, match="part of the balance"):
        check_payment(mandate, SELLER, units(25), "", spent=Spent(paid=26), now=NOW, balance=units(974))
    check_payment(mandate, SELLER, units(25), "", spent=Spent(paid=25), now=NOW, balance=units(975))
    with pytest.raises(Invalid, match="say the balance"):
        check_payment(mandate, SELLER, units(1), "", spent=Spent(), now=NOW)


def test_coins_of_two_chains_do_not_mix() -> None:
    with pytest.raises(UnitMismatch):
        check_payment(make_mandate(), SELLER, units(1, f"eip155:1/{CONTRACT}"), "", spent=Spent(), now=NOW)
    for name in (f"eip155:0/{CONTRACT}", f"eip155:01/{CONTRACT}", ASSET.lower(), "USDC"):
        with pytest.raises(Invalid):
            parse_asset(name)


def test_a_nonce_names_the_purchase_and_everything_in_it() -> None:
    terms = (intent_id("a"), AGENT.account, SELLER, resource_name("get", "https://x/cheap"), 40)
    other = (intent_id("b"), PAYER.account, ATTACKER.account, resource_name("get", "https://x/dear"), 41)
    nonces = {payment_nonce(*terms)}
    for i in range(5):
        nonces.add(payment_nonce(*terms[:i], other[i], *terms[i + 1 :]))  # type: ignore[arg-type]
    assert len(nonces) == 6
    assert resource_name("POST", "u", b"1") != resource_name("POST", "u", b"2") != resource_name("POST", "u")


def test_signing_one_purchase_twice_gives_the_same_bytes() -> None:
    intent = make_intent(make_mandate())
    assert authorize(intent, COIN, AGENT, NOW + 60) == authorize(intent, COIN, AGENT, NOW + 60)
    assert authorize(intent, COIN, AGENT, NOW + 90).nonce == authorize(intent, COIN, AGENT, NOW + 60).nonce

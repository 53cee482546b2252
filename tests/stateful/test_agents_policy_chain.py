"""Ledger and contract beside each other: what one refuses, the other refuses, for a parent and a child."""

from __future__ import annotations

import random
from typing import Any

import pytest

from agents_world import (  # noqa: F401
    AGENT,
    APPROVER,
    ATTACKER,
    NOW,
    PAYER,
    SELLER,
    close_ledgers,
    key,
    make_intent,
    make_mandate,
    open_ledger,
)  # fmt: skip
from tessera.agents.approvals import approve, payment_call
from tessera.agents.ledger import IntentLedger
from tessera.agents.mandates import Mandate, asset_id, sign_mandate
from tessera.agents.onchain import compile_mandate, policy_id, policy_payment
from tessera.chain.faces import Coin, SpendPolicy
from tessera.chain.local import LocalChain
from tessera.chain.spending import cosign_digest, spend_digest
from tessera.core.clock import FakeClock
from tessera.core.errors import Invalid, Refused, TesseraError
from tessera.core.signing import AccountKey

CHAIN_ID = 31_337
CHILD = key("child")
pytestmark = pytest.mark.anyio


class Pair:
    """One mandate of the payer's and a child of it, in the ledger and on the chain."""

    def __init__(self, ledger: IntentLedger, policy: SpendPolicy, clock: FakeClock) -> None:
        self.ledger, self.policy, self.clock = ledger, policy, clock

    async def pay(
        self, mandate: Mandate, signer: AccountKey, name: int, amount: int, payee: Any, signed: bool
    ) -> tuple[bool, bool]:
        """Whether the ledger and whether the contract pays it."""
        chain = self.ledger.chain(mandate.id)
        intent = make_intent(mandate, name, amount, payee=payee)
        approval = approve(payment_call(intent, mandate), APPROVER, 2**40) if signed else None
        now = int(self.clock.time())
        payment = policy_payment(intent, chain, valid_after=now - 1, valid_before=now + 3_600)
        signature = signer.sign_digest(spend_digest(CHAIN_ID, self.policy.address, payment))
        cosigned = APPROVER.sign_digest(cosign_digest(CHAIN_ID, self.policy.address, payment)) if signed else None
        try:
            self.ledger.reserve(intent, approval=approval)
            self.ledger.consume(intent.id)
            in_ledger = True
        except Refused:
            in_ledger = False
        try:
            await self.policy.spend(key("relayer"), payment, signature, cosigned)
            on_chain = True
        except TesseraError as error:
            assert "spend_policy: " in error.message  # noqa: PT017
            on_chain = False
        return in_ledger, on_chain


@pytest.mark.parametrize(
    ("seed", "tries"),
    [(1, 12), pytest.param(2, 60, marks=pytest.mark.slow), pytest.param(3, 60, marks=pytest.mark.slow)],
)
async def test_ledger_and_contract_agree_on_every_payment(seed: int, tries: int) -> None:
    rng, clock = random.Random(seed), FakeClock(NOW)
    local = LocalChain(None, chain_id=CHAIN_ID, clock=clock)
    chain = local.client()
    coin = await Coin.deploy(chain, PAYER)
    policy = await SpendPolicy.deploy(chain, PAYER)
    await coin.mint(PAYER, PAYER.account, 10**6)
    await coin.approve(PAYER, policy.address, 10**6)
    asset = asset_id(CHAIN_ID, coin.address)
    root = make_mandate(asset=asset, period_s=7_200, approve_above=60, expires_at=NOW + 40_000)
    child = make_mandate(asset=asset, period_s=7_200, approve_above=30, per_payment=50, per_period=120,
                         agent=CHILD.account, parent=root.id, expires_at=NOW + 30_000)  # fmt: skip
    ledger = open_ledger(root, clock=clock)
    ledger.open(sign_mandate(child, AGENT))
    compiled, below = compile_mandate(root), compile_mandate(child)
    await policy.open(PAYER, compiled.label, compiled.terms, compiled.limits, compiled.payees)
    await policy.delegate(
        AGENT, policy_id([root]), below.label, CHILD.account, below.terms.period, below.limits, below.payees
    )
    pair, paid = Pair(ledger, policy, clock), 0
    for number in range(tries):
        clock.advance(rng.choice((60, 300, 900, 1_500)))
        mandate, signer = rng.choice(((root, AGENT), (child, CHILD)))
        amount = rng.choice((1, 20, 31, 50, 51, 61, 100, 101))
        payee = SELLER if rng.random() < 0.9 else ATTACKER.account
        answers = await pair.pay(mandate, signer, number, amount, payee, rng.random() < 0.5)
        assert answers[0] == answers[1], (number, amount, answers)
        paid += amount * answers[0]
    assert await coin.balanceOf(SELLER) == paid > 0
    assert await coin.balanceOf(ATTACKER.account) == 0
    local.close()


def test_one_key_does_not_get_two_powers() -> None:
    for operator in (PAYER, AGENT, APPROVER):
        with pytest.raises(Invalid):
            compile_mandate(make_mandate(), operator=operator.account)
    with pytest.raises(Invalid):
        compile_mandate(make_mandate(), delay_s=10)

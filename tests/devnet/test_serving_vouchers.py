"""The whole way of the money: a buyer pays, every worker checks it at the chain, and neighbours sign what arrived."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from paid_world import HOUSE, OPERATOR, STAGES, TOKENS, Paid, open_paid
from serving_peers import peer_key
from serving_stack import PRICE, open_stack
from tessera.serving.engine import Sampling
from tessera.serving.income.gate import PaidGate
from tessera.serving.income.purchases import ChainPurchases
from tessera.serving.income.receipts import Receipt, credited
from tessera.serving.income.vouchers import PAYER, Payer, Purchase
from tessera.serving.paying.offers import parse_payment

pytestmark = pytest.mark.anyio


async def test_a_paid_answer_earns_every_stage_what_arrived() -> None:
    stack = await open_stack()
    buyer = await stack.buyer()
    async with open_paid(stack) as paid:
        answer = await paid.ask({"PAYMENT-SIGNATURE": stack.sign(buyer)})
        assert answer.status_code == 200, answer.text
        tokens = answer.json()["usage"]["total_tokens"]
        await paid.sign_everything()
        receipts = _all(gate.book.receipts(_sessions(gate)) for gate in paid.gates)
        vouchers = paid.gates[0].book.drawn(_purchase(paid))
        stage_of = {peer_key(number + 1).id: number for number in range(STAGES)}
        credit = credited(paid.terms, [served.voucher for served in vouchers], receipts, stage_of, STAGES)
        # the last token is sampled and never fed: only the last stage's worker has brought it
        assert [credit[peer_key(number + 1).id] for number in range(STAGES)] == [tokens - 1, tokens - 1, tokens]
        assert all(gate.book.sums(peer_key(0).id) == (tokens - 1, tokens - 1) for gate in paid.gates)
        assert await paid.gates[1]._purchases.paid(vouchers[0].voucher.purchase, 0.0)
    assert await stack.income() == PRICE


@pytest.mark.slow
async def test_for_the_operators_own_key_the_house_pays_the_run() -> None:
    stack = await open_stack()
    async with open_paid(stack) as paid:
        headers = {"Authorization": f"Bearer {OPERATOR}"}
        answer = await paid.ask(headers)
        assert (answer.status_code, "does not have" in answer.text) == (503, True)  # workers see an empty purse
        await paid.shards.settled()
        assert all(gate.book.sums(peer_key(0).id) == (0, 0) for gate in paid.gates)
        await stack.coin.mint(HOUSE, HOUSE.account, PRICE)
        answer = await paid.ask(headers)
        assert answer.status_code == 200, answer.text
        await paid.purse.settle(ChainPurchases(stack.chain, paid.terms, HOUSE))
        most = answer.json()["usage"]["prompt_tokens"] + TOKENS
        assert await stack.income() == paid.terms.cost_up(most)


@pytest.mark.slow
async def test_credit_is_drawn_until_it_is_used_up_and_then_the_house_pays() -> None:
    stack = await open_stack()
    buyer = await stack.buyer()
    credit = parse_payment(stack.sign(buyer))
    async with open_paid(stack) as paid:
        purchase = Purchase.from_x402(credit.payload)
        assert purchase is not None
        for _ in range(2):
            paid.purse.add(purchase)  # told twice, counted once
        PAYER.set(Payer(buyer.account))
        for number in range(2):  # 128 tokens each: of 256 that the price buys, both have room
            tokens = paid.shards.engine.generate([1, 2, 3], Sampling(temperature=0, max_tokens=60))
            await anext(tokens)
            await tokens.aclose()
            await paid.shards.settled()
            assert len(paid.gates[0].book.drawn(purchase.name)) == number + 1
        assert paid.purse.take(Payer(buyer.account), "a", 254).payer == HOUSE.account
        assert paid.purse.take(Payer("0x" + "11" * 20), "b", 5).payer == HOUSE.account  # another's credit is no credit
        assert paid.purse.take(Payer(buyer.account), "c", 240).payer == buyer.account


@pytest.mark.slow
async def test_an_answer_that_its_buyer_cancels_is_signed_for_as_far_as_it_came() -> None:
    stack = await open_stack()
    payment = parse_payment(stack.sign(await stack.buyer()))
    async with open_paid(stack) as paid:
        PAYER.set(Payer(purchase=Purchase.from_x402(payment.payload)))
        tokens = paid.shards.engine.generate([1, 2, 3], Sampling(temperature=0, max_tokens=50))
        for _ in range(4):
            await anext(tokens)
        await tokens.aclose()
        await paid.sign_everything()
        for gate in paid.gates:
            used, got = gate.book.sums(peer_key(0).id)
            assert 6 <= used <= 7 + 16  # what the stages may have made by themselves in the meantime
            assert got == min(used, 7)
        signed = {r.signer: r.tokens for r in paid.gates[2].book.receipts(_sessions(paid.gates[2]))}
        assert signed.keys() == {peer_key(0).id, peer_key(3).id}  # the gateway, and he himself for the stage before
        assert signed[peer_key(0).id] == 7  # the prompt, and four tokens


def _sessions(gate: PaidGate) -> list[str]:
    return [voucher.session for voucher in gate.book.ended(0, 2**40)]


def _purchase(paid: Paid) -> str:
    (voucher,) = paid.gates[0].book.ended(0, 2**40)
    return voucher.purchase.name


def _all(parts: Iterable[list[Receipt]]) -> list[Receipt]:
    return [receipt for part in parts for receipt in part]

"""A gateway that has little vouched for and takes more: longer answers, longer prompts, another prompt beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from gate_world import GATEWAY, GateWorld, voucher
from paid_world import open_paid
from serving_peers import peer_key
from serving_stack import open_stack
from tessera.core.errors import Misbehaviour, Refused, Unavailable
from tessera.core.ids import PeerId
from tessera.serving.engine import Sampling
from tessera.serving.income.dues import SignedDues
from tessera.serving.income.vouchers import PAYER, Payer, Purchase
from tessera.serving.paying.offers import parse_payment

pytestmark = pytest.mark.anyio


async def test_no_prompt_is_longer_than_what_was_bought() -> None:
    budget = await GateWorld().gate.admit(GATEWAY.id, voucher(tokens=10).to_value())
    with pytest.raises(Refused, match="token 11 of 10"):
        budget.reach(0, 11, 11)


async def test_guesses_count_as_if_they_were_right() -> None:
    budget = await GateWorld().gate.admit(GATEWAY.id, voucher(tokens=10).to_value())
    budget.reach(0, 5, 10)
    with pytest.raises(Refused, match="token 11 of 10"):
        budget.reach(6, 7, 11)


async def test_a_session_does_not_go_back_for_another_prompt() -> None:
    budget = await GateWorld().gate.admit(GATEWAY.id, voucher(tokens=100).to_value())
    budget.reach(0, 50, 50)
    with pytest.raises(Misbehaviour, match="a step at 0 after one at 0"):
        budget.reach(0, 50, 50)


async def test_begun_again_and_again_it_computes_twice_its_tokens_at_most() -> None:
    world = GateWorld()
    for _ in range(2):
        await world.serve(voucher(tokens=100), 100)
    with pytest.raises(Refused, match="201 tokens were computed for a session of 100"):
        await world.serve(voucher(tokens=100), 1)


@pytest.mark.slow
async def test_no_worker_computes_beyond_what_was_bought() -> None:
    """A gateway that asks for a short answer and goes on."""
    stack = await open_stack()
    payment = parse_payment(stack.sign(await stack.buyer()))
    async with open_paid(stack) as paid:
        PAYER.set(Payer(purchase=Purchase.from_x402(payment.payload)))
        paid.shards.engine._dues = Short(paid.shards.engine._dues, 5)
        tokens = paid.shards.engine.generate([1, 2, 3], Sampling(temperature=0, max_tokens=50))
        with pytest.raises(Unavailable, match="of 5 that were bought"):
            [await anext(tokens) for _ in range(9)]
        await paid.shards.settled()
        assert all(gate.book.sums(peer_key(0).id)[0] <= 5 for gate in paid.gates)


@dataclass
class Short:
    """The dues of a gateway that vouches for `tokens` and asks for more."""

    dues: SignedDues
    tokens: int

    def voucher(self, session: str, tokens: int) -> list[Any] | None:
        return self.dues.voucher(session, self.tokens)

    def delivered(self, session: str, tokens: Mapping[PeerId, int]) -> None:
        self.dues.delivered(session, tokens)

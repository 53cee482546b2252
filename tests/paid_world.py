"""A closed run of three workers over peers, each with a gate of its own on a chain, behind a gateway that sells."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from chain_support import RUN_ID
from serving_peers import Shards, open_shards, peer_key
from serving_stack import MODEL, PRICE, Stack, completion
from tessera.core.clock import SystemClock
from tessera.core.signing import AccountKey
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.income.book import IncomeBook
from tessera.serving.income.dues import SignedDues
from tessera.serving.income.gate import PaidGate
from tessera.serving.income.purchases import ChainPurchases
from tessera.serving.income.purse import Purse
from tessera.serving.income.receipt_post import ReceiptPost, serve_receipts
from tessera.serving.income.vouchers import Terms
from tessera.serving.local import LocalModel
from tessera.serving.paying.keys import OperatorKeys
from tessera.serving.text import CharTokenizer
from tessera.storage.location import MEMORY

STAGES, TOKENS = 3, 12
OPERATOR, HOUSE = "tsk-operator", AccountKey(b"\x51" * 32)


@dataclass
class Paid:
    """A closed run of three workers behind a gateway."""

    stack: Stack
    terms: Terms
    shards: Shards
    gates: list[PaidGate]
    posts: list[ReceiptPost]  # the gateway's first
    app: Any
    purse: Purse

    async def ask(self, headers: dict[str, str], **changes: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://g") as client:
            body = completion(max_tokens=TOKENS, temperature=0) | changes
            return await client.post("/v1/completions", json=body, headers=headers)

    async def sign_everything(self) -> None:
        """What the loops of a node do now and then."""
        await self.shards.settled()
        for gate, post in zip(self.gates, self.posts[1:], strict=True):
            for peer, session, tokens in gate.ended:
                post.sign(session, peer, tokens)
            gate.ended = []
        for post in self.posts:
            await post.flush()
            assert post.waiting == 0


@asynccontextmanager
async def open_paid(stack: Stack) -> AsyncIterator[Paid]:
    coin, clock = stack.coin, SystemClock()
    offer = stack.payments.offer
    terms = Terms(
        RUN_ID, stack.chain_id, coin.address, await coin.name(), await coin.version(), offer.pay_to, PRICE, 256
    )
    gates, posts = [], []
    purse = Purse(terms, HOUSE, clock)
    for number in range(STAGES):
        purchases = ChainPurchases(stack.chain, terms, AccountKey(bytes([number + 40]) * 32))
        book = IncomeBook(terms, MEMORY)
        gates.append(PaidGate(terms, purchases, book, clock, first=number == 0, gateways=frozenset({peer_key(0).id})))

    def dues(transport: Any, records: list[Any]) -> SignedDues:
        posts.append(ReceiptPost(transport, peer_key(0), RUN_ID, lambda: records, everybody=True))
        return SignedDues(peer_key(0), terms, purse, posts[0], clock)

    async with open_shards(STAGES, gate=gates.__getitem__, dues=dues) as shards:
        for number, transport in enumerate(shards.transports):
            keep, records = gates[number].book.add_receipts, [t.record() for t in shards.transports]
            posts.append(ReceiptPost(transport, peer_key(number + 1), RUN_ID, lambda r=records: r, keep=keep))
            serve_receipts(transport, RUN_ID, gates[number].take)
        model = LocalModel(MODEL, shards.engine, CharTokenizer())
        app = create_app(GatewayConfig(), [model], [OperatorKeys([OPERATOR]), stack.payments])
        yield Paid(stack, terms, shards, gates, posts, app, purse)

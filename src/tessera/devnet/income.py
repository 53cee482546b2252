"""Serving for money in an economy: what a run's manifest says about it, at the workers and at the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import structlog

from tessera.chain.client import RpcChain
from tessera.chain.consent import TallyConsent
from tessera.core.clock import Clock
from tessera.core.ids import PeerId
from tessera.core.signing import AccountKey, PeerKey
from tessera.devnet.served import INCOME
from tessera.p2p.transport import PeerRecord, Transport
from tessera.serving.income.book import IncomeBook
from tessera.serving.income.dues import SignedDues
from tessera.serving.income.gate import Gate, OpenGate, PaidGate
from tessera.serving.income.purchases import ChainPurchases
from tessera.serving.income.purse import Purse
from tessera.serving.income.receipt_post import ReceiptPost, serve_receipts
from tessera.serving.income.tally import Server
from tessera.serving.income.teller import Teller, TellerConfig
from tessera.serving.income.vouchers import Terms
from tessera.training.payee import split_of
from tessera.training.seating import Seated

__all__ = ["open_gate", "serving_dues"]

log = structlog.get_logger()

TALLIES = TellerConfig(period_s=60, grace_s=10, poll_s=2.0)  # of play money; a real run saves the gas
LOOK_S = 0.5  # how often a worker looks for sessions that have ended, and purchases that nobody settles


@asynccontextmanager
async def open_gate(
    seated: Seated, terms: Terms | None, gateways: frozenset[PeerId], keys: tuple[PeerKey, AccountKey], clock: Clock
) -> AsyncIterator[Gate]:
    """A seated worker's gate. While it is open, receipts come and go, and what nobody settles is put on the chain."""
    if terms is None:
        log.info("serving_is_open", run_id=seated.manifest.run_id)
        yield OpenGate()
        return
    peer_key, account_key = keys
    book = IncomeBook(terms, seated.folder / INCOME)
    purchases = ChainPurchases(seated.chain, terms, account_key)
    gate = PaidGate(terms, purchases, book, clock, first=seated.stage == 0, gateways=gateways)
    post = ReceiptPost(
        seated.transport, peer_key, terms.run_id, lambda: seated.roster.records, keep=book.add_receipts
    )  # fmt: skip
    serve_receipts(seated.transport, terms.run_id, gate.take)
    split = await split_of(seated.chain, seated.manifest)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(post.run)
            tasks.start_soon(_keep_up, gate, post)
            if split is not None:
                consent = TallyConsent(terms.chain_id, split.address, terms.run_id)
                teller = Teller(
                    split, consent, terms, Seats(seated), book, purchases, seated.transport, account_key, clock,
                    TALLIES, gateways=gateways,
                )  # fmt: skip
                teller.serve()
                tasks.start_soon(teller.run)
            yield gate
            tasks.cancel_scope.cancel()
    finally:
        book.close()


class Seats:
    """A run's seats as its teller sees them."""

    def __init__(self, seated: Seated) -> None:
        self._seated = seated

    @property
    def stages(self) -> int:
        return self._seated.roster.stages

    def servers(self) -> dict[PeerId, Server]:
        """See `Staff.servers`."""
        flops = self._seated.manifest.model.flops_per_token
        return {seat.peer: Server(seat.account, seat.stage, flops(seat.stage)) for seat in self._seated.roster.everyone}

    def present(self) -> list[PeerRecord]:
        return self._seated.roster.records


async def _keep_up(gate: PaidGate, post: ReceiptPost) -> None:
    while True:
        ended, gate.ended = gate.ended, []
        for peer, session, tokens in ended:
            post.sign(session, peer, tokens)
        await gate.collect()
        await anyio.sleep(LOOK_S)


@asynccontextmanager
async def serving_dues(
    transport: Transport,
    keys: tuple[PeerKey, AccountKey],
    terms: Terms,
    purse: Purse,
    chain: RpcChain,
    workers: Callable[[], list[PeerRecord]],
    clock: Clock,
) -> AsyncIterator[SignedDues]:
    """What a gateway shows its workers. While it is open, receipts go out and the house's payments on the chain."""
    peer_key, house = keys
    post = ReceiptPost(transport, peer_key, terms.run_id, workers, everybody=True)
    purchases = ChainPurchases(chain, terms, house)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(post.run)
        tasks.start_soon(_settle, purse, purchases)
        yield SignedDues(peer_key, terms, purse, post, clock)
        await post.flush()
        tasks.cancel_scope.cancel()


async def _settle(purse: Purse, purchases: ChainPurchases) -> None:
    while True:
        await purse.settle(purchases)
        await anyio.sleep(LOOK_S)

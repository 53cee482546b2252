"""Serving for money in an economy: what a run's manifest says about it, at the workers and at the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import structlog

from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin
from tessera.core.clock import Clock
from tessera.core.ids import PeerId
from tessera.core.signing import AccountKey, PeerKey
from tessera.p2p.transport import PeerRecord, Transport
from tessera.serving.dues import SignedDues
from tessera.serving.gate import Gate, OpenGate, PaidGate
from tessera.serving.income_book import IncomeBook
from tessera.serving.prices import LOT
from tessera.serving.purchases import ChainPurchases
from tessera.serving.purse import Purse
from tessera.serving.receipt_post import ReceiptPost, serve_receipts
from tessera.serving.vouchers import Terms
from tessera.training.manifest import Manifest
from tessera.training.roster import Roster
from tessera.training.seating import Seated

__all__ = ["open_gate", "serving_dues", "serving_terms"]

log = structlog.get_logger()

LOOK_S = 0.5  # how often a worker looks for sessions that have ended, and purchases that nobody settles


async def serving_terms(chain: RpcChain, manifest: Manifest, roster: Roster) -> Terms | None:
    """What this run's workers serve for: the manifest's price buys as many tokens as the model's context has.

    As a price for `LOT` tokens, so that what is metered costs the same to the unit; but for prices so small that this
    would be dearer.

    None where the price is 0: serving is open, and the manifest says so.
    """
    if manifest.price_units == 0:
        return None
    coin, units, tokens = Coin(chain, roster.coin), manifest.price_units, manifest.model.model.context
    if (metered := units * LOT // tokens) > 0:
        units, tokens = metered, LOT
    return Terms(
        run_id=manifest.run_id,
        chain_id=manifest.chain_id,
        asset=roster.coin,
        asset_name=await coin.name(),
        asset_version=await coin.version(),
        pay_to=manifest.payee(roster.share),
        price_units=units,
        price_tokens=tokens,
    )


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
    book = IncomeBook(terms, seated.folder / "income.sqlite")
    purchases = ChainPurchases(seated.chain, terms, account_key)
    gate = PaidGate(terms, purchases, book, clock, first=seated.stage == 0, gateways=gateways)
    post = ReceiptPost(
        seated.transport, peer_key, terms.run_id, lambda: seated.roster.records, keep=book.add_receipts
    )  # fmt: skip
    serve_receipts(seated.transport, terms.run_id, gate.take)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(post.run)
            tasks.start_soon(_keep_up, gate, post)
            yield gate
            tasks.cancel_scope.cancel()
    finally:
        book.close()


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

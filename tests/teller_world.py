"""Four workers at two stages who served for a gateway, the split that their run's buyers pay, and a teller for each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from chain_support import NOW, WORKERS
from gate_world import GATEWAY, TERMS, bought, session, voucher
from serving_peers import open_peers, peer_key
from split_world import WINDOW_S, Splitting, splitting_world
from tessera.core.clock import FakeClock
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.transport import PeerRecord, Transport
from tessera.serving.income.book import IncomeBook, Served
from tessera.serving.income.purchases import FakePurchases
from tessera.serving.income.receipts import Receipt
from tessera.serving.income.tally import Server
from tessera.serving.income.teller import Teller, TellerConfig
from tessera.serving.income.vouchers import Voucher
from tessera.storage.location import MEMORY

STAGES, FLOPS = 2, (10, 30)  # operations per token, by stage
PEERS = [peer_key(number) for number in range(4)]
CONFIG = TellerConfig(period_s=100, grace_s=10, poll_s=5)


@dataclass(frozen=True)
class FixedStaff:
    """The four, two at each stage."""

    records: Sequence[PeerRecord]

    @property
    def stages(self) -> int:
        return STAGES

    def servers(self) -> Mapping[PeerId, Server]:
        return {
            peer.id: Server(key.account, number // 2, FLOPS[number // 2])
            for number, (peer, key) in enumerate(zip(PEERS, WORKERS, strict=True))
        }

    def present(self) -> Sequence[PeerRecord]:
        return self.records


@dataclass
class TellerWorld:
    s: Splitting
    transports: list[Transport]
    books: list[IncomeBook]
    tellers: list[Teller]
    purchases: FakePurchases
    clock: FakeClock

    def serve(self, number: int, *, way: tuple[int, int] = (0, 2), tokens: int = 100, paid: bool = True) -> Voucher:
        """A session of `tokens` over two of the workers, with all its receipts where they belong."""
        paper = voucher(number, tokens, purchase=bought(10 * tokens, number), expires=NOW + 50)
        first, last = way
        if paid:
            self.purchases.on_chain.add(paper.purchase.name)
        for worker in way:
            self.books[worker].save(Served(paper, 1, tokens, tokens, tokens))
        codes = signed(number, PEERS[first], PEERS[last], tokens)
        answer = signed(number, PEERS[last], GATEWAY, tokens)
        self.books[first].add_receipts([codes, answer])
        self.books[last].add_receipts([codes, answer])
        return paper

    async def everybodys_turn(self) -> None:
        """The clock goes round once."""
        for _ in self.tellers:
            self.clock.advance(4 * CONFIG.poll_s)
            for teller in self.tellers:
                await teller.turn()

    async def wait(self) -> None:
        await self.s.world.wait(WINDOW_S)
        self.clock.advance(WINDOW_S)


def signed(number: int, worker: PeerKey, signer: PeerKey, tokens: int) -> Receipt:
    return Receipt(TERMS.run_id, session(number), worker.id, signer.id, tokens).signed_by(signer)


@asynccontextmanager
async def teller_world() -> AsyncIterator[TellerWorld]:
    s = await splitting_world()
    await s.world.wait(1_000)
    await s.world.coin.mint(WORKERS[0], WORKERS[0].account, 1)  # a block, whose time is the chain's
    header = await s.world.chain.header()
    assert header is not None
    clock, purchases = FakeClock(header.timestamp), FakePurchases()
    async with open_peers(4, real=False) as (_, transports):
        staff = FixedStaff([transport.record() for transport in transports])
        books = [IncomeBook(TERMS, MEMORY) for _ in PEERS]
        tellers = [
            Teller(
                s.split, s.consent, TERMS, staff, book, purchases, transport, key, clock, CONFIG,
                gateways=frozenset({GATEWAY.id}),
            )
            for book, transport, key in zip(books, transports, WORKERS, strict=True)
        ]  # fmt: skip
        for teller in tellers:
            teller.serve()
        yield TellerWorld(s, list(transports), books, tellers, purchases, clock)

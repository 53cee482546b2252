"""A worker's gate without peers or a chain: one gateway, buyers who sign, and purchases that a fake chain knows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from chain_support import CHAIN_ID, NOW, RUN_ID, key
from tessera.core.clock import FakeClock
from tessera.core.hashing import keccak
from tessera.core.ids import Account, PeerId
from tessera.core.signing import AccountKey, PeerKey
from tessera.serving.income.book import IncomeBook
from tessera.serving.income.gate import GateLimits, PaidGate
from tessera.serving.income.purchases import FakePurchases, Purchases
from tessera.serving.income.receipts import Receipt
from tessera.serving.income.vouchers import Purchase, Terms, Voucher
from tessera.storage.location import MEMORY

TERMS = Terms(RUN_ID, CHAIN_ID, key("coin").account, "Test USD", "2", key("payee").account, 1_000, 100)
GATEWAY, OTHER_GATEWAY, WORKER, BEFORE = (
    PeerKey(keccak(name)) for name in (b"gateway", b"other", b"worker", b"before")
)
VALID_S = 10**8  # of a purchase: the time of a chain that tests share only goes forward
BUYER = key("buyer")


def session(number: int) -> str:
    return keccak(b"session" + number.to_bytes(4, "big")).hex()[:32]


def bought(
    value: int = 1_000, number: int = 0, *, payer: AccountKey = BUYER, terms: Terms = TERMS, **changes: Any
) -> Purchase:
    """A payment as a buyer signs it; `changes` are made afterwards."""
    plain = Purchase(payer.account, value, 0, NOW + VALID_S, keccak(number.to_bytes(4, "big")), bytes(65))
    signed = replace(plain, signature=payer.sign_digest(plain.digest(terms)))
    return replace(signed, **changes)


def voucher(
    number: int = 0, tokens: int = 100, *, by: PeerKey = GATEWAY, purchase: Purchase | None = None, **changes: Any
) -> Voucher:
    """A gateway's voucher for a session; `changes` are made before it signs."""
    paper = Voucher(RUN_ID, CHAIN_ID, by.id, session(number), tokens, NOW + 300, purchase or bought())
    return replace(paper, **changes).signed_by(by)


@dataclass
class GateWorld:
    """`gate` is of a worker at the first stage, whom `GATEWAY` may ask."""

    purchases: Any = field(default_factory=FakePurchases)
    terms: Terms = TERMS
    first: bool = True
    gateways: frozenset[PeerId] | None = frozenset({GATEWAY.id, OTHER_GATEWAY.id})
    limits: GateLimits = field(default_factory=lambda: GateLimits(unsigned_tokens=250, unpaid_tokens=250, grace_s=5))

    def __post_init__(self) -> None:
        self.clock = FakeClock(NOW)
        self.book = IncomeBook(self.terms, MEMORY)
        self.gate = self.restarted()

    def restarted(self) -> PaidGate:
        """The gate of the same worker after a restart."""
        purchases: Purchases = self.purchases
        return PaidGate(
            self.terms, purchases, self.book, self.clock, first=self.first, gateways=self.gateways, limits=self.limits
        )

    async def serve(self, paper: Voucher, tokens: int, peer: PeerId | None = None) -> None:
        """A whole session of so many tokens."""
        budget = await self.gate.admit(peer or paper.gateway, paper.to_value())
        try:
            budget.reach(0, tokens, tokens)
        finally:
            budget.close()

    def sign(self, number: int, tokens: int, by: PeerKey = GATEWAY) -> None:
        """The gateway's receipt comes."""
        self.gate.take(Receipt(RUN_ID, session(number), WORKER.id, by.id, tokens).signed_by(by))


def stranger(name: str) -> Account:
    return key(name).account

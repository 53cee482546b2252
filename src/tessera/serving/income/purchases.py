"""Is a purchase good? Asked at the chain by each worker for itself.

A purchase that is not on the chain yet is good while its nonce is unused, the payer has the money, and there is time
enough to put it there. An EIP-3009 authorization whose nonce is used is good when that very use paid the run's payee:
the coin tells of the use and of the transfer one after the other, so that neither a cancelled authorization nor another
payment of the same payer passes for it. Permit2 tells of no use: of what is metered, a payer's settlements are summed.
As good as the node that is asked: a worker who does not trust the run's node names another.
"""

from __future__ import annotations

from typing import Protocol

from tessera.chain.faces import Coin, Permit2, X402UptoProxy
from tessera.chain.types import Chain, Log
from tessera.core.errors import Conflict, PaymentRequired, Refused
from tessera.core.ids import Account
from tessera.core.signing import AccountKey
from tessera.serving.income.vouchers import PERMIT2, UPTO_PROXY, Purchase, Terms

__all__ = ["ChainPurchases", "FakePurchases", "Purchases"]

MARGIN_S = 10  # to put an authorization on the chain before it ends


class Purchases(Protocol):
    """What a worker asks about purchases whose signature it has checked."""

    async def paid(self, purchase: Purchase, now: float) -> bool:
        """Whether it is on the chain; False: it can still be put there.

        Raises: Refused for one that neither paid nor can; Unavailable or Late when the chain cannot be asked.
        """
        ...

    async def collect(self, purchase: Purchase) -> None:
        """Put an EIP-3009 one on the chain: its signature lets anybody. Nothing when somebody was first.

        Raises: what the coin says.
        """
        ...

    async def metered(self, payer: Account) -> int:
        """What this payer's metered payments have brought to the run's payee, all together."""
        ...


class FakePurchases:
    """Working purchases without a chain: each can be put there once, but for those whose payer has nothing."""

    def __init__(self, poor: frozenset[Account] = frozenset()) -> None:
        self.poor = poor
        self.on_chain: set[str] = set()
        self.settled: dict[Account, int] = {}  # metered, by payer

    async def paid(self, purchase: Purchase, now: float) -> bool:
        if purchase.name in self.on_chain:
            return True
        if purchase.payer in self.poor or not purchase.valid_after < now < purchase.valid_before - MARGIN_S:
            raise Refused("the purchase can never be paid", rule="purchase")
        return False

    async def collect(self, purchase: Purchase) -> None:
        if purchase.payer in self.poor:
            raise PaymentRequired("the payer has nothing")
        self.on_chain.add(purchase.name)

    async def metered(self, payer: Account) -> int:
        return self.settled.get(payer, 0)


class ChainPurchases:
    """Looks purchases up at the chain.

    Args:
        key: sends what others left unsent, and pays the gas for it.
        since: the first block in which the run can have been paid.
    """

    def __init__(self, chain: Chain, terms: Terms, key: AccountKey, *, since: int = 0) -> None:
        self._terms, self._key, self._since = terms, key, since
        self._coin, self._permit2 = Coin(chain, terms.asset), Permit2(chain, PERMIT2)
        self._proxy = X402UptoProxy(chain, UPTO_PROXY)

    async def paid(self, purchase: Purchase, now: float) -> bool:
        """See `Purchases.paid`. Cost: two or three requests."""
        if purchase.facilitator is not None:
            await self._check_permit(purchase)
        elif await self._coin.authorizationState(purchase.payer, purchase.nonce):
            await self._find(purchase)
            return True
        if not purchase.valid_after < now < purchase.valid_before - MARGIN_S:
            raise Refused("the purchase is not valid now, or not long enough to be put on the chain", rule="purchase")
        if await self._coin.balanceOf(purchase.payer) < purchase.value:
            raise Refused(f"{purchase.payer} does not have the {purchase.value} units that it signed", rule="purchase")
        return False

    async def collect(self, purchase: Purchase) -> None:
        """See `Purchases.collect`."""
        try:
            await self._coin.transferWithAuthorization(
                self._key,
                purchase.payer,
                self._terms.pay_to,
                purchase.value,
                purchase.valid_after,
                purchase.valid_before,
                purchase.nonce,
                *purchase.vrs,
            )
        except Conflict:
            return

    async def metered(self, payer: Account) -> int:
        """See `Purchases.metered`. Cost: two log queries."""
        settled = {event.log.tx_hash for event in await self._proxy.events(X402UptoProxy.Settled, self._since)}
        way = [_topic(payer), _topic(self._terms.pay_to)]
        moved = await self._coin.events(Coin.Transfer, self._since, topics=way)
        return sum(transfer.value for transfer in moved if transfer.log.tx_hash in settled)

    async def _check_permit(self, purchase: Purchase) -> None:
        """Raises `Refused` for one that is used, so that it serves no session any more, or that was not approved."""
        word, bit = divmod(int.from_bytes(purchase.nonce, "big"), 256)
        if await self._permit2.nonceBitmap(purchase.payer, word) >> bit & 1:
            raise Refused("the metered purchase is settled or crossed out", rule="purchase")
        if await self._coin.allowance(purchase.payer, PERMIT2) < purchase.value:
            raise Refused(f"{purchase.payer} has not approved Permit2", rule="purchase")

    async def _find(self, purchase: Purchase) -> None:
        """Raises `Refused` unless the use of its nonce moved its money to the payee."""
        coin, payer = self._coin, _topic(purchase.payer)
        for used in await coin.events(Coin.AuthorizationUsed, self._since, topics=[payer, purchase.nonce]):
            where = used.log
            block, way = where.block_number, [payer, _topic(self._terms.pay_to)]
            moved = await coin.events(Coin.Transfer, block, block, way)
            if any(_follows(transfer.log, where) and transfer.value == purchase.value for transfer in moved):
                return
        raise Refused("the purchase's nonce is used, and did not pay the run's payee", rule="purchase")


def _follows(log: Log, before: Log) -> bool:
    return log.tx_hash == before.tx_hash and log.log_index == before.log_index + 1


def _topic(account: Account) -> bytes:
    return bytes(12) + bytes.fromhex(account[2:])

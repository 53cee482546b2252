"""Prepaid credit: bought by one x402 payment of any amount, spent by the token with an API key.

The money goes to the payee when credit is bought; what is left of a buyer's credit is the operator's promise to serve,
or to pay back (`refund`). A buyer's credit pays its debts first: both are one balance.

Invariants: one payment is credited once, whatever gets lost on the way; a request uses what its tokens cost and never
more than was set aside for it; the key's secret is told to who paid, and to nobody who only saw the payment on chain.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import anyio
from eth_abi.abi import encode as abi_encode

from tessera.core.errors import Invalid, Late, TesseraError, Unavailable
from tessera.core.hashing import keccak, sha256
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey
from tessera.serving.income.vouchers import Purchase
from tessera.serving.paying.allowances import BalanceHold
from tessera.serving.paying.balances import Balances
from tessera.serving.paying.charging import PAYMENT_HEADER, Charge, PaidRequest
from tessera.serving.paying.facilitator import PaymentChain
from tessera.serving.paying.keys import ApiKey, KeyRing, bearer
from tessera.serving.paying.offers import Offer, refuse
from tessera.serving.paying.payments import X402Payments, credit_name
from tessera.serving.paying.prices import TokenPrice

__all__ = ["Bought", "Credit", "CreditConfig", "CreditDesk", "refund"]


@dataclass(frozen=True, slots=True)
class CreditConfig:
    """How much credit can be bought at once, in the asset's smallest unit."""

    least_units: int = 10_000
    most_units: int = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Bought:
    """What a buyer has now. `api_key` is None when it paid with a key of its own."""

    account: Account
    units: int
    api_key: str | None


class Credit:
    """Paying with prepaid credit, by a key that belongs to its payer.

    Args:
        offers: how else a request can be paid, for whom the credit is too small.
    """

    def __init__(
        self,
        balances: Balances,
        price: TokenPrice,
        network: str,
        asset: Account,
        offers: Callable[[PaidRequest], Sequence[Offer]],
    ) -> None:
        self._balances, self._price = balances, price
        self._network, self._asset = network, asset
        self._offers = offers

    def name(self, account: str) -> str:
        """What the balance of an account is called."""
        return credit_name(self._network, self._asset, parse_account(account))

    @property
    def unit(self) -> str:
        return f"{self._network}/{self._asset}"

    async def hold(self, key: ApiKey, request: PaidRequest) -> BalanceHold | None:
        """See `KeyedWay.hold`. None when it is paid otherwise: by who has signed in, or beside its key.

        Raises: PaymentRequired for a bought key whose credit is too small.
        """
        most = self._price.most_up(request)
        reserve = await self._balances.hold(self.name(key.owner), most)
        if reserve is not None:
            return BalanceHold(self._balances, reserve, self._price.cost_down, unit=self.unit, caller=key.owner)
        if key.kind == "session" or PAYMENT_HEADER in request.headers:
            return None
        raise refuse(self._offers(request), request.url, "insufficient_credit")


class CreditDesk:
    """Sells credit and tells what is left of it.

    Args:
        on_bought: told of each payment that bought credit, perhaps again: what workers are shown for its use.
    """

    def __init__(
        self,
        config: CreditConfig,
        payments: X402Payments,
        credit: Credit,
        balances: Balances,
        keys: KeyRing,
        on_bought: Callable[[Purchase], None] | None = None,
    ) -> None:
        self._on_bought = on_bought
        self._config, self._payments, self._credit = config, payments, credit
        self._balances, self._keys = balances, keys

    @property
    def unit(self) -> str:
        return self._credit.unit

    async def buy(self, request: PaidRequest, units: int, retry_secret: str) -> tuple[Bought, dict[str, str]]:
        """Takes the payment that came with `request`, and gives credit for it.

        Args:
            retry_secret: chosen by the buyer; with it the same payment may be sent again within a day when the answer
                got lost, and is credited once. Empty: it may not, since all else about a payment is public.

        Returns: the credit, and the headers that tell of the payment.
        """
        least, most = self._config.least_units, self._config.most_units
        if not least <= units <= most:
            raise Invalid(f"credit is sold from {least} to {most} units at once, not {units}", param="units")
        salt = retry_secret.encode() or secrets.token_bytes(16)
        request = PaidRequest(request.url, sha256(request.digest, salt), request.headers)
        hold = await self._payments.hold_units(request, units, f"{units} units of prepaid credit")
        charge = Charge(hold)
        try:
            headers = await charge.start()
            with anyio.CancelScope(shield=True):
                bought = await self._give(hold.payer, hold.nonce, units, request.headers)
                if self._on_bought is not None and hold.purchase is not None:
                    self._on_bought(hold.purchase)
            return bought, headers
        finally:
            charge.owe()  # the buyer may not hear of it: with its secret, the same payment brings the key again
            await charge.release()

    async def read(self, headers: Mapping[str, str]) -> tuple[ApiKey, str] | None:
        """Whose key came with a request, and what its credit is called."""
        key = await self._keys.find(bearer(headers))
        return None if key is None or key.kind == "operator" else (key, self._credit.name(key.owner))

    async def _give(self, payer: Account, nonce: str, units: int, headers: Mapping[str, str]) -> Bought:
        name = self._credit.name(payer)
        await self._balances.add(name, "bought", units, nonce)
        known = await self._keys.find(bearer(headers))
        theirs = known is not None and known.kind == "credit" and known.owner == payer
        api_key = None if theirs else await self._keys.issue("credit", payer)
        return Bought(payer, (await self._balances.read(name)).units, api_key)


async def refund(
    balances: Balances, chain: PaymentChain, key: AccountKey, coin: Account, name: str, account: Account, units: int
) -> str:
    """Pays `units` of an account's credit back, out of the pocket of `key`.

    Args:
        name: of the account's balance in this coin.

    The credit is gone before the coins move: who is killed in between owes them, and finds the entry.

    Returns: the transaction.

    Raises: Invalid when there is not so much credit; Late or Unavailable when it is not known whether they moved.
    """
    reserve = await balances.hold(name, units) if units > 0 else None
    if reserve is None:
        left = (await balances.read(name)).units
        raise Invalid(f"{units} units cannot be paid back: the credit of {account} is {left}")
    await balances.use(reserve, units)
    data = keccak(b"transfer(address,uint256)")[:4] + abi_encode(["address", "uint256"], [account, units])
    try:
        receipt = await chain.send(key, coin, data)
    except (Late, Unavailable):  # it may still move: the credit stays gone, and its entry says for what
        raise
    except TesseraError:
        await balances.add(name, "refund_failed", units, reserve.id)
        raise
    await balances.add(name, "refunded", 0, receipt.tx_hash)
    return receipt.tx_hash

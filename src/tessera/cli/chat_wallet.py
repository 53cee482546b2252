"""What pays for `tessera chat` by itself: the test money of a state directory in which `tessera up` ran."""

from __future__ import annotations

from pathlib import Path

from tessera.chain.faces import Coin
from tessera.core.amount import Amount
from tessera.devnet.access import open_run, up_urls
from tessera.serving.buyer import Buyer
from tessera.serving.income.vouchers import PERMIT2
from tessera.training.home import Home

__all__ = ["open_buyer"]

BUDGET_REQUESTS = 1_000  # what one conversation may sign for, in whole contexts


async def open_buyer(state_dir: Path, url: str) -> tuple[Buyer, str]:
    """The state directory's buyer, at `url` or at the gateway that `tessera up` runs; and the price, for people.

    Permit2 is approved once where that costs nothing, so that answers are paid by their tokens.

    Raises: Missing when no economy was ever started here; Unavailable when its chain cannot be reached.
    """
    gateway = (url or up_urls(state_dir)["page"]).rstrip("/").removesuffix("/v1")
    async with open_run(state_dir) as run:
        price = run.manifest.price_units
        key = Home.existing(run.home.path).account("buyer")
        coin = Coin(run.chain, run.roster.coin)
        metered = await coin.allowance(key.account, PERMIT2) > 0
        if not metered and await run.chain.gas_price() == 0:
            await coin.approve(key, PERMIT2, 2**256 - 1)
            metered = True
        buyer = Buyer(
            gateway,
            key,
            chain_id=await run.chain.chain_id(),
            asset=run.roster.coin,
            max_units_each=price,
            max_units=price * BUDGET_REQUESTS,
            pay_to=run.roster.share if run.manifest.pay_to == "share" else None,
            metered=metered,
        )
    told = Amount(price, "USD").format(6)
    return buyer, f"at most {told} for an answer, by its tokens" if metered else f"{told} for each answer"

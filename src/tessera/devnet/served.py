"""What a run serves for, and pulling what was earned so. No torch here: commands that only claim import it."""

from __future__ import annotations

from contextlib import closing

from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin
from tessera.devnet.access import OpenRun
from tessera.serving.income.book import IncomeBook
from tessera.serving.income.tally import Tally
from tessera.serving.income.vouchers import Terms
from tessera.training.manifest import Manifest
from tessera.training.payee import split_of
from tessera.training.roster import Roster

__all__ = ["INCOME", "claim_served", "serving_terms"]

INCOME = "income.sqlite"


async def serving_terms(chain: RpcChain, manifest: Manifest, roster: Roster) -> Terms | None:
    """What this run's workers serve for: the manifest's price buys as many tokens as the model's context has.

    None where the price is 0: serving is open, and the manifest says so.
    """
    if manifest.price_units == 0:
        return None
    coin = Coin(chain, roster.coin)
    return Terms(
        run_id=manifest.run_id,
        chain_id=manifest.chain_id,
        asset=roster.coin,
        asset_name=await coin.name(),
        asset_version=await coin.version(),
        pay_to=manifest.payee(roster.share),
        price_units=manifest.price_units,
        price_tokens=manifest.model.model.context,
    )


async def claim_served(run: OpenRun) -> int:
    """Claim what the tallies that this directory knows give its account, and have not paid yet. The units.

    A run without a split, or a directory that has not served in one, has nothing.
    """
    split, file = await split_of(run.chain, run.manifest), run.home.run_folder(run.manifest.run_id) / INCOME
    terms = await serving_terms(run.chain, run.manifest, run.roster)
    if split is None or terms is None or not file.exists():
        return 0
    key, units = run.home.account_key, 0
    with closing(IncomeBook(terms, file)) as book:
        for number in range(await split.tally_count()):
            text = book.tally(number)
            tally = Tally.from_text(text) if text is not None else None
            if tally is None or not tally.units_of(key.account) or await split.counted(tally.leaf(key.account)):
                continue
            if tally.root == (await split.tallies(number)).root:
                mine = tally.units_of(key.account)
                await split.claim(key, number, key.account, mine, tally.proof(key.account))
                units += mine
    return units

"""Selling the model: the gateway over the workers' shards, and the first buyer, who comes in by the front door."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from anyio import to_thread

from tessera.core.clock import Clock
from tessera.devnet.front import Front
from tessera.devnet.income import serving_dues
from tessera.devnet.ledger import give_coins
from tessera.devnet.node import LiveRoster
from tessera.devnet.run import Run
from tessera.devnet.served import serving_terms
from tessera.devnet.text import load_tokenizer, load_validation
from tessera.models.tokenizer import END, Tokenizer
from tessera.serving.buyer import Buyer
from tessera.serving.decoding.shard_engine import ShardEngine, ShardEngineConfig
from tessera.serving.decoding.speculation import NgramDraft
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.income.purse import Purse
from tessera.serving.income.vouchers import Terms
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import Free
from tessera.serving.paying.holdings import HoldingsConfig
from tessera.serving.paying.owners import capacity
from tessera.serving.paying.payments import PaymentConfig
from tessera.serving.paying.prices import TokenPrice
from tessera.serving.paying.till import Till, TillConfig

__all__ = ["gateway", "sell"]

BUYER_UNITS = 100_000_000  # test coins for the first buyer: 100 tUSD
HOUSE_UNITS = 10_000_000  # for the operator's own use, and what is given away to owners
OWNERS_TOKENS_A_DAY = 100_000  # for who holds shares and signs in, in proportion
SAMPLE_TOKENS = 96
TEMPERATURE = 0.5
PYTHON_PROMPTS = (
    "import os\n\ndef ",
    "class Error(Exception):\n    ",
    "    def __init__(self",
    "    def close(self):\n",
    "def main():\n    ",
    "        try:\n            ",
)
PROMPT_TOKENS = 16  # of the validation text, when the run has its own


@asynccontextmanager
async def gateway(run: Run, front: Front, url: str, clock: Clock) -> AsyncIterator[None]:
    """Put the OpenAI interface behind the front door, paid to whom the manifest names, for as long as this is open.

    The manifest's price is that of a request by `exact`, however long; by the token a whole context costs as much.
    """
    model = run.manifest.model.model
    tokenizer = await to_thread.run_sync(load_tokenizer, run.blobs, run.manifest.tokenizer)
    roster, shape = LiveRoster(run.host.roster), ShardEngineConfig(context=model.context, vocab_size=model.vocab_size)
    terms = await serving_terms(run.ledger.chain, run.manifest, run.roster)
    if terms is None:
        served = _served(run, ShardEngine(run.transport, roster, shape, draft=NgramDraft()), tokenizer, clock)
        front.gateway = create_app(GatewayConfig(), [served], [Free()], clock=clock)
        yield
        return
    people, chain = run.people, run.ledger.chain
    await give_coins(run.ledger, run.coin, people.operator, people.operator.account, HOUSE_UNITS)
    where, schema = run.tables.at("purse")
    purse = await to_thread.run_sync(lambda: Purse(terms, people.operator, clock, where=where, schema=schema))
    till = await _till(run, terms, purse, url, clock)
    keys, workers = (run.peer_key, people.operator), lambda: run.host.roster().records
    try:
        async with serving_dues(run.transport, keys, terms, purse, chain, workers, clock) as dues:
            served = _served(
                run, ShardEngine(run.transport, roster, shape, draft=NgramDraft(), dues=dues), tokenizer, clock
            )
            app = create_app(GatewayConfig(), [served], till.ways, clock=clock)
            till.mount(app)
            front.gateway = app
            yield
    finally:
        till.close()
        purse.close()


async def _till(run: Run, terms: Terms, purse: Purse, url: str, clock: Clock) -> Till:
    units = run.manifest.price_units
    price = TokenPrice.of_context(units, run.manifest.model.model.context)
    config = PaymentConfig(terms.asset, terms.asset_name, terms.asset_version, units, terms.pay_to, tokens=price)
    rights = [capacity(OWNERS_TOKENS_A_DAY)]
    return await Till.open(
        TillConfig(config, origin=url, holdings=HoldingsConfig(run.roster.share), rights=rights),
        run.ledger.chain, run.people.operator, clock, tables=run.tables.at, on_bought=purse.add,
    )  # fmt: skip


def _served(run: Run, engine: ShardEngine, tokenizer: Tokenizer, clock: Clock) -> LocalModel:
    return LocalModel(run.manifest.name, engine, tokenizer, stop_tokens=(END,), clock=clock)


async def sell(run: Run, url: str, count: int, after_each: Callable[[], Awaitable[object]]) -> None:
    """The first buyer gets test money and pays for `count` answers, over HTTP like any other."""
    price = run.manifest.price_units
    await give_coins(run.ledger, run.coin, run.people.operator, run.people.buyer.account, BUYER_UNITS)
    buyer = Buyer(
        url,
        run.people.buyer,
        chain_id=run.ledger.chain_id,
        asset=run.coin,
        max_units_each=price,
        max_units=price * count,
        pay_to=run.pay_to,
    )
    room = run.manifest.model.model.context - 2 * PROMPT_TOKENS  # what is read back may be more tokens than it was
    async with buyer:
        for number, prompt in enumerate(await _prompts(run, count)):
            tokens = max(1, min(SAMPLE_TOKENS, room))
            answer = await buyer.complete(
                prompt, model=run.manifest.name, max_tokens=tokens, temperature=TEMPERATURE, seed=number
            )
            run.samples.append((prompt, str(answer["choices"][0]["text"])))
            await after_each()


async def _prompts(run: Run, count: int) -> list[str]:
    """Beginnings of Python, or of the run's own validation text."""
    if run.text.is_python:
        return [PYTHON_PROMPTS[number % len(PYTHON_PROMPTS)] for number in range(count)]
    validation = await to_thread.run_sync(load_validation, run.blobs, run.text.index)
    tokenizer = await to_thread.run_sync(load_tokenizer, run.blobs, run.manifest.tokenizer)
    room = max(1, len(validation) - PROMPT_TOKENS)
    windows = [validation[room * i // count :][:PROMPT_TOKENS] for i in range(count)]
    return [tokenizer.decode([int(token) for token in window]) or " " for window in windows]

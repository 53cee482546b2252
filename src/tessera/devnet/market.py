"""Selling the model: the gateway over the workers' shards, and the first buyer, who comes in by the front door."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from anyio import to_thread

from tessera.chain.faces import Coin
from tessera.core.clock import Clock
from tessera.devnet.front import Front
from tessera.devnet.ledger import give_coins
from tessera.devnet.node import LiveRoster
from tessera.devnet.run import Run
from tessera.devnet.text import load_tokenizer, load_validation
from tessera.models.tokenizer import END
from tessera.serving.buyer import Buyer
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.holdings import HoldingsConfig
from tessera.serving.local import LocalModel
from tessera.serving.owners import capacity
from tessera.serving.payments import PaymentConfig
from tessera.serving.prices import TokenPrice
from tessera.serving.shard_engine import ShardEngine, ShardEngineConfig
from tessera.serving.speculation import NgramDraft
from tessera.serving.till import Till, TillConfig

__all__ = ["open_gateway", "sell"]

BUYER_UNITS = 100_000_000  # test coins for the first buyer: 100 tUSD
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


async def open_gateway(run: Run, front: Front, url: str, clock: Clock) -> Till:
    """Put the OpenAI interface behind the front door, paid to whom the manifest names. Close what it returns.

    The manifest's price is that of a request by `exact`, however long; by the token a whole context costs as much.
    """
    model = run.manifest.model.model
    tokenizer = await to_thread.run_sync(load_tokenizer, run.blobs, run.manifest.tokenizer)
    engine = ShardEngine(
        run.transport,
        LiveRoster(run.host.roster),
        ShardEngineConfig(context=model.context, vocab_size=model.vocab_size),
        draft=NgramDraft(),
    )
    coin = Coin(run.ledger.chain, run.coin)
    config = PaymentConfig(
        asset=run.coin,
        asset_name=await coin.name(),
        asset_version=await coin.version(),
        price_units=run.manifest.price_units,
        pay_to=run.pay_to,
        tokens=TokenPrice.of_context(run.manifest.price_units, model.context),
    )
    till = await Till.open(
        TillConfig(
            config, origin=url, holdings=HoldingsConfig(run.roster.share), rights=[capacity(OWNERS_TOKENS_A_DAY)]
        ),
        run.ledger.chain, run.people.operator, clock, tables=run.tables.at,
    )  # fmt: skip
    served = LocalModel(run.manifest.name, engine, tokenizer, stop_tokens=(END,), clock=clock)
    app = create_app(GatewayConfig(), [served], till.ways, clock=clock)
    till.mount(app)
    front.gateway = app
    return till


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

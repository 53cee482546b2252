"""`tessera chat`: a conversation with the model, each answer paid for through x402 like any other buyer's."""

from __future__ import annotations

from pathlib import Path

import httpx
from anyio import to_thread
from rich.console import Console

from tessera.core.amount import Amount
from tessera.core.errors import TesseraError, Unavailable
from tessera.devnet.access import OpenRun, open_run, up_urls
from tessera.serving.buyer import Buyer
from tessera.training.home import Home

__all__ = ["run_chat"]

BUDGET_REQUESTS = 100  # what one conversation may spend, in requests


async def run_chat(state_dir: Path, url: str, prompt: str, max_tokens: int) -> None:
    """Ask `prompt` once, or read lines until an empty one. Raises what the gateway answers when it cannot serve."""
    gateway = (url or up_urls(state_dir)["page"]).rstrip("/").removesuffix("/v1")
    model = await _model_name(gateway)
    async with open_run(state_dir) as run:
        buyer = await _buyer(run, gateway)
    console = Console()
    price = Amount(run.manifest.price_units, "tUSD").format(6)
    async with buyer:
        if prompt:
            await _ask(buyer, console, model, prompt, max_tokens)
            return
        console.print(f"{model} · {price} for each answer · an empty line ends it", style="dim", highlight=False)
        while question := await to_thread.run_sync(_read_line, abandon_on_cancel=True):
            try:
                await _ask(buyer, console, model, question, max_tokens)
            except TesseraError as error:
                console.print(f"tessera: {error.message}", style="red", highlight=False)
    console.print(f"paid for {buyer.paid_requests} answers", style="dim", highlight=False)


async def _ask(buyer: Buyer, console: Console, model: str, question: str, max_tokens: int) -> None:
    message = {"role": "user", "content": question}
    with console.status("thinking…"):
        answer = await buyer.chat([message], model=model, max_tokens=max_tokens, temperature=0.5)
    console.print(answer["choices"][0]["message"]["content"], highlight=False, markup=False)


async def _model_name(gateway: str) -> str:
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            reply = await client.get(f"{gateway}/v1/models")
            reply.raise_for_status()
            return str(reply.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise Unavailable(f"the gateway at {gateway} is not serving yet ({error.response.status_code})") from error
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise Unavailable(f"no gateway answers at {gateway}: is `tessera up` running?") from error


async def _buyer(run: OpenRun, gateway: str) -> Buyer:
    """The state directory's buyer, whom `tessera up` has given test money."""
    price = run.manifest.price_units
    return Buyer(
        gateway,
        Home.existing(run.home.path).account("buyer"),
        chain_id=await run.chain.chain_id(),
        asset=run.roster.coin,
        max_units_each=price,
        max_units=price * BUDGET_REQUESTS,
        pay_to=run.roster.share if run.manifest.pay_to == "share" else None,
    )


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""

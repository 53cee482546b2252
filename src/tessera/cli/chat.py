"""`tessera chat`: a conversation with a model of any OpenAI-compatible endpoint, in the terminal.

Against the gateway of `tessera up` each answer is paid for like any other buyer's, with test money; elsewhere with an
API key, or with nothing where nothing is asked.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from anyio.from_thread import start_blocking_portal
from rich.console import Console

from tessera.cli.conversation import Chatter, Conversation, answer_once, converse, terminal_line
from tessera.core.errors import Missing, Unavailable
from tessera.serving.asking import Asker, ServedName

__all__ = ["ChatOptions", "run_chat"]

TEMPERATURE = 0.5
MOST_TOKENS = 512  # of an answer, unless more are asked for


@dataclass(frozen=True)
class ChatOptions:
    """Whom to ask, and how."""

    state_dir: Path
    url: str = ""  # an OpenAI-compatible endpoint; empty = the gateway that `tessera up` runs
    api_key: str = ""
    model: str = ""
    prompt: str = ""  # ask once
    max_tokens: int = 0  # of an answer; 0 = a part of the model's context


def run_chat(options: ChatOptions) -> bool:
    """Ask once, or talk until the user ends it. Returns: whether there was an answer, when asked once.

    Raises: Unavailable when nobody answers at the URL; Missing for a model that is not there.
    """
    console = Console(soft_wrap=True)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(_opened(options)) as (chatter, price):
        model = _pick(portal.call(chatter.models), options.model)
        limit = options.max_tokens or min(MOST_TOKENS, model.context // 2 or MOST_TOKENS)
        conversation = Conversation(chatter, model.id, {"max_tokens": limit, "temperature": TEMPERATURE})
        if options.prompt:
            return answer_once(portal, conversation, console, Console(stderr=True), options.prompt)
        if sys.stdin.isatty():
            console.print(f"{model.id} · {price} · /help", style="dim", highlight=False, markup=False)
        converse(portal, conversation, console, terminal_line())
        return True


def _pick(models: list[ServedName], wanted: str) -> ServedName:
    if not models:
        raise Unavailable("the endpoint serves no model")
    found = next((model for model in models if model.id == wanted), None) if wanted else models[0]
    if found is None:
        names = ", ".join(model.id for model in models[:5])
        raise Missing(f"there is no model {wanted!r} there, but {names}")
    return found


@asynccontextmanager
async def _opened(options: ChatOptions) -> AsyncIterator[tuple[Chatter, str]]:
    """Somebody to ask, and what is known of the price."""
    if options.api_key or (options.url and not _has_run(options.state_dir)):
        asker = Asker.open(options.url or _own_gateway(options.state_dir), api_key=options.api_key or None)
        try:
            yield asker, "paid by API key, at a price that is not told" if options.api_key else "no payment is set up"
        finally:
            await asker.aclose()
        return
    from tessera.cli.chat_wallet import open_buyer  # it takes a second to import

    buyer, price = await open_buyer(options.state_dir, options.url)
    async with buyer:
        yield buyer, price


def _has_run(state_dir: Path) -> bool:
    from tessera.training.home import Home

    return (state_dir / "version").exists() and bool(Home.existing(state_dir).runs())


def _own_gateway(state_dir: Path) -> str:
    from tessera.devnet.access import up_urls

    return up_urls(state_dir)["page"]

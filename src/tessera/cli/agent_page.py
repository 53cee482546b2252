"""`tessera agent page`: the questions of all agents of a state directory, on a page of this machine."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import anyio
import typer
from fastapi import FastAPI

from tessera.agents.runtime.home import homes
from tessera.cli.logs import configure_logs
from tessera.core.errors import Missing
from tessera.devnet.http import bind_port, listening
from tessera.web.questions import AgentQuestions, mount_questions

__all__ = ["run_page"]

HOST = "127.0.0.1"  # whoever reaches the page may deny: nobody else's machine does


async def run_page(state_dir: Path, port: int) -> None:
    """Serve until it is stopped. Raises: Missing without an agent; Conflict for a port in use."""
    found = homes(state_dir)
    if not found:
        raise Missing(f"no agent lives in {state_dir}: `tessera agent new` makes one")
    configure_logs("warning", state_dir / "page.log")
    with ExitStack() as stack:
        agents = []
        for home in found:
            approvals = home.approvals()
            stack.callback(approvals.close)
            agents.append(AgentQuestions(home.name, approvals))
        server = stack.enter_context(bind_port(HOST, port))
        app = FastAPI(title="Tessera agents", openapi_url=None, docs_url=None, redoc_url=None)
        mount_questions(app, agents)
        async with listening(app, server) as url:
            typer.echo(f"{url}  Ctrl-C ends it")
            await anyio.sleep_forever()

"""`tessera agent …`: make an agent, run it, answer its questions, look at what it did, stop it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import AsJson, StateDir, default_state_dir
from tessera.core.errors import Invalid

__all__ = ["agent_app"]

agent_app = typer.Typer(
    help="Agents: make one, run it behind the guard, answer its questions, see what it paid, stop it.",
    no_args_is_help=True,
)

Here = StateDir
HERE = default_state_dir("agents")
Name = Annotated[str, typer.Argument(help="The agent: a-z, 0-9, - and _.")]


@agent_app.command("new")
def agent_new(
    name: Name,
    model: Annotated[str, typer.Option(help="What the model is called at its URL.")] = "",
    model_url: Annotated[str, typer.Option(help="An OpenAI-compatible URL.")] = "http://127.0.0.1:8402/v1",
    api_key_env: Annotated[str, typer.Option(help="The variable that holds the URL's API key.")] = "",
    demo: Annotated[bool, typer.Option("--demo", help="Scripted, with a poisoned mailbox: runs offline.")] = False,
    chain: Annotated[str, typer.Option(help="JSON-RPC URL of a chain: gives the agent a purse and a mandate.")] = "",
    coin: Annotated[str, typer.Option(help="The coin's contract (EIP-3009, such as USDC).")] = "",
    per_payment: Annotated[int, typer.Option(help="Most units of one payment.")] = 0,
    per_day: Annotated[int, typer.Option(help="Most units within a day.")] = 0,
    approve_above: Annotated[int, typer.Option(help="Units above which the approver signs each payment.")] = 0,
    payee: Annotated[list[str] | None, typer.Option(help="Who may be paid. Repeat for more; none = anybody.")] = None,
    days: Annotated[int, typer.Option(help="How long the mandate is good.")] = 30,
    approver: Annotated[
        str, typer.Option(help="An account elsewhere that answers questions. Default: a key here.")
    ] = "",
    state_dir: Here = HERE,
    as_json: AsJson = False,
) -> None:
    """Make an agent: a folder with its definition and its keys; with --chain, a mandate signed by the payer."""
    from tessera.cli.agent_new import MandateTerms, NewAgent, run_new
    from tessera.cli.running import run_until_signal

    terms = None
    if chain:
        terms = MandateTerms(chain, coin, per_payment, per_day, approve_above, tuple(payee or ()), days)
    wanted = NewAgent(_folder(state_dir, name), model, model_url, api_key_env, demo, approver, terms)
    run_until_signal(lambda: run_new(wanted, as_json))


@agent_app.command("list")
def agent_list(state_dir: Here = HERE, as_json: AsJson = False) -> None:
    """The agents here: how often they ran, what waits for you."""
    from tessera.cli.agent_view import show_agents

    show_agents(state_dir, as_json)


@agent_app.command("run")
def agent_run(
    name: Name,
    request: Annotated[str, typer.Argument(help="What you want, in your own words: what you name is allowed.")] = "",
    resume: Annotated[str, typer.Option(help="Go on with a run, by its id.")] = "",
    replay: Annotated[str, typer.Option(help="Go through a recorded run again, without model and tools.")] = "",
    ask: Annotated[bool, typer.Option(help="Ask here, on the terminal, whether a call may be made.")] = True,
    state_dir: Here = HERE,
    as_json: AsJson = False,
) -> None:
    """Have an agent do something. What you did not ask for is asked about, here or with `tessera agent approve`."""
    from tessera.cli.agent_run import run_agent
    from tessera.cli.running import run_until_signal

    run_until_signal(lambda: run_agent(_folder(state_dir, name), request, resume, replay, ask=ask, as_json=as_json))


@agent_app.command("approve")
def agent_approve(
    name: Name,
    call: Annotated[str, typer.Argument(help="The first digits of a question. Nothing: shows all that wait.")] = "",
    deny: Annotated[bool, typer.Option("--deny", help="Say no, which needs no key.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask again.")] = False,
    state_dir: Here = HERE,
    as_json: AsJson = False,
) -> None:
    """See what waits for you, with the evidence; allow one call, once, with the approver's key; or deny it."""
    from tessera.cli.agent_view import run_approve

    run_approve(_folder(state_dir, name), call, deny=deny, yes=yes, as_json=as_json)


@agent_app.command("ledger")
def agent_ledger(name: Name, state_dir: Here = HERE, as_json: AsJson = False) -> None:
    """What an agent did and paid: runs, purchases, what is left of its mandate."""
    from tessera.cli.agent_view import show_ledger

    show_ledger(_folder(state_dir, name), as_json)


@agent_app.command("stop")
def agent_stop(
    name: Name,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    state_dir: Here = HERE,
) -> None:
    """End an agent and its mandate, at once and for good: no further call is made, no further payment signed."""
    from tessera.cli.agent_view import run_stop

    run_stop(_folder(state_dir, name), reason)


@agent_app.command("tools")
def agent_tools(
    name: Name,
    accept: Annotated[str, typer.Option(help="A server's tool that changed or is new: take it as it is now.")] = "",
    state_dir: Here = HERE,
    as_json: AsJson = False,
) -> None:
    """The tools an agent has, what the guard takes each for, and whether a server has changed one."""
    from tessera.cli.agent_run import run_tools
    from tessera.cli.running import run_until_signal

    run_until_signal(lambda: run_tools(_folder(state_dir, name), accept, as_json))


@agent_app.command("mcp")
def agent_mcp(
    name: Name,
    request: Annotated[str, typer.Option(help="What its callers may do, as you would ask for it.")] = "",
    state_dir: Here = HERE,
) -> None:
    """Offer an agent's tools and wallet to another agent, as an MCP server on standard input and output."""
    from tessera.cli.agent_run import run_mcp
    from tessera.cli.running import run_until_signal

    run_until_signal(lambda: run_mcp(_folder(state_dir, name), request))


@agent_app.command("page")
def agent_page(
    port: Annotated[int, typer.Option(help="Where the page listens, on this machine only. 0 = any free port.")] = 8412,
    state_dir: Here = HERE,
) -> None:
    """The questions of all agents here on a page: see the evidence, deny, or allow with the approver's wallet."""
    from tessera.cli.agent_page import run_page
    from tessera.cli.running import run_until_signal

    run_until_signal(lambda: run_page(state_dir, port))


def _folder(state_dir: Path, name: str) -> Path:
    """Where an agent lives: right below the state directory, whatever its name says."""
    from tessera.agents.steps import NAME

    if NAME.fullmatch(name) is None:
        raise Invalid(f"an agent is called a-z, 0-9, - and _, at most 64 of them, not {name[:80]!r}")
    return state_dir / name

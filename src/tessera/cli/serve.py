"""`tessera serve` and `tessera hold`: a model behind an OpenAI endpoint, and one stage of somebody else's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from tessera.cli.models import Boundary, Context, Stages
from tessera.cli.options import AsJson, StateDir, choice, default_state_dir
from tessera.core.errors import Invalid

if TYPE_CHECKING:
    from tessera.devnet.library import Import
    from tessera.devnet.model_server import ServeConfig, Served
    from tessera.devnet.model_till import Access, Price
    from tessera.devnet.stage_holding import Holding
    from tessera.models.card import ModelCard
    from tessera.serving.callers import CallerLimits
    from tessera.serving.upstreams.upstream import Target
    from tessera.training.home import Home

__all__ = ["hold", "serve"]

Relay = Annotated[
    list[str] | None, typer.Option(help="A relay's URL, '#' and its token if it asks for one. Repeat for more.")
]


UPSTREAM_CONTEXT = 32_768  # of an upstream's model, when nobody says


class Front(NamedTuple):
    """Where the gateway listens, to whom, and to how many at once."""

    host: str
    port: int
    access: Access
    concurrent: int
    callers: CallerLimits


def serve(
    model: Annotated[
        str, typer.Argument(help="A model of `tessera models list`, a checkpoint folder, or a name for --upstream.")
    ],
    upstream: Annotated[
        list[str] | None,
        typer.Option(
            help="URL up to /v1 of vLLM, SGLang, Ollama or a hosted API that has the model. Repeat for spares."
        ),
    ] = None,
    upstream_model: Annotated[str, typer.Option(help="What the upstream calls it. Default: the same.")] = "",
    upstream_key: Annotated[
        str, typer.Option(envvar="TESSERA_UPSTREAM_KEY", help="The upstream's API key; better in the variable.")
    ] = "",
    stages: Stages = 4,
    boundary: Boundary = "dense",
    context: Context = 0,
    host: Annotated[str, typer.Option(help="Address that the gateway listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the gateway; 0 = any free one.")] = 8410,
    free: Annotated[bool, typer.Option(help="Serve anybody for nothing.")] = False,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Who has it is served; `tessera gateway keys` makes others."),
    ] = None,
    price: Annotated[int, typer.Option(help="Units of the coin for one request, paid with x402; 0 = not paid.")] = 0,
    coin: Annotated[str, typer.Option(help="The coin's contract; it must speak EIP-3009, as USDC does.")] = "",
    pay_to: Annotated[str, typer.Option(help="Account that is paid. Default: this directory's.")] = "",
    chain: Annotated[str, typer.Option(help="JSON-RPC URL of the network that the coin is on.")] = "",
    database: Annotated[str, typer.Option(help="URL of every table about money. Default: files here.")] = "",
    public_url: Annotated[str, typer.Option(help="Scheme and host as users see them, behind a proxy.")] = "",
    invite: Annotated[int, typer.Option(help="How many stages other machines hold; prints an invitation.")] = 0,
    bind: Annotated[str, typer.Option(help="Address and UDP port for those machines.")] = "0.0.0.0:0",
    relay: Relay = None,
    concurrent: Annotated[int, typer.Option(help="Answers at once; more are told to come back.")] = 16,
    caller_requests: Annotated[
        int, typer.Option(min=0, help="Requests a minute of each caller: a key, an account, else an address; 0 = any.")
    ] = 6_000,
    caller_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens a minute of each caller, prompt and completion; 0 = any.")
    ] = 6_000_000,
    caller_concurrent: Annotated[int, typer.Option(min=0, help="Answers at once for each caller; 0 = any.")] = 64,
    threads: Annotated[int, typer.Option(help="Of each stage here. Default: they share the cores.")] = 0,
    state_dir: StateDir = default_state_dir("serve"),
    as_json: AsJson = False,
) -> None:
    """Serve a model behind an OpenAI endpoint, until Ctrl-C: here, with stages on other machines, or an upstream's."""
    from tessera.cli.join import parse_relay
    from tessera.cli.logs import configure_logs
    from tessera.cli.running import run_until_signal
    from tessera.devnet.model_till import Access
    from tessera.serving.callers import CallerLimits
    from tessera.training.home import Home

    configure_logs("warning", state_dir / "logs" / "serve.log")
    home = Home(state_dir)
    access = Access(
        api_keys=tuple(api_key or ()), free=free, price=_price(home, price, coin, pay_to, chain), database=database,
        public_url=public_url,
    )  # fmt: skip
    callers = CallerLimits(caller_requests, caller_tokens, caller_concurrent)
    if upstream:
        from tessera.serving.upstreams.upstream import Target

        if invite:
            raise Invalid("an upstream has no stages that other machines could hold")
        targets = [Target(url, model=upstream_model, api_key=upstream_key) for url in upstream]
        front = Front(host, port, access, concurrent, callers)
        run_until_signal(lambda: _serve_upstream(home, model, targets, context, front, as_json=as_json))
        return
    from tessera.devnet.library import Import
    from tessera.devnet.model_server import Peers, ServeConfig

    how = Import(stages=stages, boundary=choice("--boundary", boundary, ("dense", "int8")), context=context)
    card = _model(home, model, how)
    relays = tuple(parse_relay(text) for text in relay or ())
    peers = Peers(invite, bind=bind, relays=relays) if invite else None
    config = ServeConfig(
        host=host, port=port, access=access, concurrent=concurrent, callers=callers, threads=threads, peers=peers
    )
    run_until_signal(lambda: _serve(home, card, config, as_json=as_json))


def hold(
    invitation: Annotated[str, typer.Argument(help="What `tessera serve --invite` printed.")],
    bind: Annotated[str, typer.Option(help="Address and UDP port to listen on. Default: any.")] = "",
    relay: Relay = None,
    state_dir: StateDir = default_state_dir("hold"),
) -> None:
    """Hold one stage of a model that another machine serves, until Ctrl-C."""
    from tessera.cli.join import parse_relay
    from tessera.cli.logs import configure_logs
    from tessera.cli.running import run_until_signal
    from tessera.core.clock import SystemClock
    from tessera.devnet.stage_holding import hold_stage
    from tessera.devnet.stage_invitation import StageInvitation
    from tessera.training.home import Home

    configure_logs("warning", state_dir / "logs" / "hold.log")
    clock = SystemClock()
    asked, home = StageInvitation.parse(invitation, clock), Home(state_dir)
    relays = tuple(parse_relay(text) for text in relay or ())
    run_until_signal(lambda: hold_stage(home, asked, clock, bind=bind, relays=relays, tell=_say_holding))


def _model(home: Home, what: str, how: Import) -> ModelCard:
    """The model called `what`; a folder is imported under its own name when no model has that yet."""
    from tessera.devnet.library import find_model, import_model, known_models

    path = Path(what)
    if not path.is_dir():
        return find_model(home, what)
    name = path.resolve().name
    if any(card.name == name for card in known_models(home)):
        typer.echo(f"{name} was imported before; `tessera models remove {name}` forgets it", err=True)
        return find_model(home, name)
    return import_model(
        home, path, name, how, progress=lambda done, total: typer.echo(f"stage {done} of {total}", err=True)
    )


def _price(home: Home, units: int, coin: str, pay_to: str, chain: str) -> Price | None:
    from tessera.core.ids import parse_account
    from tessera.devnet.model_till import Price

    if not units:
        return None
    if units < 0 or not coin or not chain:
        raise Invalid("--price takes units above 0, and needs --coin and --chain")
    return Price(units, parse_account(coin), parse_account(pay_to or home.account_key.account), chain)


async def _serve(home: Home, card: ModelCard, config: ServeConfig, *, as_json: bool) -> None:
    import anyio

    from tessera.core.clock import SystemClock
    from tessera.devnet.model_server import serve_model

    with home.locked():
        async with serve_model(home, card, config, SystemClock()) as served:
            _say_serving(served, config.access, as_json=as_json)
            await anyio.sleep_forever()


async def _serve_upstream(
    home: Home, name: str, targets: Sequence[Target], context: int, front: Front, *, as_json: bool
) -> None:
    import anyio

    from tessera.core.clock import SystemClock
    from tessera.devnet.upstream_server import serve_upstream

    with home.locked():
        serving = serve_upstream(
            home, name, targets, context or UPSTREAM_CONTEXT, SystemClock(), host=front.host, port=front.port,
            access=front.access, concurrent=front.concurrent, callers=front.callers,
        )  # fmt: skip
        async with serving as served:
            if as_json:
                key = {"api_key": served.first_key} if served.first_key else {}
                typer.echo(json.dumps({"url": f"{served.url}/v1", "model": name, **key}))
            else:
                where = " or ".join(target.url for target in targets)
                _say_rows(name, served.url, served.first_key, front.access, [("upstream", where)], [])
            await anyio.sleep_forever()


def _say_serving(served: Served, access: Access, *, as_json: bool) -> None:
    card = served.card
    invitation = served.invitation.to_text() if served.invitation else ""
    if as_json:
        key = {"api_key": served.first_key} if served.first_key else {}
        facts = {"url": f"{served.url}/v1", "model": card.name, "digest": card.digest, "invitation": invitation, **key}
        typer.echo(json.dumps(facts))
        return
    about = [("model", f"{card.name}, {card.params:,} params in {card.spec.stages} stages")]
    invite = [("invite", f"tessera hold {invitation}")] if invitation else []
    _say_rows(card.name, served.url, served.first_key, access, about, invite)


def _say_rows(
    model: str, url: str, first_key: str, access: Access, about: list[tuple[str, str]], more: list[tuple[str, str]]
) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    price = f"{access.price.units} units a request, or by the token" if access.price else "for an API key"
    rows = [*about, ("url", f"{url}/v1, {'for anybody' if access.free else price}")]
    if first_key:
        rows.append(("key", f"{first_key}  (shown only now; `tessera gateway keys new` makes others)"))
    rows += [("try", _curl(model, url, first_key, access)), *more]
    for name, value in rows:
        console.print(Text(f"{name:>8}  {value}"), soft_wrap=True, highlight=False)
    console.print("It stays up until Ctrl-C.", style="dim")


def _curl(model: str, url: str, first_key: str, access: Access) -> str:
    """A request that works as it stands, but for a key that only its owner knows, or a payment."""
    said = [{"role": "user", "content": "Hello!"}]
    body = json.dumps({"model": model, "messages": said, "max_tokens": 64})
    header = "" if access.free or access.price else f' -H "authorization: Bearer {first_key or "$KEY"}"'
    return f"curl {url}/v1/chat/completions -H 'content-type: application/json'{header} -d '{body}'"


def _say_holding(holding: Holding) -> None:
    card, stage = holding.card, holding.stage
    size = card.stages[stage].size_bytes / 1e6
    done = "held, until Ctrl-C" if holding.ready else f"coming, {size:,.1f} MB"
    typer.echo(f"{card.name}: stage {stage} of {card.spec.stages} is {done}")

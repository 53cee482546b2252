"""`tessera relay`: a meeting point for nodes behind home routers, on any host that can be reached."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.options import AsJson
from tessera.core.errors import Invalid, Missing

if TYPE_CHECKING:
    from tessera.p2p.relay.server import RelayConfig

__all__ = ["relay"]

TOKEN_FILE_LIMIT = 64 * 1024  # bytes
EVERYWHERE = ("0.0.0.0", "::")
SOMEWHERE = {"0.0.0.0": (socket.AF_INET, "192.0.2.1"), "::": (socket.AF_INET6, "2001:db8::1")}  # RFC 5737, RFC 3849


def relay(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[
        int, typer.Option(help="TCP port, and the UDP port that tells nodes their address. 0 = any.")
    ] = 3340,
    token: Annotated[
        list[str] | None,
        typer.Option(help="Who may use it: any of these. Repeatable.", envvar="TESSERA_RELAY_TOKENS"),
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="A file of tokens, one on each line.")] = None,
    rate: Annotated[str, typer.Option(help="For each peer and direction: 20Mbit, 512kbit, unlimited.")] = "20Mbit",
    max_clients: Annotated[int, typer.Option(help="Peers at once.")] = 1024,
    cert: Annotated[Path | None, typer.Option(help="PEM certificate chain: serve https. Needs --key.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM private key of the certificate.")] = None,
    udp: Annotated[
        bool, typer.Option(help="Tell nodes how they look from outside, so that more links are direct.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Forward ciphertext between nodes that cannot reach each other. It knows no keys and stores nothing."""
    from tessera.cli.logs import configure_logs
    from tessera.cli.running import run_until_signal
    from tessera.p2p.relay.bucket import parse_rate
    from tessera.p2p.relay.server import RelayConfig

    configure_logs("info")
    config = RelayConfig(
        host=host, port=port, tokens=(*(token or ()), *read_tokens(token_file)), rate=parse_rate(rate),
        max_clients=max_clients, certificate=str(cert or ""), private_key=str(key or ""), sight=udp,
    )  # fmt: skip
    run_until_signal(lambda: _serve(config, rate, as_json))


def read_tokens(path: Path | None) -> tuple[str, ...]:
    """The tokens in a file: one on each line; empty lines and those that begin with # do not count.

    Raises: Missing, Invalid for a file that holds none; the message names no token.
    """
    if path is None:
        return ()
    try:
        with path.open("rb") as file:
            data = file.read(TOKEN_FILE_LIMIT + 1)
    except OSError as error:
        raise Missing(f"cannot read the tokens in {path}: {error.strerror}") from error
    if len(data) > TOKEN_FILE_LIMIT:
        raise Invalid(f"{path} is over {TOKEN_FILE_LIMIT} bytes; it holds one token on each line")
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        raise Invalid(f"{path} holds no token, and a relay without tokens is open to everybody")
    return tokens


async def _serve(config: RelayConfig, rate: str, as_json: bool) -> None:
    import anyio

    from tessera.p2p.relay.server import Relay

    async with Relay.start(config) as running:
        url = running.url
        if config.host in EVERYWHERE:
            url = url.replace(config.host if config.host == "0.0.0.0" else f"[{config.host}]", _outward(config.host))
        told = bool(running.facts.get("sight"))
        if as_json:
            typer.echo(json.dumps({"url": url, "token": bool(config.tokens), "rate": rate, "udp": told}))
        else:
            token = "token required" if config.tokens else "open to everybody"
            typer.echo(
                f"{url} · {token} · {rate} per peer · {'tells' if told else 'does not tell'} nodes their address"
            )
        await anyio.sleep_forever()


def _outward(host: str) -> str:
    """This machine's address towards the internet (nothing is sent); loopback where there is none."""
    family, somewhere = SOMEWHERE[host]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((somewhere, 9))
            address = str(probe.getsockname()[0])
        except OSError:
            address = "127.0.0.1" if family == socket.AF_INET else "::1"
    return f"[{address}]" if family == socket.AF_INET6 else address

"""How a node looks from outside: the address that its home router gives to its UDP socket.

A relay runs an engine endpoint of its own on a UDP port and tells whoever connects from where the packets come. The
node asks from the very socket that its peers use, so the answer holds for them: it publishes that address, and both
sides of a link that stands over a relay send there at once, which opens the routers for each other (hole punching). The
connection stays, and with it the router's mapping.

Two relays that see different addresses mean a router whose mapping depends on the destination; then only the relay is
left. A relay that lies here makes peers try a wrong address in vain, nothing else: keys still prove who answers.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Literal

import anyio
import iroh.iroh_ffi as iroh
import structlog

from tessera.core.errors import Invalid, Late, TesseraError, Unavailable
from tessera.core.ids import PeerId, parse_peer_id
from tessera.core.signing import PeerKey
from tessera.p2p.background import Background, background
from tessera.p2p.relay.engine import Bindings, relay_mode
from tessera.p2p.relay.url import RelayUrl

__all__ = ["NatKind", "RelayFacts", "Sighting", "keep_sighted", "nat_kind", "relay_facts", "serve_sight"]

log = structlog.get_logger()

ALPN = b"tessera-sight/1"
ANSWER_LIMIT = 256  # bytes
FACTS_LIMIT = 4096  # bytes
ASK_S = 5.0
AGAIN_S = (2.0, 60.0)  # after a sighting ended: first, at most
MAX_WATCHED = 4096


@dataclass(frozen=True, slots=True)
class RelayFacts:
    """What a relay says at `/tessera`. `sight` is its endpoint there, "" where it has none."""

    token: bool
    seen: str
    sight: str
    sight_port: int


@dataclass(frozen=True, slots=True)
class Sighting:
    """From where a relay sees our UDP packets come."""

    relay: str
    address: str


@dataclass(frozen=True, slots=True)
class NatKind:
    """`none`: no router in between. `same`: one address for all destinations, direct links are likely. `varies`: one
    for each destination, links stay on the relay. `some`: there is a router, and one relay is too few to tell.
    """

    kind: Literal["none", "same", "varies", "some", "unknown"]
    sightings: tuple[Sighting, ...]
    problems: tuple[str, ...] = ()


# --- the relay's side -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def serve_sight(host: str, port: int) -> AsyncIterator[dict[str, Any]]:
    """Tell everybody who connects their address, until the body ends. Yields what belongs into the relay's facts.

    Raises: Invalid when `host` is no IP address, Unavailable when the UDP port is taken.
    """
    try:
        address = f"[{host}]:{port}" if ip_address(host).version == 6 else f"{host}:{port}"
    except ValueError as error:
        raise Invalid(f"{host!r} is a name; the UDP side needs an IP address to listen on, such as 0.0.0.0") from error
    endpoint = await _endpoint(PeerKey.generate(), [address])
    try:
        async with background() as tasks:
            tasks.start_soon(_welcome_all, endpoint, tasks)
            bound = [str(addr) for addr in endpoint.bound_sockets()]
            same_family = [addr for addr in bound if addr.startswith("[") == address.startswith("[")]
            yield {"sight": str(endpoint.id()), "sight_port": int(same_family[0].rpartition(":")[2])}
    finally:
        with anyio.move_on_after(0.4, shield=True):
            await endpoint.close()


async def _welcome_all(endpoint: iroh.Endpoint, tasks: Background) -> None:
    watched: set[object] = set()
    while (incoming := await endpoint.accept_next()) is not None:
        if len(watched) >= MAX_WATCHED:
            await incoming.refuse()
        elif not await incoming.remote_addr_validated():
            await incoming.retry()  # who forges addresses gets no state here, and no answer that is longer
        else:
            tasks.start_soon(_tell, incoming, watched)


async def _tell(incoming: iroh.Incoming, watched: set[object]) -> None:
    mark = object()
    watched.add(mark)
    try:
        with anyio.fail_after(ASK_S):
            came_from = await incoming.remote_addr()
            connection = await (await incoming.accept()).connect()
            if not came_from.is_ip():
                connection.close(0, b"no address")
                return
            stream = await connection.open_uni()
            await stream.write_all(json.dumps({"seen": came_from.addr}).encode())
            await stream.finish()
        await connection.closed()
    except (iroh.IrohError, TimeoutError) as error:
        log.debug("sight_failed", error=type(error).__name__)
    finally:
        watched.discard(mark)


# --- the node's side ------------------------------------------------------------------------------------------------


async def relay_facts(relay: RelayUrl, timeout_s: float = ASK_S) -> RelayFacts:
    """What the relay says about itself. Raises: Unavailable where nobody or another kind of relay answers, Late."""
    import httpx  # 0.1 s, and only needed by nodes that use relays

    try:
        async with httpx.AsyncClient(timeout=timeout_s, trust_env=False) as client:
            async with client.stream("GET", f"{relay.url}/tessera") as response:
                data = b""
                async for piece in response.aiter_bytes(FACTS_LIMIT):
                    data += piece
                    if len(data) > FACTS_LIMIT:
                        break
    except httpx.TimeoutException as error:
        raise Late(f"{relay.url} does not answer within {timeout_s:g} s") from error
    except httpx.HTTPError as error:
        raise Unavailable(f"nobody answers at {relay.url}: {error}") from error
    if response.status_code != 200:
        raise Unavailable(f"{relay.url} is a relay of another kind: it says nothing about itself")
    return _parse_facts(relay, data)


async def keep_sighted(endpoint: iroh.Endpoint, relay: RelayUrl) -> None:
    """Stay in sight of a relay, and have the engine publish the address that it sees. Runs until it is cancelled."""
    wait_s = AGAIN_S[0]
    while True:
        try:
            connection, address = await _ask(endpoint, relay)
            wait_s = AGAIN_S[0]
            await endpoint.add_external_addr(address)
            log.info("seen_from_outside", relay=relay.url, address=address)
            try:
                await connection.closed()
            finally:
                with anyio.CancelScope(shield=True):
                    await endpoint.remove_external_addr(address)
        except (TesseraError, iroh.IrohError) as error:
            log.debug("not_in_sight", relay=relay.url, reason=_reason(error))
        await anyio.sleep(wait_s)
        wait_s = min(2 * wait_s, AGAIN_S[1])


async def nat_kind(relays: Sequence[RelayUrl], *, timeout_s: float = ASK_S) -> NatKind:
    """What stands between this machine and the relays, judged from a fresh UDP socket. Never raises for a relay that
    fails: its problem is in the answer.
    """
    endpoint = await _endpoint(PeerKey.generate(), ["0.0.0.0:0"])
    sightings: list[Sighting] = []
    problems: list[str] = []

    async def look(relay: RelayUrl) -> None:
        try:
            with anyio.fail_after(timeout_s):
                connection, address = await _ask(endpoint, relay)
            connection.close(0, b"thanks")
            sightings.append(Sighting(relay.url, address))
        except TimeoutError:
            problems.append(f"{relay.url}: no answer over UDP within {timeout_s:g} s")
        except (TesseraError, iroh.IrohError) as error:
            problems.append(f"{relay.url}: {_reason(error)}")

    try:
        async with anyio.create_task_group() as looking:
            for relay in relays:
                looking.start_soon(look, relay)
        ours = {str(addr) for addr in endpoint.addr().direct_addresses()} | _on_loopback(endpoint)
    finally:
        with anyio.move_on_after(0.4, shield=True):
            await endpoint.close()
    return NatKind(judge([sighting.address for sighting in sightings], ours), tuple(sightings), tuple(problems))


def judge(seen: Sequence[str], ours: set[str]) -> Literal["none", "same", "varies", "some", "unknown"]:
    """
    >>> judge(["198.51.100.7:4001", "198.51.100.7:4002"], {"192.168.1.5:4001"})
    'varies'
    """
    if not seen:
        return "unknown"
    if set(seen) <= ours:
        return "none"
    if len(seen) == 1:
        return "some"
    return "same" if len(set(seen)) == 1 else "varies"


async def _ask(endpoint: iroh.Endpoint, relay: RelayUrl) -> tuple[iroh.Connection, str]:
    """Connect to the relay's sight; the connection, and the address from which it sees us."""
    facts = await relay_facts(relay)
    if not facts.sight:
        raise Unavailable(f"{relay.url} does not tell addresses")
    sockets = await _resolve(relay.host, facts.sight_port)
    try:
        with anyio.fail_after(ASK_S):
            target = iroh.EndpointAddr(iroh.EndpointId.from_string(facts.sight), None, sockets)
            connection = await endpoint.connect(target, ALPN)
            stream = await connection.accept_uni()
            data = bytes(await stream.read_to_end(ANSWER_LIMIT))
    except TimeoutError:
        raise Late(f"{relay.url} does not answer over UDP port {facts.sight_port} within {ASK_S:g} s") from None
    return connection, _parse_address(data)


async def _resolve(host: str, port: int) -> list[str]:
    """Only IPv4: it is behind its routers that addresses change."""
    try:
        found = await anyio.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise Unavailable(f"{host} has no IPv4 address: {error}") from error
    return [f"{where[0]}:{where[1]}" for *_, where in found][:4]


def _parse_facts(relay: RelayUrl, data: bytes) -> RelayFacts:
    try:
        value = json.loads(data)
        sight = value.get("sight", "")
        peer = parse_peer_id(sight) if sight else PeerId("")
        port = value.get("sight_port", 0)
        if type(port) is not int or not (0 < port < 65_536 or not sight):
            raise Invalid(f"port {str(port)[:20]}")
        return RelayFacts(value.get("token") is True, str(value.get("seen", ""))[:64], peer, port)
    except (ValueError, AttributeError, TesseraError) as error:
        raise Unavailable(f"{relay.url} is a relay of another kind, or broken: {str(error)[:120]}") from error


def _parse_address(data: bytes) -> str:
    """`ip:port`, of a host; raises Unavailable."""
    try:
        host, _, port = str(json.loads(data)["seen"]).rpartition(":")
        address, number = ip_address(host.removeprefix("[").removesuffix("]")), int(port)
        if address.is_multicast or address.is_unspecified or not 0 < number < 65_536:
            raise ValueError(f"nobody can be at {host}:{port}")
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"the relay told no address: {data[:64]!r}") from error
    return f"[{address}]:{number}" if address.version == 6 else f"{address}:{number}"


def _on_loopback(endpoint: iroh.Endpoint) -> set[str]:
    return {f"127.0.0.1:{str(addr).rpartition(':')[2]}" for addr in endpoint.bound_sockets()}


async def _endpoint(key: PeerKey, addresses: Sequence[str]) -> iroh.Endpoint:
    options = iroh.EndpointOptions(
        preset=Bindings(addresses), relay_mode=relay_mode(()), alpns=[ALPN], secret_key=key.seed
    )
    try:
        return await iroh.Endpoint.bind(options)
    except iroh.IrohError as error:
        raise Unavailable(f"cannot listen on UDP {', '.join(addresses)}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """An `IrohError` prints empty."""
    return str(error.message())[:200] if isinstance(error, iroh.IrohError) else str(error)

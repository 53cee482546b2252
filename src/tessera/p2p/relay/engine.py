"""What the peers' engine (iroh) is told about relays, and what it says about them.

The engine listens at one relay, the nearest (its home), and dials through whichever the other side listens at. It looks
for a home when it starts and then twice a minute; a relay that comes up in between is found within seconds only
because `keep_home` has it look again.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import iroh.iroh_ffi as iroh
import structlog

from tessera.core.errors import Invalid
from tessera.p2p.relay.url import RelayUrl, canonical_url

__all__ = ["Bindings", "connected_home", "keep_home", "online", "relay_mode", "same_relay"]

log = structlog.get_logger()

LOOK_AGAIN_S = 2.0
MAX_RELAYS = 4


class Bindings(iroh.Preset):  # type: ignore[misc]  # the engine ships no types
    """Nothing but the sockets that are named. Left alone, the engine binds one for each family, the second one on all
    interfaces even when the first was asked to stay on loopback.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    def apply(self, builder: iroh.EndpointBuilder) -> None:
        builder.apply_minimal()
        for address in self._addresses:
            builder.bind_addr(address)


def relay_mode(relays: Sequence[RelayUrl]) -> iroh.RelayMode:
    """These relays and no others; none at all for an empty list."""
    if len(relays) > MAX_RELAYS or len({relay.url for relay in relays}) < len(relays):
        raise Invalid(f"up to {MAX_RELAYS} relays, each once, not {[relay.url for relay in relays]}")
    if not relays:
        return iroh.RelayMode.disabled()
    chosen = iroh.RelayMap.empty()
    for relay in relays:
        chosen.insert(_config(relay))
    return iroh.RelayMode.custom(chosen)


def connected_home(endpoint: iroh.Endpoint) -> str:
    """The URL of the relay at which this endpoint listens and stays connected, in our spelling; "" for none."""
    home = endpoint.addr().relay_url()
    if home is None:
        return ""
    stats = endpoint.stats()
    standing = stats["socket:relay_conns_success"].value - stats["socket:relay_conns_closed"].value
    return canonical_url(home) if standing > 0 else ""


async def keep_home(endpoint: iroh.Endpoint, relays: Sequence[RelayUrl]) -> None:
    """While there is no home, make the engine look for one every two seconds. Runs until it is cancelled."""
    said = ""
    while True:
        await anyio.sleep(LOOK_AGAIN_S)
        home = connected_home(endpoint)
        if home != said:
            log.info("relay_connected" if home else "relay_lost", url=home or said)
            said = home
        if (
            not home
        ):  # the one that was chosen is redialled by the engine itself; telling the others makes it choose anew
            chosen = endpoint.addr().relay_url()
            lost = canonical_url(chosen) if chosen else ""
            for relay in relays:
                if relay.url != lost:
                    await endpoint.insert_relay(_config(relay))


async def online(endpoint: iroh.Endpoint, timeout_s: float) -> bool:
    """Whether the endpoint listens at a relay, waiting for it up to `timeout_s`."""
    with anyio.move_on_after(timeout_s):
        while not connected_home(endpoint):
            await anyio.sleep(0.02)
    return bool(connected_home(endpoint))


def same_relay(text: str, relays: Sequence[RelayUrl]) -> RelayUrl | None:
    """The relay of ours that this address of a record means."""
    try:
        url = canonical_url(text)
    except Invalid:  # others may know relays that we do not
        return None
    return next((relay for relay in relays if relay.url == url), None)


def _config(relay: RelayUrl) -> iroh.RelayConfig:
    return iroh.RelayConfig(url=relay.url, auth_token=relay.token or None)

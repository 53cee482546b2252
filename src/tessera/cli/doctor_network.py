"""How this machine reaches others: links of its own, relays, and the router in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.cli.findings import Finding, Verdict
from tessera.core.errors import Refused, TesseraError
from tessera.core.signing import PeerKey

if TYPE_CHECKING:
    from tessera.p2p.relay.url import RelayUrl

__all__ = ["CHECKS", "check_links"]

PROBE_S = 5.0
BUFFER_BYTES = 2_000_000  # of a UDP socket: some 20 ms of a fast link
BUFFERS = {"rmem_max": "receiving", "wmem_max": "sending"}
PROC = Path("/proc/sys/net/core")

KINDS: dict[str, tuple[Verdict, str]] = {
    "none": ("ok", "no router in between: others reach this machine directly"),
    "same": ("ok", "behind a router that keeps one address: direct links are likely"),
    "some": ("ok", "behind a router; one relay is too few to tell whether links can be direct"),
    "varies": ("warning", "behind a router that changes addresses: links stay on the relay"),
    "unknown": ("warning", "no relay answered over UDP: links stay on the relay"),
}


def check_links(state_dir: Path, relays: list[str]) -> list[Finding]:
    """The relays that are configured, or named by the invitation that lies here; and what the router does."""
    import anyio

    from tessera.p2p.relay.sight import nat_kind
    from tessera.p2p.relay.url import RelayUrl

    known = [RelayUrl(*text.partition("#")[::2]) for text in relays] or _invited(state_dir)
    if not known:
        return [Finding("relay", "ok", "none is chosen: only machines that reach each other directly can join")]

    async def ask() -> list[Finding]:
        found = [await _probe(relay.url, relay.token) for relay in known]
        kind = await nat_kind(known, timeout_s=PROBE_S)
        verdict, detail = KINDS[kind.kind]
        seen = ", ".join(sorted({sighting.address for sighting in kind.sightings}))
        found.append(Finding("router", verdict, f"{detail}{f' (seen as {seen})' if seen else ''}"))
        return found

    return anyio.run(ask)


def check_loopback() -> Finding:
    """A real echo between two endpoints of this machine."""
    import anyio

    from tessera.p2p.calls import call, serve_calls
    from tessera.p2p.iroh_transport import IrohTransport

    async def echo() -> float:
        async with (
            IrohTransport.start(PeerKey.generate(), bind="127.0.0.1:0") as a,
            IrohTransport.start(PeerKey.generate(), bind="127.0.0.1:0") as b,
        ):

            async def answer(peer: object, request: dict[str, object], body: bytes) -> tuple[dict[str, object], bytes]:
                return request, body

            serve_calls(b, "tessera/doctor/1", answer)
            await call(a, b.record(), "tessera/doctor/1", {}, timeout_s=5, reply_limit=1024)
            started = time.perf_counter()
            await call(a, b.record(), "tessera/doctor/1", {}, timeout_s=5, reply_limit=1024)
            return time.perf_counter() - started

    try:
        return Finding("peer link", "ok", f"encrypted round trip on this machine in {anyio.run(echo) * 1000:.1f} ms")
    except (TesseraError, OSError, ImportError) as error:
        return Finding("peer link", "problem", str(error), "is UDP on the loopback interface blocked?")


def check_buffers(folder: Path = PROC) -> Finding:
    """How much a UDP socket may hold: too little drops packets of a fast link."""
    sizes = {name: int((folder / name).read_text()) for name in BUFFERS}
    small = [name for name, size in sizes.items() if size < BUFFER_BYTES]
    detail = ", ".join(f"{sizes[name] / 1e6:.1f} MB for {what}" for name, what in BUFFERS.items())
    fix = "sysctl -w " + " ".join(f"net.core.{name}=7500000" for name in small) if small else ""
    return Finding("UDP buffers", "warning" if small else "ok", detail, fix)


async def _probe(url: str, token: str) -> Finding:
    from tessera.p2p.relay.probe import probe_relay

    name = f"relay {url}"
    try:
        probe = await probe_relay(url, token, timeout_s=PROBE_S)
    except Refused as error:
        return Finding(
            name, "problem", error.message, "ask its owner for a token, and write it behind the URL: URL#TOKEN"
        )
    except TesseraError as error:
        return Finding(name, "problem", error.message, "is it running, and does a firewall let TCP through to it?")
    return Finding(name, "ok", f"answers in {probe.round_trip_s * 1000:.0f} ms")


def _invited(state_dir: Path) -> list[RelayUrl]:
    """The relays of the invitation that this directory gave or took; none when there is none."""
    from tessera.core.clock import SystemClock
    from tessera.training.invitation import Invitation

    try:
        text = (state_dir / "invitation").read_text()
        return list(Invitation.parse(text, SystemClock(), even_expired=True).relays)
    except (OSError, TesseraError):
        return []


CHECKS: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
    ("peer link", check_loopback),
    ("UDP buffers", check_buffers),
]

"""How a group is flooded."""

from __future__ import annotations

from dataclasses import dataclass, field

from tessera.p2p.flood_peers import PeerLimits
from tessera.p2p.flood_state import StateLimits

__all__ = ["FloodConfig"]


@dataclass(frozen=True, slots=True)
class FloodConfig:
    """All members of a group should agree on `state` and on the `news` limits."""

    ttl_s: float = 7 * 86_400.0  # an item lives this long unless its publisher says otherwise
    sync_s: float = 30.0  # between two comparisons with somebody, on average
    gather_s: float = 0.1  # news waits this long for more before it is offered
    call_s: float = 15.0  # deadline of one call
    members: int = 256  # more are ignored
    state: StateLimits = field(default_factory=StateLimits)
    peers: PeerLimits = field(default_factory=PeerLimits)

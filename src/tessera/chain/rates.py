"""A limit on requests from one address: a bucket of tokens for each, refilled evenly.

What it is for: one client that asks in a loop leaves room for the others. What it is not: a defence against somebody
with thousands of addresses. The table is bounded; the address not seen for longest makes room, and is new when it comes
back.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from tessera.core.errors import Invalid

__all__ = ["RateConfig", "RateLimit"]


@dataclass(frozen=True, slots=True)
class RateConfig:
    """How much one address may ask."""

    rate_per_s: float = 100.0  # requests, those in a batch counted one by one
    burst: int = 500  # requests that may come at once after a silence
    max_clients: int = 4_096  # addresses remembered

    def __post_init__(self) -> None:
        if self.rate_per_s <= 0 or self.burst < 1 or self.max_clients < 1:
            raise Invalid(f"a rate limit's rate, burst and number of clients are above zero, not {self}")


class RateLimit:
    """Buckets by client. Safe from any thread."""

    def __init__(self, config: RateConfig, now: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._now = now
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens left, and when that was

    def wait_s(self, client: str) -> float:
        """0 when the client may ask now, which counts; else how long until it may, and nothing is counted."""
        name = _network(client)
        with self._lock:
            now = self._now()
            tokens, since = self._buckets.pop(name, (float(self._config.burst), now))
            tokens = min(float(self._config.burst), tokens + (now - since) * self._config.rate_per_s)
            wait = 0.0 if tokens >= 1 else (1 - tokens) / self._config.rate_per_s
            self._buckets[name] = (tokens if wait else tokens - 1, now)
            if len(self._buckets) > self._config.max_clients:
                self._buckets.popitem(last=False)
        return wait


def _network(client: str) -> str:
    """An IPv6 household has 2^64 addresses: they count as one."""
    try:
        address = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return client
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False).network_address)

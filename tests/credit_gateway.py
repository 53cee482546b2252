"""A gateway that sells by credit alone, as a process of its own. Run by `test_serving_killed_gateway.py`.

    python credit_gateway.py DATABASE LEASE_S

Prints its port, then serves until it is killed. A completion of n tokens takes n · 2 ms and costs n units.
"""

from __future__ import annotations

import socket
import sys

import anyio
import uvicorn

from tessera.core.clock import SystemClock
from tessera.core.ids import parse_account
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.balances import Balances
from tessera.serving.paying.charging import PaidRequest
from tessera.serving.paying.credit import Credit
from tessera.serving.paying.keys import ApiKeys, KeyRing
from tessera.serving.paying.offers import Offer
from tessera.serving.paying.prices import TokenPrice
from tessera.serving.text import CharTokenizer

MODEL = "m"
NETWORK, ASSET = "eip155:1", parse_account("0x" + "11" * 20)
PRICE = TokenPrice(prompt_units=0, completion_units=1_000)


def offers(request: PaidRequest) -> list[Offer]:
    return [Offer(NETWORK, ASSET, "Test USD", "2", 1_000, ASSET, 60)]


async def main(database: str, lease_s: float) -> None:
    clock = SystemClock()
    balances = Balances(clock, where=database, lease_s=lease_s)
    ways = ApiKeys(KeyRing(clock, where=database), {"credit": [Credit(balances, PRICE, NETWORK, ASSET, offers)]})
    model = LocalModel(MODEL, FakeEngine(delay_s=0.002), CharTokenizer())
    app = create_app(GatewayConfig(max_concurrent=64), [model], [ways])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        print(listener.getsockname()[1], flush=True)  # noqa: T201
        await uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off")).serve([listener])


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], float(sys.argv[2]))

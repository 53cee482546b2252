"""How fast the indexer folds a chain into tables, and how soon a stopped one goes on.

    python benchmarks/bench_indexer.py [--quick] [--json]

A LocalChain in this process carries transfers of the coin to a share contract, one a block. Measured: a first index
into a SQLite file (blocks and facts a second), opening that file again with nothing new to read, and following the
chain block by block. The figure beside them is the chain's own: asking it for the same logs and decoding them.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio

from tessera.chain import abi
from tessera.chain.faces import Coin
from tessera.chain.indexer.coin import payments_to
from tessera.chain.indexer.engine import Indexer
from tessera.chain.local import LocalChain
from tessera.chain.transactions import Transaction, sign
from tessera.core.signing import AccountKey

CHAIN_ID = 845_300
PAYER = AccountKey(b"\x07" * 32)
PAYEE = AccountKey(b"\x08" * 32).account


async def measure(blocks: int, followed: int) -> dict[str, float]:
    local = LocalChain(None, chain_id=CHAIN_ID, dev=True)
    chain = local.client()
    coin = await Coin.deploy(chain, PAYER)
    mint = bytes.fromhex("40c10f19") + abi.encode(["address", "uint256"], [PAYEE, 1])
    for nonce in range(1, blocks + 1):
        local.submit(sign(PAYER, Transaction(CHAIN_ID, nonce, coin.address, 0, mint, 100_000, 0, 0))[0])
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "index.sqlite"
        figures = await _first(chain, coin, where, blocks)
        figures["resumed_start_s"] = await _resumed(chain, coin, where)
        figures["followed_blocks_per_s"] = await _following(chain, coin, where, followed)
    begun = time.perf_counter()
    assert len(await coin.events(Coin.Transfer)) == blocks + followed
    figures["decoded_logs_per_s"] = (blocks + followed) / (time.perf_counter() - begun)
    return figures


async def _first(chain: Any, coin: Coin, where: Path, blocks: int) -> dict[str, float]:
    begun = time.perf_counter()
    index = Indexer(where, chain, [payments_to(coin.address, PAYEE)])
    last = await index.update()
    took_s = time.perf_counter() - begun
    assert index.queries.figure("coin", "paid").count == blocks
    index.close()
    return {"blocks_per_s": last / took_s, "facts_per_s": blocks / took_s}


async def _resumed(chain: Any, coin: Coin, where: Path) -> float:
    begun = time.perf_counter()
    index = Indexer(where, chain, [payments_to(coin.address, PAYEE)])
    await index.update()
    took_s = time.perf_counter() - begun
    index.close()
    return took_s


async def _following(chain: Any, coin: Coin, where: Path, followed: int) -> float:
    """One block, one update."""
    index, took_s = Indexer(where, chain, [payments_to(coin.address, PAYEE)]), 0.0
    for _ in range(followed):
        await coin.mint(PAYER, PAYEE, 1)
        begun = time.perf_counter()
        await index.update()
        took_s += time.perf_counter() - begun
    index.close()
    return followed / took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 blocks instead of 20,000")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    figures = anyio.run(measure, 1_000 if options.quick else 20_000, 50)
    figures = {name: round(value, 4) for name, value in figures.items()}
    if options.json:
        print(json.dumps({"hardware": platform.machine(), **figures}))
        return
    for name, value in figures.items():
        print(f"{name:24} {value:12,.4f}")


if __name__ == "__main__":
    main()

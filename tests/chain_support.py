"""What the tests of contracts and chain share: a small world of workers, coin and shares, and anvil if there is one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tessera.chain.faces import Coin, ModelShare
from tessera.chain.local import LocalChain
from tessera.chain.settle import epoch_digest
from tessera.chain.types import Chain
from tessera.core.clock import FakeClock
from tessera.core.hashing import keccak
from tessera.core.ids import Account, RunId
from tessera.core.merkle import MerkleTree, share_leaf
from tessera.core.signing import AccountKey

CHAIN_ID = 845_300
RUN_ID = RunId("5e" * 32)
NOW = 1_800_000_000
ROOT = Path(__file__).resolve().parent.parent


def key(name: str) -> AccountKey:
    """An account for a role: always the same."""
    return AccountKey(keccak(name.encode()))


WORKERS = sorted((key(f"worker {i}") for i in range(4)), key=lambda k: int(k.account, 16))


@dataclass
class World:
    """A coin and a share contract for four workers."""

    chain: Chain
    coin: Coin
    share: ModelShare
    local: LocalChain | None = None

    async def post(
        self, shares: Mapping[Account, int], signers: Sequence[AccountKey] = tuple(WORKERS[:3])
    ) -> MerkleTree:
        """Admit an epoch with these leaves."""
        epoch = await self.share.epoch_count()
        tree = MerkleTree([share_leaf(epoch, account, amount) for account, amount in shares.items()])
        total = sum(shares.values())
        digest = epoch_digest(await self.chain.chain_id(), self.share.address, RUN_ID, epoch, tree.root, total)
        await self.share.post(WORKERS[0], epoch, tree.root, total, [k.sign_digest(digest) for k in signers])
        return tree

    async def give(self, shares: Mapping[Account, int]) -> None:
        """Admit an epoch and redeem all of it."""
        epoch = await self.share.epoch_count()
        tree = await self.post(shares)
        for index, (account, amount) in enumerate(shares.items()):
            await self.share.redeem(WORKERS[0], epoch, account, amount, tree.proof(index))

    async def earn(self, amount: int) -> None:
        """Income arrives and is distributed."""
        await self.coin.mint(WORKERS[0], self.share.address, amount)
        await self.share.distribute(WORKERS[0])


async def make_world(chain: Chain, local: LocalChain | None = None) -> World:
    coin = await Coin.deploy(chain, WORKERS[0])
    accounts = [k.account for k in WORKERS]
    share = await ModelShare.deploy(chain, WORKERS[0], "Model A", "MDLA", coin.address, bytes.fromhex(RUN_ID), accounts)
    return World(chain, coin, share, local)


def memory_chain() -> LocalChain:
    return LocalChain(None, chain_id=CHAIN_ID, clock=FakeClock(NOW), dev=True)


async def fresh_world() -> World:
    chain = memory_chain()
    return await make_world(chain.client(), chain)


_first: list[World] = []
_snapshot: list[int] = []


async def local_world() -> World:
    """A world as after `fresh_world`: one is kept, and brought back by a snapshot, which is ten times faster."""
    if not _first:
        _first.append(await fresh_world())
    kept = _first[0]
    assert kept.local
    if _snapshot:
        assert kept.local.revert(_snapshot.pop())
    _snapshot.append(kept.local.snapshot())
    chain = kept.local.client()
    return World(chain, Coin(chain, kept.coin.address), ModelShare(chain, kept.share.address), kept.local)


def anvil_binary() -> Path | None:
    """TESSERA_ANVIL, else PATH, else what `npm install @foundry-rs/anvil-linux-amd64` leaves in the repository."""
    found = os.environ.get("TESSERA_ANVIL") or shutil.which("anvil")
    path = Path(found) if found else ROOT / "node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil"
    return path if path.is_file() else None


@contextmanager
def anvil(*arguments: str) -> Iterator[str]:
    """A fresh anvil's URL. Skips the test where there is none, except in CI, where that is a failure."""
    binary = anvil_binary()
    if binary is None:
        reason = "anvil is not here: set TESSERA_ANVIL, or npm install @foundry-rs/anvil-linux-amd64 in the repository"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(binary), "--port", str(port), "--chain-id", str(CHAIN_ID), "--hardfork", "prague", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def fund_on_anvil(url: str, accounts: Sequence[Account]) -> None:
    for account in accounts:
        request = {"jsonrpc": "2.0", "id": 1, "method": "anvil_setBalance", "params": [account, hex(10**21)]}
        httpx.post(url, json=request, timeout=10).raise_for_status()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            httpx.post(url, json={"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}, timeout=2)
            return
        except httpx.TransportError:
            if process.poll() is not None:
                pytest.fail(f"anvil ended with {process.returncode}")
            time.sleep(0.02)
    pytest.fail("anvil did not answer within 20 s")

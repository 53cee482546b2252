"""What the tests of contracts and chain share: a small world of workers, coin and shares, and anvil if there is one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tessera.chain.client import RpcChain
from tessera.chain.consent import NOBODY, Consent
from tessera.chain.engine import GAS_LIMIT
from tessera.chain.face import decode_events
from tessera.chain.faces import Coin, ModelShare, Run
from tessera.chain.local import LocalChain
from tessera.chain.types import Chain, Receipt
from tessera.core.clock import FakeClock
from tessera.core.hashing import keccak
from tessera.core.ids import Account, RunId
from tessera.core.merkle import MerkleTree, share_leaf
from tessera.core.signing import AccountKey
from tessera.core.typed_data import typed_digest

CHAIN_ID = 845_300
RUN_ID = RunId("5e" * 32)
NOW = 1_800_000_000
ROOT = Path(__file__).resolve().parent.parent


def key(name: str) -> AccountKey:
    """An account for a role: always the same."""
    return AccountKey(keccak(name.encode()))


WORKERS = sorted((key(f"worker {i}") for i in range(4)), key=lambda k: int(k.account, 16))

# Two stages, and no challenge window: what is proposed can be posted at once.
TERMS = Run.Term(
    stages=2, most=3, stake=1_000, window_s=0, delay_s=3_600, reward_bps=1_000,
    epochs=1_000, early_bps=20_000, epoch_shares=2**96, invited=False,
)  # fmt: skip


def peer_of(worker: AccountKey) -> bytes:
    """The ed25519 key under which a worker's node is found: always the same."""
    return keccak(b"peer of " + worker.account.encode())


def ascending(signers: Iterable[AccountKey]) -> list[AccountKey]:
    """In the order in which the contract wants signatures."""
    return sorted(signers, key=lambda k: int(k.account, 16))


def split(signature: bytes) -> tuple[int, bytes, bytes]:
    """v, r, s of 65 bytes."""
    return signature[64], signature[:32], signature[32:64]


@dataclass(frozen=True)
class Proposal:
    """An epoch that waits out its challenge window. The first four fields are what `post` and `strike` take."""

    epoch: int
    root: bytes
    shares: int
    opens_at: int
    tree: MerkleTree
    receipt: Receipt

    @property
    def fields(self) -> tuple[int, bytes, int, int]:
        return self.epoch, self.root, self.shares, self.opens_at


@dataclass
class World:
    """A coin, a run and its share contract, for four workers with a bond each."""

    chain: Chain
    coin: Coin
    run: Run
    share: ModelShare
    local: LocalChain | None = None
    workers: list[AccountKey] = field(default_factory=lambda: list(WORKERS))  # the first of them sends

    async def consent(self) -> Consent:
        """What this run's workers sign."""
        return Consent(await self.chain.chain_id(), self.run.address, RUN_ID)

    async def bond(self, worker: AccountKey, *, peer: bytes | None = None, sender: AccountKey | None = None) -> Receipt:
        """`worker` bonds, by his signature; he gets the coins before."""
        peer = peer or peer_of(worker)
        stake, v, r, s = (await self.run.terms()).stake, 27, bytes(32), bytes(32)
        if stake:
            await self.coin.mint(worker, worker.account, stake)
            v, r, s = split(await self.authorization(worker, peer, stake))
        return await self.run.bond(sender or WORKERS[0], worker.account, peer, 0, 2**40, v, r, s)

    async def authorization(self, worker: AccountKey, peer: bytes, amount: int, kind: str = "Receive") -> bytes:
        """`worker`'s EIP-3009 signature over his stake."""
        nonce = (await self.consent()).bond_nonce(worker.account, peer)
        values = (worker.account, self.run.address, amount, 0, 2**40, nonce)
        return await sign_payment(self.coin, worker, f"{kind}WithAuthorization", values)

    async def candidate(self, worker: AccountKey) -> int:
        """`worker` bonds and is drawn a stage, which is returned."""
        await self.bond(worker)
        receipt = await self.run.draw(WORKERS[0], worker.account)
        (drawn,) = decode_events(Run.Drawn, self.run.address, receipt)
        return drawn.stage

    async def change(
        self, *, joiner: Account = NOBODY, leaver: Account = NOBODY, signers: Sequence[AccountKey] | None = None
    ) -> Receipt:
        """One joins, one leaves, or both; signed by all workers."""
        number = await self.run.change_count()
        digest = (await self.consent()).change(number, joiner, leaver)
        signatures = [k.sign_digest(digest) for k in ascending(self.workers if signers is None else signers)]
        return await self.run.change(WORKERS[0], number, joiner, leaver, signatures)

    async def propose(self, shares: Mapping[Account, int], signers: Sequence[AccountKey] | None = None) -> Proposal:
        """Propose an epoch with these leaves, signed by all workers."""
        epoch, attempt = await self.share.epoch_count(), await self.run.attempt()
        tree = MerkleTree([share_leaf(epoch, account, amount) for account, amount in shares.items()])
        total = sum(shares.values())
        digest = (await self.consent()).epoch(epoch, attempt, tree.root, total)
        signatures = [k.sign_digest(digest) for k in ascending(self.workers if signers is None else signers)]
        receipt = await self.run.propose(WORKERS[0], epoch, tree.root, total, signatures)
        (proposed,) = decode_events(Run.Proposed, self.run.address, receipt)
        return Proposal(epoch, tree.root, total, proposed.opens_at, tree, receipt)

    async def epoch(self, shares: Mapping[Account, int], signers: Sequence[AccountKey] | None = None) -> MerkleTree:
        """Propose an epoch with these leaves, wait out its window, and post it."""
        proposal = await self.propose(shares, signers)
        window_s = (await self.run.terms()).window_s
        if window_s:
            await self.wait(window_s)
        await self.run.post(WORKERS[0], *proposal.fields)
        return proposal.tree

    async def give(self, shares: Mapping[Account, int]) -> None:
        """Admit an epoch and redeem all of it."""
        epoch = await self.share.epoch_count()
        tree = await self.epoch(shares)
        for index, (account, amount) in enumerate(shares.items()):
            await self.share.redeem(WORKERS[0], epoch, account, amount, tree.proof(index))

    async def earn(self, amount: int) -> None:
        """Income arrives and is distributed."""
        await self.coin.mint(WORKERS[0], self.share.address, amount)
        await self.share.distribute(WORKERS[0])

    async def wait(self, seconds: int) -> None:
        """Time passes on a development chain."""
        assert isinstance(self.chain, RpcChain)
        await self.chain.request("evm_increaseTime", [seconds])


async def sign_payment(coin: Coin, payer: AccountKey, kind: str, values: tuple[object, ...]) -> bytes:
    """`payer`'s EIP-3009 signature: `values` are from, to, value, validAfter, validBefore and nonce."""
    fields = "address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce"
    return payer.sign_digest(typed_digest(await coin.DOMAIN_SEPARATOR(), f"{kind}({fields})", values))


async def in_one_transaction(chain: Chain, sender: AccountKey, calls: Sequence[tuple[Account, bytes]]) -> Receipt:
    """All calls, by a contract made for it; reverts with the reason of the first that fails."""
    fail, offset = 48 * len(calls) + 1, 48 * len(calls) + 11
    code = b""
    for to, data in calls:
        size = len(data).to_bytes(2, "big")
        code += b"\x61" + size + b"\x61" + offset.to_bytes(2, "big") + b"\x60\0\x39"  # CODECOPY to 0
        code += b"\x60\0\x60\0\x61" + size + b"\x60\0\x60\0\x73" + bytes.fromhex(to[2:]) + b"\x5a\xf1"  # CALL
        code += b"\x15\x61" + fail.to_bytes(2, "big") + b"\x57"  # JUMPI when it answered 0
        offset += len(data)
    code += b"\0" + bytes.fromhex("5b3d600060003e3d5ffd")  # STOP; fail: REVERT with what came back
    return await chain.send(sender, None, code + b"".join(data for _, data in calls))


async def make_world(
    chain: Chain, local: LocalChain | None = None, terms: Run.Term = TERMS, founders: Sequence[AccountKey] = WORKERS
) -> World:
    """A run that has begun with `founders`, made by the first worker."""
    creator = WORKERS[0]
    coin = await Coin.deploy(chain, creator)
    run = await Run.deploy(chain, creator, coin.address, bytes.fromhex(RUN_ID), terms)
    share = await ModelShare.deploy(chain, creator, "Model A", "MDLA", coin.address, bytes.fromhex(RUN_ID), run.address)
    world = World(chain, coin, run, share, local, list(founders))
    for founder in founders:
        await world.candidate(founder)
    await run.begin(creator, share.address, [founder.account for founder in founders])
    return world


def memory_chain() -> LocalChain:
    return LocalChain(None, chain_id=CHAIN_ID, clock=FakeClock(NOW), dev=True)


class QuickChain(RpcChain):
    """Tries once, then sends with all the gas that a block has: an estimate to the unit takes five runs and more."""

    async def _estimate(self, sender: Account, to: Account | None, data: bytes, value: int) -> int:
        call = {"from": sender, "data": "0x" + data.hex(), "value": hex(value)}
        await self.rpc.request("eth_call", [call if to is None else {**call, "to": to}, "latest"])
        return GAS_LIMIT


async def fresh_world(terms: Run.Term = TERMS) -> World:
    chain = memory_chain()
    return await make_world(QuickChain(chain.client().rpc), chain, terms)


_kept: dict[Run.Term, World] = {}
_snapshots: dict[Run.Term, int] = {}


async def local_world(terms: Run.Term = TERMS) -> World:
    """A world as after `fresh_world`: one is kept, and brought back by a snapshot, which is ten times faster."""
    if terms not in _kept:
        _kept[terms] = await fresh_world(terms)
    kept = _kept[terms]
    assert kept.local
    if terms in _snapshots:
        assert kept.local.revert(_snapshots[terms])
    _snapshots[terms] = kept.local.snapshot()
    chain, coin, run, share = (
        QuickChain(kept.local.client().rpc),
        kept.coin.address,
        kept.run.address,
        kept.share.address,
    )
    return World(chain, Coin(chain, coin), Run(chain, run), ModelShare(chain, share), kept.local)


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

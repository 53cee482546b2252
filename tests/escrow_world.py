"""What the tests of the job escrow share: a coin, an escrow, the people of a job, and hooks that do what they like."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from chain_support import CHAIN_ID, NOW, WORKERS, key
from fast_evm import FastEvm, Sent, mapped
from tessera.chain.client import RpcChain
from tessera.chain.consent import NOBODY
from tessera.chain.face import decode_events
from tessera.chain.faces import Coin, JobEscrow
from tessera.chain.jobs import funding_digest, funding_nonce
from tessera.chain.local import LocalChain
from tessera.chain.types import Chain
from tessera.core.clock import FakeClock
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

CLIENT, PROVIDER, EVALUATOR = WORKERS[:3]
STRANGER = key("stranger")
GRACE = 3_600
DEADLINE = NOW + 100_000_000
OPEN, FUNDED, SUBMITTED, COMPLETED, REJECTED, EXPIRED = range(6)
WORK, REASON = b"\x0a" * 32, b"\x0b" * 32
QUIET = bytes.fromhex("60016000f3")  # creates a contract whose code is STOP: it takes any call

HOOK = """
# pragma version 0.4.3
interface Escrow:
    def claimRefund(id: uint256): nonpayable
    def complete(id: uint256, reason: bytes32): nonpayable

heard: public(DynArray[bytes4, 64])
mode: public(uint256)

@external
def set_mode(mode: uint256):
    self.mode = mode

@internal
def _act(id: uint256, selector: bytes4):
    if self.mode == 1:
        raise "hook: no"
    if self.mode == 2:
        for i: uint256 in range(2**60):
            self.mode = 2
    if self.mode == 3:
        extcall Escrow(msg.sender).claimRefund(id)
    if self.mode == 4:
        extcall Escrow(msg.sender).complete(id, empty(bytes32))
    self.heard.append(selector)

@external
def beforeAction(id: uint256, selector: bytes4, data: Bytes[2048]):
    self._act(id, selector)

@external
def afterAction(id: uint256, selector: bytes4, data: Bytes[2048]):
    self._act(id, selector)
"""


@lru_cache(maxsize=16)
def compiled(source: str) -> bytes:
    """A test's own contract."""
    from vyper import compile_code

    return bytes.fromhex(compile_code(source, output_formats=["bytecode"])["bytecode"][2:])


async def deploy_code(chain: Chain, code: bytes) -> Account:
    receipt = await chain.send(STRANGER, None, code)
    assert receipt.contract is not None
    return receipt.contract


@dataclass
class Escrow:
    """An escrow in which everybody has coins and has approved it."""

    chain: RpcChain
    coin: Coin
    escrow: JobEscrow
    clock: FakeClock | None = None  # where the chain's can be moved

    async def open(
        self,
        budget: int = 1_000,
        *,
        provider: Account | None = PROVIDER.account,
        evaluator: Account = EVALUATOR.account,
        deadline: int = DEADLINE,
        hook: Account = NOBODY,
        on_silence: int = 0,
        bond: int = 0,
        client: AccountKey = CLIENT,
    ) -> int:
        """A job with a price, and its bond."""
        receipt = await self.escrow.createJob(
            client, provider or NOBODY, evaluator, deadline, "Label 20 pictures", hook, on_silence, bond
        )
        (created,) = decode_events(JobEscrow.JobCreated, self.escrow.address, receipt)
        if budget:
            await self.escrow.setBudget(client, created.jobId, budget)
        if bond:
            await self.escrow.postBond(EVALUATOR, created.jobId)
        return created.jobId

    async def funded(self, budget: int = 1_000, **terms: Any) -> int:
        job = await self.open(budget, **terms)
        await self.escrow.fund(terms.get("client", CLIENT), job, budget)
        return job

    async def submitted(self, budget: int = 1_000, **terms: Any) -> int:
        job = await self.funded(budget, **terms)
        await self.escrow.submit(PROVIDER, job, WORK)
        return job

    async def status(self, job: int) -> int:
        return (await self.escrow.jobs(job)).status

    async def holdings(self) -> tuple[int, int, int, int]:
        """What client, provider, evaluator and the escrow hold."""
        accounts = (CLIENT.account, PROVIDER.account, EVALUATOR.account, self.escrow.address)
        client, provider, evaluator, escrow = [await self.coin.balanceOf(account) for account in accounts]
        return client, provider, evaluator, escrow

    async def later(self, seconds: int) -> None:
        """Time passes."""
        if self.clock:
            self.clock.advance(seconds)
            return
        await self.chain.request("evm_increaseTime", [seconds])
        await self.chain.request("evm_mine", [])

    async def authorization(
        self, job_id: int, valid_after: int = 0, valid_before: int = 2**40, signer: AccountKey = CLIENT
    ) -> tuple[int, int, int, bytes, bytes]:
        """The client's signature, as `fundWithAuthorization` takes it."""
        job = await self.escrow.jobs(job_id)
        digest = funding_digest(
            CHAIN_ID, self.coin.address, self.escrow.address, job_id, job, valid_after, valid_before
        )
        assert funding_nonce(job_id, job) == await self.escrow.funding_nonce(job_id)
        signature = signer.sign_digest(digest)
        return valid_after, valid_before, signature[64], signature[:32], signature[32:64]


async def escrow_world(chain: RpcChain, coin: Coin | None = None) -> Escrow:
    coin = coin or await Coin.deploy(chain, CLIENT)
    escrow = await JobEscrow.deploy(chain, CLIENT, coin.address, GRACE)
    for person in (CLIENT, PROVIDER, EVALUATOR):
        await coin.mint(CLIENT, person.account, 10**12)
        await coin.approve(person, escrow.address, 2**256 - 1)
    return Escrow(chain, coin, escrow)


_kept: list[tuple[LocalChain, Escrow, FakeClock]] = []
_snapshot: list[int] = []


async def local_escrow() -> Escrow:
    """As after `escrow_world` on a fresh chain: one is kept, and brought back by a snapshot."""
    if not _kept:
        clock = FakeClock(NOW)
        chain = LocalChain(None, chain_id=CHAIN_ID, clock=clock, dev=True)
        _kept.append((chain, await escrow_world(chain.client()), clock))
    chain, world, clock = _kept[0]
    if _snapshot:
        assert chain.revert(_snapshot.pop())
    _snapshot.append(chain.snapshot())
    clock.advance(NOW - clock.time())
    client = chain.client()
    return Escrow(client, Coin(client, world.coin.address), JobEscrow(client, world.escrow.address), clock)


class FastEscrow:
    """The same on the bare engine, for attacks: synchronous, with a coin of the test's choice."""

    def __init__(self, coin_source: str = "") -> None:
        deployed, self.coin, self.escrow = _fast_escrow(coin_source)
        self.evm = deployed.fork()

    def call(self, sender: AccountKey, signature: str, *values: Any) -> Sent:
        return self.evm.send(sender.account, self.escrow, signature, *values)

    def submitted(
        self, budget: int = 1_000, bond: int = 0, on_silence: int = 0, hook: Account = NOBODY, until: int = SUBMITTED
    ) -> int:
        """A job as far as `until`."""
        call = "createJob(address,address,uint256,string,address,uint256,uint256)"
        terms = (PROVIDER.account, EVALUATOR.account, DEADLINE, "x", hook, on_silence, bond)
        job = int.from_bytes(self.call(CLIENT, call, *terms).result, "big")
        self.call(CLIENT, "setBudget(uint256,uint256)", job, budget)
        if bond:
            self.call(EVALUATOR, "postBond(uint256)", job)
        if until >= FUNDED:
            self.call(CLIENT, "fund(uint256,uint256)", job, budget)
        if until >= SUBMITTED:
            self.call(PROVIDER, "submit(uint256,bytes32)", job, WORK)
        return job

    def complete(self, job: int) -> Sent:
        return self.call(EVALUATOR, "complete(uint256,bytes32)", job, REASON)

    def reject(self, job: int) -> Sent:
        return self.call(EVALUATOR, "reject(uint256,bytes32)", job, REASON)

    def stay_silent(self, job: int, closer: AccountKey = STRANGER) -> Sent:
        self.evm.now = DEADLINE + GRACE
        return self.call(closer, "claimRefund(uint256)", job)

    def status(self, job: int) -> int:
        return self.evm.word(self.escrow, mapped(job, 1)) >> 200 & 255

    def balance(self, account: Account) -> int:
        return int.from_bytes(self.evm.send(account, self.coin, "balanceOf(address)", account).result, "big")

    def gains(self) -> tuple[int, int, int, int]:
        """Of client, provider and evaluator since the beginning, and what the escrow holds."""
        client, provider, evaluator = [self.balance(p.account) - 10**9 for p in (CLIENT, PROVIDER, EVALUATOR)]
        return client, provider, evaluator, self.balance(self.escrow)


@lru_cache(maxsize=4)
def _fast_escrow(coin_source: str) -> tuple[FastEvm, Account, Account]:
    evm, deployer = FastEvm(NOW), STRANGER.account
    coin = evm.create(deployer, compiled(coin_source)) if coin_source else evm.deploy(deployer, "coin")
    escrow = evm.deploy(deployer, "job_escrow", coin, GRACE)
    for person in (CLIENT, PROVIDER, EVALUATOR):
        evm.send(deployer, coin, "mint(address,uint256)", person.account, 10**9)
        evm.send(person.account, coin, "approve(address,uint256)", escrow, 2**256 - 1)
    return evm, coin, escrow

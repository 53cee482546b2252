"""What the tests of spending mandates share: an owner with money, an operator, an agent, a co-signer, two payees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chain_support import CHAIN_ID, NOW, key
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin, SpendPolicy
from tessera.chain.local import LocalChain
from tessera.chain.rpc import Rpc
from tessera.chain.spending import child_id, cosign_digest, mandate_id, spend_digest
from tessera.chain.types import Receipt
from tessera.core.clock import FakeClock
from tessera.core.hashing import keccak
from tessera.core.signing import AccountKey
from tessera.incentives.spend_twin import Limits, Payment, Terms

OWNER, OPERATOR, AGENT, COSIGNER = key("owner"), key("operator"), key("agent"), key("co-signer")
CHILD, GRANDCHILD, RELAYER, THIEF = key("child"), key("grandchild"), key("relayer"), key("thief")
PAYEE, OTHER_PAYEE = key("payee").account, key("other payee").account
DAY, HOUR = 86_400, 3_600
FUNDS, APPROVED = 10_000, 5_000
LABEL, PURPOSE = b"\x01" * 32, keccak(b"hire a labeller")


@dataclass
class Spending:
    """A coin, a policy, and one mandate: 100 at once, 250 a day, the co-signer above 60, ten days."""

    local: LocalChain
    clock: FakeClock
    coin: Coin
    policy: SpendPolicy
    mandate: bytes = b""
    intents: int = field(default=0)

    @property
    def now(self) -> int:
        return int(self.clock.time())

    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.local.mine()

    def wait_for_a_tick(self, period: int = DAY) -> None:
        """To where a sixth of the period begins, so that what follows is the same at any hour."""
        self.wait(-self.now % (period // 6))

    def terms(self, **changes: Any) -> Terms:
        terms = Terms(AGENT.account, OPERATOR.account, COSIGNER.account, self.coin.address, DAY, 2 * DAY)
        return terms._replace(**changes)

    def limits(self, **changes: Any) -> Limits:
        return Limits(100, 250, 60, self.now + 10 * DAY)._replace(**changes)

    async def open(self, limits: Limits | None = None, payees: Sequence[Any] = (PAYEE,), **terms: Any) -> bytes:
        """Another mandate of the owner's."""
        self.intents += 1
        label = keccak(b"label %d" % self.intents)
        await self.policy.open(OWNER, label, self.terms(**terms), limits or self.limits(), payees)
        return mandate_id(OWNER.account, label)

    async def delegate(
        self, parent: bytes, above: AccountKey, agent: AccountKey, limits: Limits | None = None, period: int = DAY
    ) -> bytes:
        """A child with the same payee."""
        limits = limits or self.limits()
        await self.policy.delegate(above, parent, LABEL, agent.account, period, limits, [PAYEE])
        return child_id(parent, LABEL)

    def payment(self, **changes: Any) -> Payment:
        """A new intent, good for an hour."""
        self.intents += 1
        intent = keccak(b"intent %d" % self.intents)
        payment = Payment(self.mandate, PAYEE, 50, intent, PURPOSE, self.now - 1, self.now + HOUR)
        return payment._replace(**changes)

    def sign(self, payment: Payment, signer: AccountKey = AGENT) -> bytes:
        return signer.sign_digest(spend_digest(CHAIN_ID, self.policy.address, payment))

    def cosign(self, payment: Payment, signer: AccountKey = COSIGNER) -> bytes:
        return signer.sign_digest(cosign_digest(CHAIN_ID, self.policy.address, payment))

    async def pay(self, signer: AccountKey = AGENT, *, cosigner: AccountKey | None = None, **changes: Any) -> Payment:
        """One payment, brought by the relayer."""
        payment = self.payment(**changes)
        await self.send(payment, self.sign(payment, signer), self.cosign(payment, cosigner) if cosigner else None)
        return payment

    async def send(self, payment: Payment, signature: bytes, cosignature: bytes | None = None) -> Receipt:
        return await self.policy.spend(RELAYER, payment, signature, cosignature)

    async def left(self) -> int:
        """The owner's money; raises unless all that is gone is with the payees."""
        left = await self.coin.balanceOf(OWNER.account)
        paid = await self.coin.balanceOf(PAYEE) + await self.coin.balanceOf(OTHER_PAYEE)
        assert left + paid == await self.coin.totalSupply() == FUNDS
        return left


class PlentyOfGas:
    """Tries a transaction once and offers far more than it takes: looking for the least that a call of a call needs
    takes a dozen runs."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    async def request(self, method: str, params: list[Any]) -> Any:
        if method != "eth_estimateGas":
            return await self._rpc.request(method, params)
        await self._rpc.request("eth_call", params)
        return hex(2_000_000)


_kept: list[Spending] = []
_snapshot: list[int] = []


async def spending_world() -> Spending:
    """Coin and policy are deployed once and brought back by a snapshot; only the clock goes on."""
    if not _kept:
        clock = FakeClock(NOW)
        local = LocalChain(None, chain_id=CHAIN_ID, clock=clock, dev=True)
        coin = await Coin.deploy(local.client(), OWNER)
        policy = await SpendPolicy.deploy(local.client(), OWNER)
        await coin.mint(OWNER, OWNER.account, FUNDS)
        await coin.approve(OWNER, policy.address, APPROVED)
        _kept.append(Spending(local, clock, coin, policy))
    kept = _kept[0]
    if _snapshot:
        assert kept.local.revert(_snapshot.pop())
    _snapshot.append(kept.local.snapshot())
    chain = RpcChain(PlentyOfGas(kept.local.client().rpc))
    world = Spending(kept.local, kept.clock, Coin(chain, kept.coin.address), SpendPolicy(chain, kept.policy.address))
    world.wait_for_a_tick()
    world.mandate = await world.open()
    return world

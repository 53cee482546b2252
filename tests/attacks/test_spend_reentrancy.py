"""A coin, or a payee with a hook in it, that calls back while it is paid: the lock holds, and nothing is paid twice.

Known from The DAO (2016), and from imBTC on Uniswap (2020), an ERC-777 coin whose hooks called back.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import boa
import pytest

from boa_chain import BoaChain, boa_chain, now
from chain_support import NOW, key
from tessera.chain.faces import SpendPolicy
from tessera.chain.spending import mandate_id, revoke_digest, spend_digest
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey
from tessera.incentives.spend_twin import NO_ONE, Limits, Payment, Terms

EVIL_COIN = """
# pragma version 0.4.3
balanceOf: public(HashMap[address, uint256])
target: address
payload: Bytes[2048]
calls: public(uint256)
successes: public(uint256)

@external
def arm(target: address, payload: Bytes[2048]):
    self.target = target
    self.payload = payload

@external
def mint(receiver: address, amount: uint256):
    self.balanceOf[receiver] += amount

@external
def transferFrom(owner: address, receiver: address, amount: uint256) -> bool:
    self.balanceOf[owner] -= amount
    self.balanceOf[receiver] += amount
    if self.calls < 3:
        self.calls += 1
        if raw_call(self.target, self.payload, revert_on_failure=False):
            self.successes += 1
    return True
"""
OWNER, AGENT, PAYEE, RELAYER = key("owner"), key("agent"), key("payee").account, key("relayer")
LABEL = b"\x01" * 32
_code: list[Any] = []


def evil_coin() -> Any:
    if not _code:
        _code.append(boa.loads_partial(EVIL_COIN))
    return _code[0].deploy()


class Recorder:
    """A chain that sends nothing: it keeps what would be sent."""

    data: bytes

    async def send(self, sender: AccountKey, to: Account | None, data: bytes, *, value: int = 0) -> None:
        self.data = data

    async def call(self, to: Account, data: bytes, *, block: int | None = None) -> bytes:
        self.data = data
        return bytes(32)


class Attack:
    """A mandate over a coin that calls back: 100 at once, 250 in a period."""

    def __init__(self, chain: BoaChain) -> None:
        self.coin = evil_coin()
        self.policy = SpendPolicy(chain, now(chain.deploy(OWNER, "spend_policy")))  # type: ignore[arg-type]
        self.recorder = Recorder()
        self.inner = SpendPolicy(self.recorder, self.policy.address)  # type: ignore[arg-type]
        self.chain_id = now(chain.chain_id())
        self.mandate = mandate_id(OWNER.account, LABEL)
        self.limits = Limits(100, 250, 100, NOW + 10_000)
        terms = Terms(AGENT.account, NO_ONE, NO_ONE, parse_account(str(self.coin.address)), 600, 3_600)
        now(self.policy.open(OWNER, LABEL, terms, self.limits, [PAYEE]))
        self.coin.mint(OWNER.account, 1_000)

    def signed(self, intent: int) -> tuple[Payment, bytes]:
        payment = Payment(self.mandate, PAYEE, 100, bytes([intent]) * 32, LABEL, NOW - 1, NOW + 100)
        return payment, AGENT.sign_digest(spend_digest(self.chain_id, self.policy.address, payment))

    def arm(self, call: Coroutine[Any, Any, object]) -> None:
        """What the coin will call, three times at most, while it is asked to pay."""
        now(call)
        self.coin.arm(self.policy.address, self.recorder.data)


@pytest.mark.parametrize("inside", ["the same payment", "the next payment", "an end", "tighter limits", "a look"])
def test_nothing_can_be_called_while_a_payment_is_under_way(inside: str) -> None:
    with boa_chain(NOW) as chain:
        attack = Attack(chain)
        revoke = revoke_digest(attack.chain_id, attack.policy.address, attack.mandate)
        calls = {
            "the same payment": lambda: attack.inner.spend(RELAYER, *attack.signed(1)),
            "the next payment": lambda: attack.inner.spend(RELAYER, *attack.signed(2)),
            "an end": lambda: attack.inner.revoke(RELAYER, attack.mandate, AGENT.sign_digest(revoke)),
            "tighter limits": lambda: attack.inner.tighten(RELAYER, attack.mandate, attack.limits, []),
            "a look": lambda: attack.inner.available(attack.mandate),
        }
        attack.arm(calls[inside]())
        now(attack.policy.spend(RELAYER, *attack.signed(1)))
        assert (attack.coin.calls(), attack.coin.successes()) == (1, 0)
        assert (attack.coin.balanceOf(OWNER.account), attack.coin.balanceOf(PAYEE)) == (900, 100)
        assert now(attack.policy.spent(attack.mandate)) == 100
        assert now(attack.policy.available(attack.mandate)) == 100


def test_what_was_refused_inside_can_be_done_after() -> None:
    """The same calls, from outside: it was the lock that refused them."""
    with boa_chain(NOW) as chain:
        attack = Attack(chain)
        for intent in (1, 2):
            now(attack.policy.spend(RELAYER, *attack.signed(intent)))
        assert attack.coin.balanceOf(PAYEE) == 200
        revoke = revoke_digest(attack.chain_id, attack.policy.address, attack.mandate)
        now(attack.policy.revoke(RELAYER, attack.mandate, AGENT.sign_digest(revoke)))
        assert now(attack.policy.available(attack.mandate)) == 0

"""Spending mandates beside their twin, through any sequence of calls by owners, operators, agents, a thief and time.

The twin says for every call whether the contract takes it, and with which reason it refuses. Beside both, plain records
of what was really paid hold the invariants, so that a mistake shared by contract and twin is seen too:

- no window of one period holds more payments than the cap in force, under a mandate and all its children;
- each payment is within the cap for one, and goes to a listed payee, under the mandate and each above it;
- above a threshold the co-signer has signed; one payment for one intent; none after an end; none without the agent;
- the coin is conserved to the last unit, the contract holds none, and no owner pays more than he approved;
- limits are loosened by nothing but a proposal that has waited its delay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from boa_chain import BoaChain, boa_chain, now
from chain_support import NOW, key
from fuzzing import FUZZ, explore
from tessera.chain.faces import Coin, SpendPolicy
from tessera.chain.reverts import revert_error
from tessera.chain.spending import child_id, cosign_digest, mandate_id, revoke_digest, spend_digest
from tessera.core.errors import TesseraError
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.signing import AccountKey
from tessera.incentives.spend_twin import NO_ONE, Limits, Payment, SpendTwin, Terms

OWNERS = [key(f"owner {i}") for i in range(2)]
OPERATORS = [key(f"operator {i}") for i in range(2)]
AGENTS = [key(f"agent {i}") for i in range(4)]
COSIGNER, THIEF, RELAYER = key("co-signer"), key("thief"), key("relayer")
EVERYBODY = [*OWNERS, *OPERATORS, *AGENTS, COSIGNER, THIEF]
PAYEES = [key(f"payee {i}").account for i in range(3)]
PERIOD, DELAY, FUNDS, MANDATES = 600, 3_600, 5_000, 12

keys = st.sampled_from(EVERYBODY)
some_payees = st.sampled_from([PAYEES, PAYEES[:2], PAYEES[1:], PAYEES[:1], []])
caps = st.tuples(
    st.integers(1, 60), st.integers(1, 150), st.integers(0, 60), st.integers(0, 40_000),
    st.sampled_from([False] * 4 + [True]),
)  # fmt: skip
waits = st.one_of(st.integers(1, PERIOD // 6), st.sampled_from([PERIOD // 6, PERIOD - 1, PERIOD, PERIOD + PERIOD // 6]))


@dataclass(frozen=True)
class Paid:
    """One payment as it happened."""

    when: int
    payment: Payment
    line: tuple[bytes, ...]  # the mandate and each above it


class Deployed:
    """One coin and one contract, for all examples."""

    def __init__(self, chain: BoaChain) -> None:
        self.chain = chain
        self.coin = Coin(chain, now(chain.deploy(OWNERS[0], "coin")))  # type: ignore[arg-type]
        self.policy = SpendPolicy(chain, now(chain.deploy(OWNERS[0], "spend_policy")))  # type: ignore[arg-type]
        self.chain_id = now(chain.chain_id())
        for owner in OWNERS:
            now(self.coin.mint(owner, owner.account, FUNDS))
            now(self.coin.approve(owner, self.policy.address, FUNDS // 2))


_deployed: list[Deployed] = []


class Spending(RuleBasedStateMachine):
    """Two owners, two operators, four agents, a co-signer, a thief, a relayer and three payees: fourteen."""

    def __init__(self) -> None:
        super().__init__()
        (deployed,) = _deployed
        self.chain, self.coin, self.policy, self.chain_id = (
            deployed.chain, deployed.coin, deployed.policy, deployed.chain_id,
        )  # fmt: skip
        self._anchor = self.chain.anchor()
        self._anchor.__enter__()
        self.twin = SpendTwin(self.policy.address)
        self.ids: list[bytes] = []
        self.parents: dict[bytes, bytes | None] = {}
        self.ended: set[bytes] = set()
        self.paid: list[Paid] = []
        self.last: tuple[Payment, bytes, bytes] | None = None
        self.balances = {k.account: FUNDS for k in OWNERS} | dict.fromkeys(PAYEES, 0)
        self.allowed = {k.account: FUNDS // 2 for k in OWNERS}
        self.may_loosen: dict[bytes, tuple[int, Limits]] = {}
        self.steps = 0
        self.moved = True
        for owner in OWNERS:  # so that every example has somebody who may pay
            self._open(owner, AGENTS[0], Limits(50, 120, 40, NOW + 100_000), PAYEES[:2], OPERATORS[0].account, True)

    def teardown(self) -> None:
        self._anchor.__exit__(None, None, None)

    # --- actions ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.ids) < MANDATES)
    @rule(owner=st.sampled_from(OWNERS), agent=keys, cap=caps, payees=some_payees, watched=st.booleans())
    def open(self, owner: AccountKey, agent: AccountKey, cap: Any, payees: list[Account], watched: bool) -> None:
        operator = OPERATORS[1].account if watched else NO_ONE
        self._open(owner, agent, self.limits(cap), payees, operator, watched)

    def _open(
        self, owner: AccountKey, agent: AccountKey, limits: Limits, payees: list[Account], operator: Account, co: bool
    ) -> None:
        label = keccak(b"%d" % len(self.ids))
        mandate = mandate_id(owner.account, label)
        terms = Terms(agent.account, operator, COSIGNER.account if co else NO_ONE, self.coin.address, PERIOD, DELAY)
        done = self.both(
            lambda: self.twin.open(mandate, owner.account, terms, limits, payees),
            lambda: now(self.policy.open(owner, label, terms, limits, payees)),
        )
        if done:
            self.parents[mandate] = None
            self.ids.append(mandate)
            self.pay_rightly(mandate, 2, 1)

    @precondition(lambda self: len(self.ids) < MANDATES)
    @rule(data=st.data(), agent=keys, cap=caps, payees=some_payees, shorter=st.booleans())
    def delegate(self, data: st.DataObject, agent: AccountKey, cap: Any, payees: list[Account], shorter: bool) -> None:
        parent = self.pick(data)
        sender = self.somebody(data, parent) if data.draw(st.integers(0, 5)) == 0 else self.agent(parent)
        label, period, limits = keccak(b"%d" % len(self.ids)), PERIOD // (2 if shorter else 1), self.limits(cap)
        child = child_id(parent, label)
        done = self.both(
            lambda: self.twin.delegate(child, parent, sender.account, agent.account, period, limits, payees),
            lambda: now(self.policy.delegate(sender, parent, label, agent.account, period, limits, payees)),
        )
        if done:
            self.parents[child] = parent
            self.ids.append(child)
            self.pay_rightly(child, 2, 1)

    @rule(data=st.data(), where=st.integers(0, 9), times=st.integers(1, 4), pause=st.integers(0, PERIOD // 4))
    def spend(self, data: st.DataObject, where: int, times: int, pause: int) -> None:
        """What a mandate's agent does: to those who are listed, within the limits."""
        mandate = self.pick(data)
        for _ in range(times):
            self.pay_rightly(mandate, max(1, self.twin.available(mandate, self.chain.time) // 2), where)
            self.chain.wait(pause)

    @rule(data=st.data(), where=st.integers(0, 9), over=st.sampled_from([0, 0, 1]))
    def spend_all(self, data: st.DataObject, where: int, over: int) -> None:
        """To the last unit that is allowed, and now and then one more."""
        mandate = self.pick(data)
        self.pay_rightly(mandate, max(1, self.twin.available(mandate, self.chain.time) + over), where)

    def pay_rightly(self, mandate: bytes, amount: int, where: int, intent: int | None = None) -> None:
        nodes = [self.twin.mandates[m] for m in self.upwards(mandate)]
        listed = [p for p in PAYEES if all(p in node.payees or node.limits.any_payee for node in nodes)] or PAYEES
        co = any(amount > node.limits.cosign_above for node in nodes) and where > 0
        self.pay(
            mandate,
            self.agent(mandate),
            listed[where % len(listed)],
            amount,
            co,
            len(self.paid) if intent is None else intent,
        )

    @rule(
        data=st.data(), signer=keys, payee=st.sampled_from([*PAYEES, THIEF.account, NO_ONE]), amount=st.integers(0, 80),
        co=st.booleans(), intent=st.integers(0, 30), start=st.sampled_from([-1] * 8 + [0, -300]),
    )  # fmt: skip
    def steal(
        self, data: st.DataObject, signer: AccountKey, payee: Account, amount: int, co: bool, intent: int, start: int
    ) -> None:
        """Whoever signs, to whomever, for something that may be paid already, and not always at a right time."""
        self.pay(self.pick(data), signer, payee, amount, co, min(intent, len(self.paid)), start)

    def pay(
        self, mandate: bytes, signer: AccountKey, payee: Account, amount: int, co: bool, intent: int, start: int = -1
    ) -> None:
        first = self.chain.time + start
        payment = Payment(mandate, payee, amount, keccak(b"i%d" % intent), b"\x07" * 32, first, first + 300)
        signature = signer.sign_digest(spend_digest(self.chain_id, self.policy.address, payment))
        cosignature = COSIGNER.sign_digest(cosign_digest(self.chain_id, self.policy.address, payment)) if co else b""
        self.send(payment, signer.account, signature, cosignature)

    @rule(intent=st.integers(0, 30))
    def pay_again_elsewhere(self, intent: int) -> None:
        """Every agent tries the same intent: one of a mandate and its children gets through."""
        for mandate in list(self.ids):
            self.pay_rightly(mandate, 1, 1, min(intent, len(self.paid)))

    @precondition(lambda self: self.last)
    @rule()
    def replay(self) -> None:
        assert self.last
        payment, signature, cosignature = self.last
        agent = self.twin.mandates[payment.mandate].terms.agent
        self.send(payment, agent, signature, cosignature)

    def send(self, payment: Payment, signer: Account, signature: bytes, cosignature: bytes) -> None:
        owner = self.twin.mandates[payment.mandate].owner
        cosigner = COSIGNER.account if cosignature else None
        when = self.chain.time

        def expected() -> None:
            self.twin.check(payment, signer, cosigner, when)
            if payment.amount > self.allowed[owner]:
                raise revert_error("coin: transfer amount exceeds allowance")
            if payment.amount > self.balances[owner]:
                raise revert_error("coin: transfer amount exceeds balance")
            self.twin.spend(payment, signer, cosigner, when)

        if not self.both(expected, lambda: now(self.policy.spend(RELAYER, payment, signature, cosignature))):
            return
        self.balances[owner] -= payment.amount
        self.balances.setdefault(payment.payee, 0)
        self.balances[payment.payee] += payment.amount
        self.allowed[owner] -= payment.amount
        self.last = (payment, signature, cosignature)
        self.moved = True
        self.audit(Paid(when, payment, tuple(self.upwards(payment.mandate))), signer, cosigner)

    @precondition(lambda self: set(self.ids[2:]) - self.ended)
    @rule(data=st.data(), signed=st.booleans())
    def revoke(self, data: st.DataObject, signed: bool) -> None:
        """The first two live on, for there to be something to see."""
        mandate = data.draw(st.sampled_from([m for m in self.ids[2:] if m not in self.ended]))
        who = self.somebody(data, mandate)
        digest = revoke_digest(self.chain_id, self.policy.address, mandate)
        sender, signature = (RELAYER, who.sign_digest(digest)) if signed else (who, None)
        done = self.both(
            lambda: self.twin.revoke(mandate, who.account),
            lambda: now(self.policy.revoke(sender, mandate, signature)),
        )
        if done:
            self.ended.add(mandate)

    @rule(
        data=st.data(),
        less=st.integers(0, 2),
        longer=st.sampled_from([0] * 5 + [1]),
        dropped=st.sampled_from([[]] * 5 + [PAYEES[:1], PAYEES[1:]]),
    )
    def tighten(self, data: st.DataObject, less: int, longer: int, dropped: list[Account]) -> None:
        mandate = self.pick(data)
        who = self.somebody(data, mandate)
        before = self.twin.mandates[mandate].limits
        limits = Limits(
            max(1, before.per_payment - less), before.per_period, before.cosign_above, before.expires_at + longer,
            before.any_payee,
        )  # fmt: skip
        done = self.both(
            lambda: self.twin.tighten(mandate, who.account, limits, dropped),
            lambda: now(self.policy.tighten(who, mandate, limits, dropped)),
        )
        if done:
            self.may_loosen.pop(mandate, None)

    @rule(data=st.data(), cap=caps, payees=some_payees)
    def propose(self, data: st.DataObject, cap: Any, payees: list[Account]) -> None:
        mandate = self.pick(data)
        who = self.somebody(data, mandate)
        limits, when = self.limits(cap), self.chain.time
        done = self.both(
            lambda: self.twin.propose(mandate, who.account, limits, payees, when),
            lambda: now(self.policy.propose(who, mandate, limits, payees)),
        )
        if done:
            self.may_loosen[mandate] = (when + DELAY, limits)

    @precondition(lambda self: self.may_loosen)
    @rule(data=st.data())
    def loosen(self, data: st.DataObject) -> None:
        """Anybody may send it."""
        mandate = data.draw(st.sampled_from(sorted(self.may_loosen)))
        due, limits = self.may_loosen[mandate]
        proposal = self.twin.mandates[mandate].proposal
        assert proposal is not None
        done = self.both(
            lambda: self.twin.loosen(mandate, limits, proposal[1], self.chain.time),
            lambda: now(self.policy.loosen(THIEF, mandate, limits, proposal[1])),
        )
        if done:
            assert self.chain.time >= due
            assert now(self.policy.limits(mandate)) == limits
            del self.may_loosen[mandate]

    @precondition(lambda self: self.may_loosen)
    @rule()
    def wait_for_a_proposal(self) -> None:
        self.chain.wait(DELAY)

    @rule(seconds=waits, who=st.integers(0, MANDATES))
    def wait(self, seconds: int, who: int) -> None:
        """And the agents go on paying."""
        self.chain.wait(seconds)
        for mandate in (self.ids[0], self.ids[who % len(self.ids)]):
            self.pay_rightly(mandate, max(1, self.twin.available(mandate, self.chain.time) // 2), who)

    @rule(owner=st.sampled_from(OWNERS), amount=st.integers(0, 900))
    def approve(self, owner: AccountKey, amount: int) -> None:
        now(self.coin.approve(owner, self.policy.address, amount))
        self.allowed[owner.account] = amount

    @rule(owner=st.sampled_from(OWNERS), part=st.fractions(0, 1, max_denominator=10))
    def owner_pays(self, owner: AccountKey, part: Any) -> None:
        """His money stays his: he may pay by himself."""
        amount = int(self.balances[owner.account] * part / 10)
        now(self.coin.transfer(owner, PAYEES[2], amount))
        self.moved = True
        self.balances[owner.account] -= amount
        self.balances[PAYEES[2]] += amount

    # --- what must hold -----------------------------------------------------------------------------------------------

    def audit(self, paid: Paid, signer: Account, cosigner: Account | None) -> None:
        """The payment that was just made, against plain records."""
        payment = paid.payment
        root = paid.line[-1]
        assert all(p.payment.intent != payment.intent or p.line[-1] != root for p in self.paid), "one for an intent"
        self.paid.append(paid)
        assert signer == self.twin.mandates[payment.mandate].terms.agent
        for mandate in paid.line:
            node = self.twin.mandates[mandate]
            assert mandate not in self.ended
            assert paid.when < node.limits.expires_at
            assert node.limits.any_payee or payment.payee in node.payees
            assert 0 < payment.amount <= node.limits.per_payment
            assert payment.amount <= node.limits.cosign_above or cosigner == COSIGNER.account
            window = [p for p in self.paid if mandate in p.line and p.when >= paid.when - node.terms.period]
            assert sum(p.payment.amount for p in window) <= node.limits.per_period

    @precondition(lambda self: self.moved)
    @invariant()
    def the_coin_is_conserved(self) -> None:
        real = {account: now(self.coin.balanceOf(account)) for account in self.balances}
        assert real == self.balances
        assert sum(real.values()) == 2 * FUNDS == now(self.coin.totalSupply())
        assert now(self.coin.balanceOf(self.policy.address)) == 0
        self.moved = False

    @invariant()
    def contract_and_twin_agree_on_the_room_that_is_left(self) -> None:
        self.steps += 1
        mandate = self.ids[self.steps % len(self.ids)]  # one after the other: a call of the contract takes milliseconds
        assert now(self.policy.available(mandate)) == self.twin.available(mandate, self.chain.time)

    # --- helpers ------------------------------------------------------------------------------------------------------

    def both(self, twin: Callable[[], object], contract: Callable[[], object]) -> bool:
        """Whether both did it; both refuse with the same class and reason."""
        said = [refusal(twin), refusal(contract)]
        assert said[0] == said[1]
        return said[0] is None

    def limits(self, cap: tuple[int, int, int, int, bool]) -> Limits:
        return Limits(cap[0], cap[1], cap[2], self.chain.time + cap[3], cap[4])

    def pick(self, data: st.DataObject) -> bytes:
        return data.draw(st.sampled_from(self.ids))

    def agent(self, mandate: bytes) -> AccountKey:
        return next(k for k in EVERYBODY if k.account == self.twin.mandates[mandate].terms.agent)

    def somebody(self, data: st.DataObject, mandate: bytes) -> AccountKey:
        """Mostly one who has power over the mandate."""
        nodes = [self.twin.mandates[m] for m in self.upwards(mandate)]
        powerful = {nodes[0].owner, nodes[0].terms.operator, *(node.terms.agent for node in nodes)}
        return data.draw(st.sampled_from([k for k in EVERYBODY if k.account in powerful] * 3 + [THIEF]))

    def upwards(self, mandate: bytes) -> Iterator[bytes]:
        node: bytes | None = mandate
        while node is not None:
            yield node
            node = self.parents[node]


def refusal(act: Callable[[], object]) -> tuple[type[TesseraError], str] | None:
    """How `act` was refused: the class, and the contract's reason."""
    try:
        act()
    except TesseraError as error:
        return type(error), error.message.removeprefix("the contract refused: ")
    return None


@contextmanager
def deployed() -> Iterator[None]:
    with boa_chain(NOW) as chain:
        _deployed.append(Deployed(chain))
        try:
            yield
        finally:
            _deployed.clear()


def walk(examples: int, steps: int) -> None:
    with deployed():
        explore(Spending, examples, steps)


def test_the_contract_agrees_with_its_twin() -> None:
    walk(examples=6, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(900 * FUZZ)
def test_the_contract_agrees_with_its_twin_for_long() -> None:
    walk(examples=200 * FUZZ, steps=50)

"""The job escrow beside its exact twin, through any sequence of actions by twelve people.

Invariants, after every action:
- each account has what the twin says, and all of them with the escrow have what was minted, to the last unit;
- the escrow holds exactly the budgets and bonds of live jobs;
- a status only moves forward, and a job's money is paid out once, whole.
At the end a stranger closes every funded job, and nothing is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chain_support import NOW, key
from escrow_world import HOOK, compiled
from fast_evm import FastEvm, Reverted, mapped
from fuzzing import FUZZ, explore
from tessera.chain.consent import NOBODY
from tessera.chain.faces import JobEscrow
from tessera.core.errors import TesseraError
from tessera.core.ids import Account
from tessera.incentives.escrow_twin import EscrowTwin, Job, JobStatus

PEOPLE = [key(f"person {number}").account for number in range(12)]
STRANGER = key("stranger").account
GRACE = 3_600
EACH = 10**30
WORD = b"\x0c" * 32
ENDS = {JobEscrow.JobCompleted.TOPIC, JobEscrow.JobRejected.TOPIC, JobEscrow.JobExpired.TOPIC}
PAYOUTS = {JobEscrow.PaymentReleased.TOPIC, JobEscrow.Refunded.TOPIC}

people = st.integers(0, 11)
amounts = st.one_of(st.integers(0, 20), st.integers(0, 2**96 - 1))
parts = st.one_of(st.sampled_from([0, 10_000]), st.integers(0, 10_000))
roles = st.sampled_from(["client", "provider", "evaluator", "client", "provider", "evaluator", "anybody"])


@lru_cache(maxsize=1)
def deployed() -> tuple[FastEvm, Account, Account, Account]:
    """Everybody has coins and has approved the escrow."""
    evm = FastEvm(NOW)
    coin = evm.deploy(STRANGER, "coin")
    escrow = evm.deploy(STRANGER, "job_escrow", coin, GRACE)
    hook = evm.create(STRANGER, compiled(HOOK))
    for person in PEOPLE:
        evm.send(STRANGER, coin, "mint(address,uint256)", person, EACH)
        evm.send(person, coin, "approve(address,uint256)", escrow, 2**256 - 1)
    return evm.fork(), coin, escrow, hook


class Escrow(RuleBasedStateMachine):
    """Twelve people, one coin, one hook that is in a mood at times."""

    @initialize()
    def deploy(self) -> None:
        evm, self.coin, self.escrow, self.hook = deployed()
        self.evm = evm.fork()
        self.twin = EscrowTwin(GRACE)
        self.hooked: list[bool] = []
        self.mood = False
        self.seen: list[JobStatus] = []
        self.ends: Counter[int] = Counter()
        self.paid: Counter[int] = Counter()

    @rule(client=people, provider=st.one_of(st.none(), people), evaluator=people, days=st.integers(0, 20), part=parts,
          bond=st.one_of(st.just(0), amounts), hooked=st.booleans())  # fmt: skip
    def create(
        self, client: int, provider: int | None, evaluator: int, days: int, part: int, bond: int, hooked: bool
    ) -> None:
        named = None if provider is None else PEOPLE[provider]
        job = Job(PEOPLE[client], named, PEOPLE[evaluator], self.evm.now + days * 86_400, part, bond)
        terms = (named or NOBODY, job.evaluator, job.deadline, "x", self.hook if hooked else NOBODY, part, bond)
        call = "createJob(address,address,uint256,string,address,uint256,uint256)"
        if self.both(lambda: self.twin.create(job, self.evm.now), job.client, call, *terms):
            self.hooked.append(hooked)
            self.seen.append(JobStatus.OPEN)

    @rule(which=st.integers(0, 99), role=roles, person=people, provider=people)
    def set_provider(self, which: int, role: str, person: int, provider: int) -> None:
        def twin(job: Job, who: str) -> None:
            self.twin.set_provider(job, who, PEOPLE[provider])

        self.act(which, role, person, twin, "setProvider(uint256,address)", PEOPLE[provider], asks=True)

    @rule(which=st.integers(0, 99), role=roles, person=people, amount=amounts)
    def set_budget(self, which: int, role: str, person: int, amount: int) -> None:
        def twin(job: Job, who: str) -> None:
            self.twin.set_budget(job, who, amount)

        self.act(which, role, person, twin, "setBudget(uint256,uint256)", amount, asks=True)

    @rule(which=st.integers(0, 99), role=roles, person=people)
    def post_bond(self, which: int, role: str, person: int) -> None:
        self.act(which, role, person, self.twin.post_bond, "postBond(uint256)")

    @rule(which=st.integers(0, 99), role=roles, person=people)
    def withdraw_bond(self, which: int, role: str, person: int) -> None:
        self.act(which, role, person, self.twin.withdraw_bond, "withdrawBond(uint256)")

    @rule(which=st.integers(0, 99), role=roles, person=people, off=st.sampled_from([0, 0, 0, 0, 1]))
    def fund(self, which: int, role: str, person: int, off: int) -> None:
        if self.twin.jobs:
            expected = self.twin.jobs[which % len(self.twin.jobs)].budget + off

            def twin(job: Job, who: str) -> None:
                self.twin.fund(job, who, expected, self.evm.now)

            self.act(which, role, person, twin, "fund(uint256,uint256)", expected, asks=True)

    @rule(client=people, price=amounts, bond=st.one_of(st.just(0), amounts), part=parts)
    def agree_on_a_job(self, client: int, price: int, bond: int, part: int) -> None:
        """Client, provider and evaluator do all they must, so that many jobs get as far as money."""
        provider, evaluator = (client + 1) % 12, (client + 2) % 12
        self.create(client, provider, evaluator, 5, part, bond, False)
        which = len(self.twin.jobs) - 1
        self.set_budget(which, "client", 0, price)
        self.post_bond(which, "evaluator", 0)
        self.fund(which, "client", 0, 0)

    @rule(which=st.integers(0, 99), role=roles, person=people)
    def submit(self, which: int, role: str, person: int) -> None:
        def twin(job: Job, who: str) -> None:
            self.twin.submit(job, who, self.evm.now)

        self.act(which, role, person, twin, "submit(uint256,bytes32)", WORD)

    @rule(which=st.integers(0, 99), role=roles, person=people, accept=st.booleans())
    def judge(self, which: int, role: str, person: int, accept: bool) -> None:
        def twin(job: Job, who: str) -> None:
            (self.twin.complete if accept else self.twin.reject)(job, who, self.evm.now)

        call = "complete(uint256,bytes32)" if accept else "reject(uint256,bytes32)"
        self.act(which, role, person, twin, call, WORD)

    @rule(which=st.integers(0, 99), person=people)
    def claim_refund(self, which: int, person: int) -> None:
        def twin(job: Job, who: str) -> None:
            self.twin.claim_refund(job, self.evm.now)

        self.act(which, "anybody", person, twin, "claimRefund(uint256)")

    @rule(days=st.one_of(st.just(0), st.integers(0, 10)), seconds=st.sampled_from([1, GRACE - 1, GRACE]))
    def time_passes(self, days: int, seconds: int) -> None:
        self.evm.now += days * 86_400 + seconds

    @rule(person=people, amount=st.integers(0, 5))
    def dust_arrives(self, person: int, amount: int) -> None:
        """Nobody's money; it changes nothing."""
        self.evm.send(PEOPLE[person], self.coin, "transfer(address,uint256)", self.escrow, amount)
        self.twin.gains[PEOPLE[person]] -= amount
        self.twin.gains["dust"] += amount

    @rule()
    def the_hook_changes_its_mood(self) -> None:
        self.mood = not self.mood
        self.evm.send(STRANGER, self.hook, "set_mode(uint256)", int(self.mood))

    # --- one action, twice ------------------------------------------------------------------------------------------

    def act(
        self, which: int, role: str, person: int, twin: Callable[[Job, str], None], call: str, *values: Any,
        asks: bool = False,
    ) -> None:  # fmt: skip
        """An action on a job; `asks` says that its hook may refuse."""
        if not self.twin.jobs:
            return
        place = which % len(self.twin.jobs)
        job = self.twin.jobs[place]
        who = PEOPLE[person] if role == "anybody" else getattr(job, role) or PEOPLE[person]
        if asks and self.hooked[place] and self.mood:
            with pytest.raises(Reverted):
                self.evm.send(who, self.escrow, call, place + 1, *values)
        else:
            self.both(lambda: twin(job, who), who, call, place + 1, *values)
        self.compare(place)

    def both(self, twin: Callable[[], None], who: Account, call: str, *values: Any) -> bool:
        """The twin and the contract do it, or both refuse."""
        try:
            twin()
        except TesseraError:
            with pytest.raises(Reverted, match="job_escrow: "):
                self.evm.send(who, self.escrow, call, *values)
            return False
        for address, topics, data in self.evm.send(who, self.escrow, call, *values).outcome.logs:
            if address == bytes.fromhex(self.escrow[2:]):
                job = int.from_bytes(topics[1], "big") - 1
                self.ends[job] += topics[0] in ENDS
                self.paid[job] += int.from_bytes(data, "big") if topics[0] in PAYOUTS else 0
        return True

    def compare(self, place: int) -> None:
        """The record, word by word."""
        job, slot = self.twin.jobs[place], mapped(place + 1, 1)
        head, offer, judge = [self.evm.word(self.escrow, slot + part) for part in range(3)]
        flags = job.status << 200 | job.on_silence << 208
        assert head % 2**224 == number(job.client) | job.deadline << 160 | flags
        assert head >> 232 == self.hooked[place]
        assert offer == number(job.provider) | job.budget << 160
        assert judge == number(job.evaluator) | job.bond << 160
        assert job.status > JobStatus.SUBMITTED or head >> 224 & 1 == job.bonded
        assert job.status >= self.seen[place]
        self.seen[place] = job.status

    # --- what always holds ------------------------------------------------------------------------------------------

    def balance(self, account: Account) -> int:
        return self.evm.word(self.coin, mapped(account, 1))

    @invariant()
    def everybody_has_what_the_twin_says(self) -> None:
        balances = [self.balance(person) for person in PEOPLE]
        assert balances == [EACH + self.twin.gains[person] for person in PEOPLE]
        held = self.balance(self.escrow)
        assert held == self.twin.held + self.twin.gains["dust"]
        assert sum(balances) + held == len(PEOPLE) * EACH

    @invariant()
    def a_job_ends_once_and_pays_once(self) -> None:
        for place, job in enumerate(self.twin.jobs):
            ended = job.status > JobStatus.SUBMITTED
            assert self.ends[place] == ended
            assert self.paid[place] in ((0, job.budget) if ended else (0,))

    def teardown(self) -> None:
        """Whatever happened, time and a stranger close everything, and all the money is somebody's again."""
        if not hasattr(self, "evm"):
            return
        self.evm.now += 100 * 86_400
        for place, job in enumerate(self.twin.jobs):
            if job.status in (JobStatus.FUNDED, JobStatus.SUBMITTED):
                self.both(
                    lambda job=job: self.twin.claim_refund(job, self.evm.now),  # type: ignore[misc]
                    STRANGER, "claimRefund(uint256)", place + 1,
                )  # fmt: skip
                self.compare(place)
                assert (self.ends[place], self.paid[place]) == (1, job.budget)
            elif job.bonded:
                self.both(
                    lambda job=job: self.twin.withdraw_bond(job, job.evaluator),  # type: ignore[misc]
                    Account(job.evaluator), "withdrawBond(uint256)", place + 1,
                )  # fmt: skip
        self.everybody_has_what_the_twin_says()
        assert self.balance(self.escrow) == self.twin.gains["dust"]


def number(account: str | None) -> int:
    return int(account, 16) if account else 0


def test_the_contract_agrees_with_its_twin() -> None:
    explore(Escrow, examples=10, steps=25)


@pytest.mark.slow
@pytest.mark.timeout(900 * FUZZ)
def test_the_contract_agrees_with_its_twin_for_long() -> None:
    explore(Escrow, examples=200 * FUZZ, steps=50)

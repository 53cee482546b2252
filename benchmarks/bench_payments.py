"""Does an agent pay once? Fault schedules with a hostile facilitator and crashes at every step; caps under 100 payers.

    python benchmarks/bench_payments.py [--quick] [--json]

A schedule is one purchase. It draws what the seller and its facilitator do with each request (settle and be silent,
settle and answer 502, settle and ask again, ask for more, pay elsewhere, keep the authorization and settle it an hour
later, ...), at which call to ledger, chain or network the buyer's process dies, when the chain cannot be asked, how
much time passes, and whether two processes buy at once. After it, the seller is honest, time passes, and the ledger
must say what the chain says. `double_payments`: purchases that moved money twice. `lost_payments`: purchases whose
ledger says something else than the chain, or nothing. `cap_overshoot`: units above a mandate's cap that 100 concurrent
payers in ten processes could reserve, on SQLite and on PostgreSQL (skipped, and said so, where it is not installed).
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import multiprocessing
import platform
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import structlog
from postgres import postgres_server

from tessera.agents import paying
from tessera.agents.intents import Coin, Intent, intent_id
from tessera.agents.ledger import IntentLedger
from tessera.agents.mandates import Mandate, asset_id, sign_mandate
from tessera.agents.paying import Payer, PayerConfig, Purchase
from tessera.agents.settlements import FakeSettlements, Fate
from tessera.core.amount import Amount
from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Refused, TesseraError, Unavailable
from tessera.core.hashing import keccak
from tessera.core.ids import Account, account_from_bytes
from tessera.core.signing import AccountKey

RESULTS = Path(__file__).parent / "results"
CONTRACT = account_from_bytes(b"\x0c" * 20)
ASSET = asset_id(31_337, CONTRACT)
COIN = Coin(ASSET, "Test USD", "2")
KEYS = {name: AccountKey(keccak(name.encode())) for name in ("payer", "agent", "approver", "seller", "attacker")}
SELLER, ATTACKER = KEYS["seller"].account, KEYS["attacker"].account
PRICE = 40
BATCH = 500  # schedules in one ledger
FIGURES = ("schedules", "double_payments", "lost_payments", "cap_overshoot")
HABITS = (
    "honest", "settle_then_silence", "settle_then_502", "settle_then_402", "settle_twice_then_200", "402", "502",
    "silence_before", "200_unsettled", "keep", "other_payee", "other_price", "redirect", "garbage", "other_asset",
)  # fmt: skip


class Killed(BaseException):
    """The process is gone."""


class Death:
    """Kills at the n-th call, before or after it is made."""

    def __init__(self, at: int | None, after: bool) -> None:
        self.at, self.after, self.calls, self.where = at, after, 0, ""
        self._lock = threading.Lock()

    def around(self, name: str, work: Callable[[], Any]) -> Any:
        with self._lock:
            self.calls += 1
            due = self.calls == self.at
        if due and not self.after:
            self.where = f"before {name}"
            raise Killed
        result = work()
        if due:
            self.where = f"after {name}"
            raise Killed
        return result


class MortalLedger:
    """The ledger as a process sees it that may die at any call."""

    def __init__(self, ledger: IntentLedger, death: Death) -> None:
        self._ledger, self._death = ledger, death

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)
        return lambda *args, **kwargs: self._death.around(name, lambda: method(*args, **kwargs))


class FlakyChain:
    """The chain as a payer sees it: sometimes out of reach."""

    def __init__(self, chain: FakeSettlements, death: Death, rng: random.Random, outage: float) -> None:
        self._chain, self._death, self._rng, self._outage = chain, death, rng, outage

    async def head(self) -> int:
        self._check("head")
        return await self._chain.head()

    async def balance(self, asset: str, account: Account) -> Amount:
        self._check("balance")
        return await self._chain.balance(asset, account)

    async def fate(self, asset: str, payer: Account, nonce: bytes, since_block: int) -> Fate:
        self._check("fate")
        return await self._chain.fate(asset, payer, nonce, since_block)

    def _check(self, name: str) -> None:
        self._death.around(name, lambda: None)
        if self._rng.random() < self._outage:
            raise Unavailable("the chain cannot be asked")


class HostileSeller:
    """Does with each request what the schedule says, and settles what it kept whenever it likes."""

    def __init__(self, chain: FakeSettlements, rng: random.Random, habits: list[str]) -> None:
        self.chain, self.rng, self.habits = chain, rng, habits
        self.kept: list[dict[str, str]] = []
        self.served: set[str] = set()
        self.nonces: set[str] = set()

    def answer(self, death: Death, request: httpx.Request) -> httpx.Response:
        return death.around("request", lambda: self._answer(request))

    def settle_kept(self) -> None:
        for payment in self.kept:
            self._settle(payment)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        payment = _read(request)
        habit = self.habits.pop(0) if self.habits else "honest"
        if payment is None:
            return self._unpaid(habit)
        self.nonces.add(payment["nonce"])
        self.kept.append(payment)
        if habit.startswith("settle"):
            self._settle(payment)
        if habit == "settle_twice_then_200":
            self._settle(payment)
            return httpx.Response(200)
        if habit in ("settle_then_silence", "silence_before"):
            raise httpx.ReadTimeout("silence", request=request)
        if habit in ("settle_then_502", "502"):
            return httpx.Response(502)
        if habit in ("settle_then_402", "402"):
            return _offer()
        if habit == "200_unsettled":
            return httpx.Response(200)
        if habit == "keep":
            raise httpx.ConnectError("gone", request=request)
        return self._unpaid(habit) if habit != "honest" else self._honest(payment)

    def _unpaid(self, habit: str) -> httpx.Response:
        if habit == "other_payee":
            return _offer(payTo=ATTACKER)
        if habit == "other_price":
            return _offer(amount=str(PRICE + self.rng.randrange(1, 10**6)))
        if habit == "other_asset":
            return _offer(asset=ATTACKER)
        if habit == "redirect":
            return httpx.Response(self.rng.choice((301, 302, 303, 307, 308)), headers={"location": "https://evil/"})
        if habit == "garbage":
            return httpx.Response(402, headers={"PAYMENT-REQUIRED": self.rng.choice(("", "%%", "e30=", "bnVsbA=="))})
        return httpx.Response(502) if habit == "502" else _offer()

    def _honest(self, payment: dict[str, str]) -> httpx.Response:
        if payment["nonce"] in self.served or self._settle(payment) or self._is_settled(payment):
            self.served.add(payment["nonce"])
            return httpx.Response(200, json={"data": 1})
        return _offer()

    def _settle(self, payment: dict[str, str]) -> bool:
        nonce, before = bytes.fromhex(payment["nonce"][2:]), int(payment["validBefore"])
        units = int(payment["value"])
        return self.chain.settle(Account(payment["from"]), Account(payment["to"]), units, before, nonce) is not None

    def _is_settled(self, payment: dict[str, str]) -> bool:
        return (Account(payment["from"]), bytes.fromhex(payment["nonce"][2:])) in self.chain.used


class Bench:
    """One batch of schedules that share a ledger and a chain."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.ledger = IntentLedger(clock=self.clock)
        self.chain = FakeSettlements(ASSET, {KEYS["agent"].account: 10**9}, int(self.clock.time()))
        self.mandate = make_mandate(per_payment=PRICE, per_period=10**8, payees=(SELLER,))
        self.ledger.open(sign_mandate(self.mandate, KEYS["payer"]))
        self.tally: Counter[str] = Counter()
        self.where: Counter[str] = Counter()

    async def run(self, seed: int) -> None:
        rng = random.Random(seed)
        habits = [rng.choice(HABITS) for _ in range(rng.randrange(1, 9))]
        seller = HostileSeller(self.chain, rng, habits)
        purchase = Purchase(intent_id("bench", seed), self.mandate.id, f"https://seller/{seed}", Amount(PRICE, ASSET))
        paid_before = len(self.chain.payments)
        for _ in range(rng.randrange(1, 6)):
            await self._life(rng, seller, purchase)
            self._pass_time(rng.choice((0, 0, 0, 1, 30, 119, 121, 300)))
            if rng.random() < 0.3:
                seller.settle_kept()
        await self._end(seller, purchase)
        self._judge(purchase, len(self.chain.payments) - paid_before, seller)

    async def _life(self, rng: random.Random, seller: HostileSeller, purchase: Purchase) -> None:
        """One process, or two at once, from start to end or death."""
        at = rng.randrange(1, 16) if rng.random() < 0.6 else None
        death = Death(at, rng.random() < 0.5)
        chain = FlakyChain(self.chain, death, rng, 0.2 if rng.random() < 0.2 else 0.0)
        payer = self._payer(seller, chain, death)
        works = [payer.reconcile] if rng.random() < 0.2 else []
        works += [partial(payer.buy, purchase)] * (2 if rng.random() < 0.1 else 1)
        try:
            async with anyio.create_task_group() as group:
                for work in works:
                    group.start_soon(self._one, work)
        except BaseExceptionGroup as group_error:
            if group_error.split(Killed)[1] is not None:
                raise
            self.tally["crashes"] += 1
            self.where[death.where] += 1
        await payer.aclose()

    async def _one(self, work: Callable[[], Any]) -> None:
        try:
            await work()
            self.tally["answers"] += 1
        except TesseraError as error:
            self.tally[f"error {getattr(error, 'rule', error.code)}"] += 1

    async def _end(self, seller: HostileSeller, purchase: Purchase) -> None:
        """Everybody is honest now, and time passes."""
        seller.habits = []
        payer = self._payer(seller, self.chain, Death(None, False))
        if self.ledger.find(purchase.intent) is not None:
            await self._one(partial(payer.buy, purchase))
        self._pass_time(3_600)
        seller.settle_kept()
        await payer.reconcile()
        await payer.aclose()

    def _judge(self, purchase: Purchase, payments: int, seller: HostileSeller) -> None:
        entry = self.ledger.find(purchase.intent)
        self.tally["double_payments"] += payments > 1
        state = None if entry is None else entry.state
        agrees = state == "consumed" if payments else state in (None, "released")
        self.tally["lost_payments"] += not agrees
        self.tally["more_nonces"] += len(seller.nonces) > 1
        self.tally["paid"] += payments
        self.tally["paid_to_others"] += any(payee != SELLER for _, payee, _ in self.chain.payments[-payments:])

    def _payer(self, seller: HostileSeller, chain: Any, death: Death) -> Payer:
        ledger: Any = MortalLedger(self.ledger, death)
        transport = httpx.MockTransport(partial(seller.answer, death))
        config = PayerConfig(pause_s=0.0, margin_s=60)
        return Payer(ledger, KEYS["agent"], COIN, chain, config=config, clock=self.clock, transport=transport)

    def _pass_time(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.chain.now += seconds


def make_mandate(**changes: Any) -> Mandate:
    limits = {"per_payment": 40, "per_period": 1_000, "approve_above": 10**9}
    fields: dict[str, Any] = {name: Amount(changes.pop(name, units), ASSET) for name, units in limits.items()}
    fields |= {"payer": KEYS["payer"].account, "agent": KEYS["agent"].account, "expires_at": 2**40}
    return Mandate(**(fields | changes))


def _offer(**changes: str) -> httpx.Response:
    terms: dict[str, Any] = {
        "scheme": "exact", "network": "eip155:31337", "asset": CONTRACT, "amount": str(PRICE), "payTo": SELLER,
        "maxTimeoutSeconds": 60, "extra": {"name": "Test USD", "version": "2"},
    }  # fmt: skip
    body = {"x402Version": 2, "resource": {"url": "/"}, "accepts": [terms | changes]}
    return httpx.Response(402, headers={"PAYMENT-REQUIRED": base64.b64encode(json.dumps(body).encode()).decode()})


def _read(request: httpx.Request) -> dict[str, str] | None:
    text = request.headers.get("payment-signature")
    return None if text is None else json.loads(base64.b64decode(text))["payload"]["authorization"]


# --- caps -------------------------------------------------------------------------------------------------------------


def spend_all(url: str, mandate: str, process: int, threads: int, purchases: int) -> None:
    """Payers of one process: each reserves what it can, and ends what it reserved, one way or the other."""
    ledger = IntentLedger(url)

    def payer(thread: int) -> None:
        rng = random.Random(process * 1_000 + thread)
        for number in range(purchases):
            name = intent_id("cap", process, thread, number)
            intent = Intent(name, mandate, SELLER, Amount(rng.randrange(1, 41), ASSET), "x")
            while True:
                try:
                    ledger.reserve(intent)
                    if rng.random() < 0.2:
                        ledger.release(name, "changed my mind", seen=None)
                    elif rng.random() < 0.5:
                        ledger.consume(name)
                    break
                except Refused:
                    break
                except Conflict as error:
                    if "given up" in error.message:
                        break

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(payer, range(threads)))
    ledger.close()


def overshoot(url: str, purchases: int) -> dict[str, Any]:
    """Units above the cap, after 100 payers in ten processes."""
    mandate = make_mandate(per_period=2_000, any_payee=True)
    ledger = IntentLedger(url)
    ledger.open(sign_mandate(mandate, KEYS["payer"]))
    ledger.close()  # nothing is open when this process is forked
    started = time.perf_counter()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=spend_all, args=(url, mandate.id, process, 10, purchases)) for process in range(10)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 10, "a payer failed"
    ledger = IntentLedger(url)
    kept = sum(entry.intent.amount.units for entry in ledger.entries() if entry.state != "released")
    ledger.close()
    assert kept >= 2_000 - 40, f"the cap was not reached: {kept}"
    return {"overshoot": max(0, kept - 2_000), "kept": kept, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    logging.disable()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="600 schedules, fewer purchases")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    schedules, purchases = (600, 3) if arguments.quick else (10_000, 8)
    tally, where = run_schedules(schedules)
    caps: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        caps["sqlite"] = overshoot(f"sqlite:///{folder}/caps.sqlite", purchases)
    with postgres_server() as url:
        if url is not None:
            caps["postgresql"] = overshoot(url, purchases)
    result = {
        "schedules": schedules,
        "double_payments": tally["double_payments"],
        "lost_payments": tally["lost_payments"],
        "cap_overshoot": max(cap["overshoot"] for cap in caps.values()),
        "databases": "+".join(caps),
        "payments": tally["paid"],
        "paid_to_others": tally["paid_to_others"],
        "crashes": tally["crashes"],
        "second_nonces": tally["more_nonces"],
    }
    if not arguments.quick:
        write_results(result, tally, where, caps)
    print(table(result, caps))
    if arguments.json:
        print(json.dumps({name: result[name] for name in FIGURES}))


def run_schedules(count: int) -> tuple[Counter[str], Counter[str]]:
    paying._thread = _at_once  # type: ignore[assignment]  # a database in memory makes nobody wait
    tally: Counter[str] = Counter()
    where: Counter[str] = Counter()

    async def run(bench: Bench, seeds: range) -> None:
        for seed in seeds:
            await bench.run(seed)

    for first in range(0, count, BATCH):
        bench = Bench()
        anyio.run(run, bench, range(first, min(first + BATCH, count)))
        bench.ledger.close()
        tally += bench.tally
        where += bench.where
    return tally, where


async def _at_once(work: Callable[[], Any]) -> Any:
    return work()


def table(result: dict[str, Any], caps: dict[str, Any]) -> str:
    rows = [f"{name:<18}{value}" for name, value in result.items()]
    rows += [f"cap of 2,000 units, 100 payers, {name}: {cap['kept']} reserved in {cap['seconds']} s"
             for name, cap in caps.items()]  # fmt: skip
    return "\n".join(rows)


def write_results(result: dict[str, Any], tally: Counter[str], where: Counter[str], caps: dict[str, Any]) -> None:
    now = datetime.now(UTC)
    (RESULTS / "payments.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    deaths = "\n".join(f"| {name} | {count} |" for name, count in sorted(where.items()))
    answers = "\n".join(f"| {name} | {count} |" for name, count in sorted(tally.items()))
    text = (
        f"# Payments under faults, {now:%d %b %Y}\n\n`python benchmarks/bench_payments.py`, {platform.machine()}, "
        f"Python {platform.python_version()}, two cores.\n\n```\n{table(result, caps)}\n```\n\n"
        f"Where the buyer's process died:\n\n| call | deaths |\n|---|---|\n{deaths}\n\n"
        f"What its lives ended with:\n\n| outcome | count |\n|---|---|\n{answers}\n"
    )
    (RESULTS / f"payments_2core_{now:%Y%m}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The memory of payments in flight, owed and in doubt: of one gateway, of its successor, and of several at once."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Invalid, Unavailable
from tessera.serving.paying.ledger import LEASE_S, MAX_REMEMBERED, REMEMBER_S, PaymentLedger, PaymentName
from tessera.serving.paying.offers import Offer

pytestmark = pytest.mark.anyio
NAME = PaymentName("0xa", "0x1")
MakeLedger = Callable[..., PaymentLedger]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make_ledger(database_url: str, clock: FakeClock) -> Iterator[MakeLedger]:
    """Gateways of one database."""
    opened: list[PaymentLedger] = []

    def make(asset: str = "coin") -> PaymentLedger:
        opened.append(PaymentLedger(clock, max_held_per_payer=2, asset=asset, where=database_url))
        return opened[-1]

    yield make
    for ledger in opened:
        ledger.close()


async def test_the_tables_of_an_earlier_version_are_brought_forward(tmp_path: Path, clock: FakeClock) -> None:
    file = tmp_path / "payments.sqlite"
    with closing(sqlite3.connect(file)) as old, old:
        old.executescript("""
            create table layouts (name varchar primary key, version integer not null);
            insert into layouts values ('payments', 1);
            create table payment_leases (asset varchar, payer varchar, nonce varchar, token varchar not null,
                                         until float not null, primary key (asset, payer, nonce));
            insert into payment_leases values ('coin', '0xa', '0x9', 'a gateway', 9e18);
            create table payment_memories (asset varchar, payer varchar, nonce varchar, state varchar not null,
                                           request blob not null, since float not null,
                                           primary key (asset, payer, nonce));
        """)
    ledger = PaymentLedger(clock, max_held_per_payer=2, asset="coin", where=file)
    lease = await ledger.hold(NAME, 70)
    assert lease.payers_units == 70  # the old lease counts for nothing, and holds its payment
    with pytest.raises(Conflict):
        await ledger.hold(PaymentName("0xa", "0x9"))
    ledger.close()


async def test_a_payer_s_holds_add_up_until_they_end(make_ledger: MakeLedger) -> None:
    first, second = make_ledger(), make_ledger()
    lease = await first.hold(NAME, 70)
    assert (await second.hold(PaymentName("0xa", "0x2"), 30)).payers_units == 100
    await first.release(lease, "forget")
    assert (await first.hold(PaymentName("0xa", "0x3"), 1)).payers_units == 31


async def settle(ledger: PaymentLedger, name: PaymentName, request: bytes, outcome: str = "owed") -> None:
    lease = await ledger.hold(name)
    await ledger.intend(lease, request)
    await ledger.release(lease, outcome, request)  # type: ignore[arg-type]


async def test_a_payment_is_held_once_at_a_time_by_all_gateways_together(make_ledger: MakeLedger) -> None:
    first, second = make_ledger(), make_ledger()
    lease = await first.hold(NAME)
    for ledger in (first, second):
        with pytest.raises(Conflict):
            await ledger.hold(NAME)
    assert (first.held, second.held) == (1, 0)
    await first.release(lease, "keep")
    await second.hold(NAME)
    assert (first.held, second.held) == (0, 1)


async def test_one_payer_holds_a_few_payments_and_others_are_not_hindered(make_ledger: MakeLedger) -> None:
    first, second = make_ledger(), make_ledger()
    lease = await first.hold(PaymentName("0xa", "0x1"))
    await second.hold(PaymentName("0xa", "0x2"))
    for ledger in (first, second):
        with pytest.raises(Unavailable, match="nothing was charged"):
            await ledger.hold(PaymentName("0xa", "0x3"))
    await second.hold(PaymentName("0xb", "0x3"))
    await first.release(lease, "keep")
    await second.hold(PaymentName("0xa", "0x3"))


async def test_the_same_nonce_of_another_coin_is_another_payment(make_ledger: MakeLedger) -> None:
    await settle(make_ledger("gold"), NAME, b"request")
    silver = make_ledger("silver")
    assert await silver.recall(NAME, b"request") is None
    await silver.hold(NAME)


async def test_a_killed_gateways_leases_end_by_themselves_and_what_it_began_stays_in_doubt(
    make_ledger: MakeLedger, clock: FakeClock
) -> None:
    killed = make_ledger()
    lease = await killed.hold(NAME)
    assert await killed.intend(lease, b"request")
    other = make_ledger()
    clock.advance(LEASE_S - 1)
    with pytest.raises(Conflict):
        await other.hold(NAME)
    clock.advance(1)
    taken = await other.hold(NAME)
    assert await other.recall(NAME, b"request") == "doubtful"
    with pytest.raises(Conflict, match="too long"):  # it was only asleep
        await killed.intend(lease, b"request")
    await killed.release(lease, "forget")
    assert await other.recall(NAME, b"request") == "doubtful"
    assert not await other.intend(taken, b"request")


async def test_what_is_owed_is_recalled_for_the_same_request_by_every_gateway_until_forgotten_or_old(
    make_ledger: MakeLedger, clock: FakeClock
) -> None:
    await settle(make_ledger(), NAME, b"request")
    ledger = make_ledger()
    assert await ledger.recall(NAME, b"request") == "owed"
    assert await ledger.recall(NAME, b"another") is None
    clock.advance(REMEMBER_S + 1)
    assert await ledger.recall(NAME, b"request") is None
    await settle(ledger, NAME, b"request", "keep")
    assert await ledger.recall(NAME, b"request") == "doubtful"
    await settle(ledger, NAME, b"request", "forget")
    assert await ledger.recall(NAME, b"request") is None


async def test_memories_are_bounded_and_the_oldest_goes_first(
    make_ledger: MakeLedger, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_REMEMBERED >= 1_000
    monkeypatch.setattr("tessera.serving.paying.ledger.MAX_REMEMBERED", 8)
    ledger = make_ledger()
    for index in range(9):
        await settle(ledger, PaymentName("0xa", str(index)), b"r")
        clock.advance(1)
    assert await ledger.recall(PaymentName("0xa", "0"), b"r") is None
    assert await ledger.recall(PaymentName("0xa", "1"), b"r") == "owed"


@pytest.mark.parametrize("units", [0, -1, 1.5, True])
def test_a_price_is_a_positive_integer(units: int) -> None:
    account = "0x" + "11" * 20
    with pytest.raises(Invalid, match="positive integer"):
        Offer("eip155:1", account, "USD", "1", units, account, 60)  # type: ignore[arg-type]

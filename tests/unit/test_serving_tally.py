"""The workers' part of the income: computed alike by all, signed, posted and claimed; and what voters refuse."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from chain_support import WORKERS
from gate_world import BUYER, TERMS, bought, session, voucher
from serving_peers import peer_key
from split_world import WINDOW_S
from teller_world import CONFIG, PEERS, TellerWorld, signed, teller_world
from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Refused, TesseraError
from tessera.core.ids import Account
from tessera.p2p.calls import call
from tessera.serving.income.book import Served
from tessera.serving.income.tally import Server, Tally, compute_tally
from tessera.serving.income.teller import PROTOCOL

pytestmark = pytest.mark.anyio
A, B, C, D = (worker.account for worker in WORKERS)


@pytest.fixture
async def world() -> AsyncIterator[TellerWorld]:
    async with teller_world() as world:
        await world.s.earn(10_000)  # 3,000 of it for the workers
        yield world


async def balances(world: TellerWorld) -> list[int]:
    """Of the workers, beside what they had."""
    return [await world.s.world.coin.balanceOf(account) for account in (A, B, C, D)]


async def test_workers_are_paid_by_tokens_and_operations(world: TellerWorld) -> None:
    world.serve(1, way=(0, 2))
    world.serve(2, way=(1, 2), tokens=50)
    before = await balances(world)
    await world.everybodys_turn()
    await world.wait()
    await world.everybodys_turn()
    await world.everybodys_turn()
    paid = [now - then for now, then in zip(await balances(world), before, strict=True)]
    # work: 100 · 10, 50 · 10, 150 · 30 of 6,000 in all
    assert paid == [500, 250, 2_250, 0]
    assert await world.s.split.unassigned() == 0


@pytest.mark.slow
async def test_a_session_is_paid_for_once(world: TellerWorld) -> None:
    world.serve(1)
    for _ in range(2):
        await world.everybodys_turn()
        await world.wait()
    assert await world.s.split.tally_count() == 1
    await world.s.earn(10_000)
    for _ in range(2):
        await world.everybodys_turn()
        await world.wait()
    assert await world.s.split.tally_count() == 1  # new income, and nobody has served since
    assert await world.s.split.unassigned() == 3_000


@pytest.mark.slow
async def test_what_nobody_paid_for_earns_nothing(world: TellerWorld) -> None:
    world.serve(1, paid=False)
    await world.everybodys_turn()
    assert await world.s.split.pending() == bytes(32)
    world.serve(2, way=(1, 3))
    await world.everybodys_turn()
    await world.wait()
    await world.everybodys_turn()
    tally = await world.tellers[0]._posted(0)
    assert dict(tally.leaves) == {B: 750, D: 2_250}


async def test_two_of_four_tellers_move_nothing(world: TellerWorld) -> None:
    world.serve(1)
    for number in (2, 3):
        world.transports[number].serve(PROTOCOL, _silent)  # they are there, and answer nothing
    world.tellers[2]._is_my_turn = world.tellers[3]._is_my_turn = lambda: False  # type: ignore[method-assign]
    with pytest.raises(TesseraError):
        await world.tellers[0]._propose(0)
    assert await world.s.split.pending() == bytes(32)


async def _silent(stream: object) -> None:
    await stream.abort()  # type: ignore[attr-defined]


async def vote(world: TellerWorld, body: bytes, **changes: object) -> None:
    """The first worker asks the third to sign a tally of `body`."""
    tally = Tally(0, changes.pop("cut", 1_800_001_000 // 100 * 100 - 100 + 0), ())  # type: ignore[arg-type]
    request = {"op": "vote", "tally": 0, "attempt": 0, "cut": tally.cut, "pool": "3000", "root": "00" * 32} | changes
    await call(
        world.transports[0], world.transports[2].record(), PROTOCOL, request, body, timeout_s=5, reply_limit=4096
    )


def papers(world: TellerWorld, book: int = 0) -> bytes:
    return world.tellers[book]._held(0, 2**40).to_body()


async def test_a_tally_that_leaves_somebody_out_is_not_signed(world: TellerWorld) -> None:
    world.serve(1)
    world.serve(2, way=(1, 2))
    with pytest.raises(Conflict, match="leaves out"):
        await vote(world, papers(world))  # the first worker's own sessions alone


async def test_a_smaller_receipt_than_a_voter_holds_is_not_signed(world: TellerWorld) -> None:
    world.serve(1)
    vouchers, receipts = encoding.decode(papers(world), 1 << 20)
    small = [signed(1, PEERS[0], PEERS[2], 10).to_row(), *(row for row in receipts if row[1] != PEERS[0].id)]
    with pytest.raises(Conflict, match="leaves out 1"):
        await vote(world, encoding.encode([vouchers, small]))


async def test_another_root_than_the_papers_give_is_not_signed(world: TellerWorld) -> None:
    world.serve(1)
    with pytest.raises(Misbehaviour, match="give root"):
        await vote(world, papers(world))


async def test_sessions_that_are_not_paid_are_not_signed(world: TellerWorld) -> None:
    world.serve(1, paid=False)
    with pytest.raises(Conflict, match="not paid for"):
        await vote(world, papers(world))


async def test_forged_and_foreign_papers_are_not_signed(world: TellerWorld) -> None:
    paper = world.serve(1)
    good = signed(1, PEERS[0], PEERS[2], 100)
    for vouchers, receipts, reason in (
        ([replace(paper, tokens=999)], [], "forged"),
        ([voucher(1, 100, by=peer_key(8), purchase=bought(number=1), expires=paper.expires)], [], "does not belong"),
        ([replace(paper, expires=paper.expires + 10**6)], [], "does not belong"),
        ([paper], [replace(good, tokens=999)], "forged"),
        ([paper], [signed(7, PEERS[0], PEERS[2], 100)], "without a voucher"),
    ):
        body = encoding.encode([[v.to_value() for v in vouchers], [r.to_row() for r in receipts]])
        with pytest.raises(Misbehaviour, match=reason):
            await vote(world, body)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tally": 1}, Conflict), ({"attempt": 1}, Conflict), ({"pool": "2999"}, Conflict), ({"cut": 0}, Conflict),
        ({"cut": 1_800_000_150}, Conflict), ({"cut": 1_900_000_000}, Conflict), ({"cut": "x"}, Invalid),
        ({"op": "steal"}, Invalid),
    ],
)  # fmt: skip
async def test_a_request_for_another_tally_is_not_signed(
    world: TellerWorld, change: dict[str, object], error: type[TesseraError]
) -> None:
    world.serve(1)
    request = {"op": "vote", "tally": 0, "attempt": 0, "cut": 1_800_000_900, "pool": "3000", "root": "00" * 32} | change
    with pytest.raises(error):
        await call(
            world.transports[0], world.transports[2].record(), PROTOCOL, request, papers(world),
            timeout_s=5, reply_limit=4096,
        )  # fmt: skip


async def test_strangers_are_told_leaves_and_nothing_else(world: TellerWorld) -> None:
    world.serve(1)
    staff = world.tellers[2]._staff
    world.tellers[2]._staff = replace(staff, records=staff.present()[1:])  # type: ignore[type-var]
    for request in ({"op": "papers", "after": 0, "cut": 2**40}, {"op": "vote"}):
        with pytest.raises(Refused):
            await call(
                world.transports[0], world.transports[2].record(), PROTOCOL, request, timeout_s=5, reply_limit=4096
            )


async def test_a_metered_purchase_counts_when_its_payer_has_settled(world: TellerWorld) -> None:
    paper = world.serve(1, paid=False)
    metered = replace(paper.purchase, facilitator=D).signed_by(BUYER, TERMS)
    other = voucher(2, 100, purchase=metered, expires=paper.expires)
    world.books[0].save(Served(other, 1, 100, 100, 100))
    held = world.tellers[0]._held(0, 2**40)
    assert await world.tellers[0]._paid(held) == set()
    world.purchases.settled[BUYER.account] = 1
    assert await world.tellers[0]._paid(held) == {session(2)}


def test_a_tally_travels_and_comes_back_the_same() -> None:
    tally = Tally(3, 99, tuple(sorted([(A, 5), (B, 7)])))
    assert Tally.from_text(tally.to_text()) == tally
    for text in ("[]", '[3,99,[["0x00","5"]]]', Tally(3, 99, ((A, 0),)).to_text(), "[-1,2,[]]"):
        with pytest.raises(Invalid):
            Tally.from_text(text)


def test_nobody_served_and_nobody_is_paid() -> None:
    servers = {PEERS[0].id: Server(Account(A), 0, 1)}
    assert compute_tally(TERMS, 0, 100, 3_000, [], [], servers, 1).leaves == ()
    assert (CONFIG.period_s, WINDOW_S) == (100, 600)

"""Messages and desks: what arrived while an agent was away is there, once; nothing else is taken."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from chain_support import NOW, key
from commerce_world import BRIEF, Market, close_books, open_market  # noqa: F401
from escrow_world import CLIENT, PROVIDER
from tessera.agents.commerce.desk import MOST_WAITING_OF_ONE, Desk
from tessera.agents.commerce.messages import Message, write_message
from tessera.agents.commerce.street import Street
from tessera.agents.commerce.terms import Phase
from tessera.core.clock import FakeClock
from tessera.core.errors import Invalid, Late, Unavailable

SENDER, READER, OTHER = key("sender"), key("reader"), key("other")


def letter(kind: str = "request", body: dict[str, object] | None = None, **more: int) -> Message:
    return write_message(SENDER, READER.account, kind, body or {"a": 1}, NOW, **more)  # type: ignore[arg-type]


def desk_at(where: Path, clock: FakeClock) -> Desk:
    return Desk(READER.account, where / "desk.sqlite", clock=clock)


def test_a_message_comes_back_as_it_was_written() -> None:
    message = letter()
    assert Message.decode(message.encode()) == message
    message.verify(READER.account, NOW)
    assert letter().id != message.id  # each is its own


@pytest.mark.parametrize(
    "change",
    [{"sender": OTHER.account}, {"recipient": OTHER.account}, {"kind": "accept"}, {"body": b'{"a":2}'},
     {"sent_at": NOW - 1}, {"expires_at": NOW + 86_401}, {"nonce": "00" * 32}, {"kind": "obey"}],
)  # fmt: skip
def test_a_message_that_was_changed_is_nobodys(change: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        dataclasses.replace(letter(), **change).verify(READER.account, NOW)


def test_what_is_for_others_too_old_or_of_the_future_is_refused() -> None:
    message = letter(life_s=60)
    with pytest.raises(Invalid):
        message.verify(OTHER.account, NOW)
    with pytest.raises(Late):
        message.verify(READER.account, NOW + 60)
    with pytest.raises(Invalid):
        message.verify(READER.account, NOW - 3_600)
    for data in (b"", b"[]", b"{}", message.encode()[:-1], message.encode().replace(b'"a', b'"\\u0061')):
        with pytest.raises(Invalid):
            Message.decode(data)


def test_a_message_is_taken_once_and_handled_once_also_after_a_restart(tmp_path: Path) -> None:
    clock, message = FakeClock(NOW), letter()
    desk = desk_at(tmp_path, clock)
    assert [desk.receive(message), desk.receive(message)] == [True, False]
    desk.close()
    desk = desk_at(tmp_path, clock)
    assert desk.waiting("request") == [message]
    assert [desk.handled(message), desk.handled(message)] == [True, False]
    assert desk.receive(message) is False
    assert desk.waiting("request") == []
    desk.close()


def test_an_expired_message_cannot_come_again_when_it_is_forgotten(tmp_path: Path) -> None:
    clock, message = FakeClock(NOW), letter(life_s=60)
    desk = desk_at(tmp_path, clock)
    desk.receive(message)
    desk.handled(message)
    clock.advance(10_000)
    desk.receive(write_message(SENDER, READER.account, "request", {}, clock.time()))  # clears what is old
    with pytest.raises(Late):
        desk.receive(message)
    desk.close()


def test_one_sender_cannot_fill_the_desk(tmp_path: Path) -> None:
    desk = desk_at(tmp_path, FakeClock(NOW))
    for _ in range(MOST_WAITING_OF_ONE):
        desk.receive(letter())
    with pytest.raises(Unavailable):
        desk.receive(letter())
    assert desk.receive(write_message(OTHER, READER.account, "request", {}, NOW))
    desk.close()


@pytest.mark.anyio
async def test_what_is_sent_waits_until_its_recipient_is_there(tmp_path: Path) -> None:
    clock, street = FakeClock(NOW), Street()
    sender = Desk(SENDER.account, tmp_path / "sender.sqlite", clock=clock)
    reader = desk_at(tmp_path, clock)
    message = letter()
    sender.send(message)
    assert await sender.flush(street) == 0
    clock.advance(5)
    street.move_in(reader)
    assert await sender.flush(street) == 1
    assert await sender.flush(street) == 0
    assert reader.waiting("request") == [message]
    sender.send(letter(life_s=10))
    street.away.add(READER.account)
    await sender.flush(street)
    clock.advance(1_000)
    street.away.clear()
    assert await sender.flush(street) == 0  # it has expired
    sender.close()
    reader.close()


@pytest.mark.anyio
async def test_a_seller_who_was_away_gets_the_request_and_is_paid(tmp_path: Path) -> None:
    market = await open_market(tmp_path)
    market.street.away.add(PROVIDER.account)
    order, buyer = market.order(), await market.buyer()
    for _ in range(3):
        assert (await buyer.advance(order)).phase is Phase.REQUEST
        market.clock.advance(20)
    market.street.away.clear()
    market.clock.advance(20)
    done = await market.finish(order)
    assert done.phase is Phase.COMPLETED
    assert order.terms(CLIENT.account).brief == BRIEF.hash

"""Somebody wants another's seat or pay. A seat is bound by the peer's link and by the account's signature."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from tessera.core.errors import Conflict, Invalid, Misbehaviour, TesseraError
from tessera.core.ids import RunId
from tessera.p2p.memory import run_virtual
from tessera.p2p.transport import PeerRecord
from tessera.training.roster import Roster, Seat, seat_binding
from training_run import Hosted, hosted, make_seat
from training_world import account_keys, peer_keys, small_manifest

MANIFEST = small_manifest()
RUN = MANIFEST.run_id
KEYS, ACCOUNTS = peer_keys(5), account_keys(5)
VICTIM, ATTACKER = 1, 3
ORDER_OF_THE_CURVE = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141


def twin(signature: bytes) -> str:
    """The same signature with s in the upper half."""
    s = ORDER_OF_THE_CURVE - int.from_bytes(signature[32:64], "big")
    return (signature[:32] + s.to_bytes(32, "big") + bytes([55 - signature[64]])).hex()


def thefts(world: Hosted, drawn: int) -> dict[str, tuple[dict[str, Any], type[TesseraError]]]:
    """What the attacker's request says otherwise, and how it is refused. He is drawn another stage than the victim."""
    his = world.host.seats[0].to_value()
    peer, account = KEYS[ATTACKER].id, ACCOUNTS[ATTACKER]
    own = seat_binding(RUN, peer, drawn, account)
    other = (drawn + 1) % 4
    return {
        "the victim's whole seat": ({"seat": his}, Misbehaviour),
        "the victim's address": ({"record": his["record"]}, Misbehaviour),
        "the victim's account and binding": ({"account": his["account"], "binding": his["binding"]}, Misbehaviour),
        "the victim's account, own binding": ({"account": his["account"]}, Misbehaviour),
        "a binding for another run": (
            {"binding": seat_binding(RunId("00" * 32), peer, drawn, account).hex()},
            Misbehaviour,
        ),
        "a binding for another stage": ({"binding": seat_binding(RUN, peer, other, account).hex()}, Misbehaviour),
        "another stage than was drawn": (
            {"stage": other, "binding": seat_binding(RUN, peer, other, account).hex()},
            Conflict,
        ),
        "the binding's twin": ({"binding": twin(own)}, Misbehaviour),
        "an empty binding": ({"binding": "00" * 65}, Misbehaviour),
        "a record with a changed address": (
            {"record": world.peers[ATTACKER].record().to_text().replace("memory:node", "memory:evil")},
            Invalid,
        ),
    }


def test_no_theft_takes_or_changes_a_seat(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            await world.join(VICTIM)
            before = world.host.seats
            drawn = await world.bond(ATTACKER)
            for name, (changes, expected) in thefts(world, drawn).items():
                with pytest.raises(expected):
                    await world.join(ATTACKER, **changes)
                assert world.host.seats == before, name
            assert await world.join(ATTACKER) == drawn  # its own, honestly

    run_virtual(main)


def test_one_account_holds_one_seat(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            first, third = await world.join(0), await world.bond(2)
            second = {
                "account": ACCOUNTS[0].account,
                "binding": seat_binding(RUN, KEYS[2].id, third, ACCOUNTS[0]).hex(),
            }
            with pytest.raises(Conflict, match="one account, one seat"):
                await world.join(2, **second)
            moved = {
                "account": ACCOUNTS[2].account,
                "binding": seat_binding(RUN, KEYS[0].id, first, ACCOUNTS[2]).hex(),
            }
            with pytest.raises(Conflict, match="one account, one seat"):
                await world.join(0, **moved)
            assert [seat.account for seat in world.host.seats] == [ACCOUNTS[0].account]

    run_virtual(main)


def test_two_peers_that_ask_at_once_get_two_seats(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            given: dict[int, list[int]] = {peer: [] for peer in range(4)}

            async def ask(peer: int) -> None:
                given[peer].append(await world.join(peer))

            async with anyio.create_task_group() as tasks:
                for peer in range(4):
                    for _ in range(3):
                        tasks.start_soon(ask, peer)
            assert all(len(stages) == 3 and len(set(stages)) == 1 for stages in given.values())
            assert {stages[0] for stages in given.values()} == set(range(4))

    run_virtual(main)


# --- a host that lies about the seats ---------------------------------------------------------------------------------


def seat(stage: int, peer: int, account: int) -> Seat:
    return make_seat(MANIFEST, stage, PeerRecord.sign(KEYS[peer], ("memory:x",), 2_000_000_000), ACCOUNTS[account])


HONEST = Roster(RUN, 4, tuple(seat(i, i, i) for i in range(4)), *[ACCOUNTS[0].account] * 3)


def told(*seats: Seat) -> dict[str, Any]:
    return replace(HONEST, seats=seats).to_value()


def test_a_worker_sees_through_a_roster_with_somebody_elses_account(tmp_path: Path) -> None:
    assert Roster.from_value(RUN, 4, HONEST.to_value()) == HONEST
    first, second, third, fourth = HONEST.seats
    with pytest.raises(Misbehaviour, match=f"names {ACCOUNTS[4].account}, signed by"):
        Roster.from_value(RUN, 4, told(first, replace(second, account=ACCOUNTS[4].account), third, fourth))
    with pytest.raises(Misbehaviour, match="names a peer twice"):
        Roster.from_value(RUN, 4, told(first, second, third, seat(3, 2, 3)))
    with pytest.raises(Misbehaviour, match="signed by"):
        Roster.from_value(RUN, 4, told(first, second, third, replace(fourth, stage=2), seat(3, 4, 4)))
    with pytest.raises(Misbehaviour, match="names an account twice"):
        Roster.from_value(RUN, 4, told(first, second, third, seat(3, 3, 2)))
    with pytest.raises(Misbehaviour, match="does not seat somebody at each of 4 stages"):
        Roster.from_value(RUN, 4, told(first, third, second, fourth))
    with pytest.raises(Misbehaviour):
        Roster.from_value(RunId("00" * 32), 4, HONEST.to_value())


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"seats": []}, {"seats": [None] * 4}, {**HONEST.to_value(), "share": "0x"}, {"seats": "four"},
     {**HONEST.to_value(), "seats": HONEST.to_value()["seats"][:0]}],
)  # fmt: skip
def test_a_roster_that_cannot_be_read_is_refused(value: object) -> None:
    with pytest.raises(Invalid):
        Roster.from_value(RUN, 4, value)

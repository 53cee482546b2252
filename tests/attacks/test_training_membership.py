"""Who wants in, or others out, without the right: no worker signs, and the contract is as it was."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.core.signing import AccountKey, PeerKey
from tessera.p2p.calls import call
from tessera.p2p.memory import MemoryTransport, run_virtual
from tessera.training.attendance import Attendance
from tessera.training.bond import Status
from tessera.training.membership import ABSENT_S, LAST_ABSENT_S, LAST_RECEIPTS, Membership
from tessera.training.proposal import Proposal, propose
from tessera.training.protocols import MEMBERSHIP, SMALL
from tessera.training.receipts import Receipt
from tessera.training.roster import Roster, Seat
from training_run import Settlement, make_seat, settlement
from training_world import account_keys, all_receipts, peer_keys, small_manifest

MANIFEST = small_manifest(steps=3, epoch_steps=3, most_replicas=2)
KEYS, ACCOUNTS = peer_keys(), account_keys()
JOINER, JOINERS_ACCOUNT = PeerKey(b"\x61" * 32), AccountKey(b"\x61" * 32)
OTHER, OTHERS_ACCOUNT = PeerKey(b"\x62" * 32), AccountKey(b"\x62" * 32)


@dataclass
class Fake:
    """A training that is always in step, unless it is told otherwise."""

    ready: bool = True
    steps_done: int = 3
    frozen: int = 0
    thawed: int = 0

    async def may_leave(self) -> bool:
        return self.ready

    async def freeze(self) -> None:
        self.frozen += 1

    def thaw(self) -> None:
        self.thawed += 1


class Seen(Attendance):
    """Sees whom the test says that it sees."""

    def __init__(self) -> None:
        self.gone: dict[PeerId, float] = {}

    def absent_s(self, peer: PeerId) -> float:
        return self.gone.get(peer, 0.0)


@dataclass
class Club:
    """Four workers who sign for others, and whom they have let in."""

    world: Settlement
    roster: Roster
    members: list[Membership] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    trainings: list[Fake] = field(default_factory=list)
    leaving: set[int] = field(default_factory=set)

    async def vote(self, sender: MemoryTransport, body: bytes = b"[]", *, voter: int = 1, **request: Any) -> bytes:
        asked = {"op": "vote", "number": 0, "joiner": None, "leaver": None, **request}
        record = self.world.settlers[voter].transport.record()
        reply, _ = await call(sender, record, MEMBERSHIP, asked, body, timeout_s=5, reply_limit=SMALL)
        return bytes.fromhex(reply["signature"])

    async def admit(self, transport: MemoryTransport, seat: Seat, account: AccountKey) -> None:
        proposal = Proposal(joiner=seat)
        await propose(transport, self.world.ledger.chain, account, MANIFEST, self.roster, proposal)
        self.roster = replace(self.roster.admit(seat), changes=self.roster.changes + 1)

    async def companion(self, transport: MemoryTransport) -> None:
        """A joiner comes to the stage of worker 2."""
        seat = await self.drawn(transport, beside=2)
        await self.admit(transport, seat, JOINERS_ACCOUNT)

    async def drawn(
        self, transport: MemoryTransport, account: AccountKey = JOINERS_ACCOUNT, beside: int | None = None
    ) -> Seat:
        """A joiner's seat, bonded and drawn; at the stage of worker `beside`, who has said that he wants to leave."""
        if beside is not None and (await self.run.members(ACCOUNTS[beside].account)).status == Status.WORKER:
            await self.run.leave(ACCOUNTS[beside])
        stage = await self.world.ledger.bond(self.run, account, transport.id)
        return make_seat(MANIFEST, stage, transport.record(), account)

    @property
    def run(self) -> Any:
        return self.world.run


async def drawn_roster(world: Settlement) -> Roster:
    """The four, each at the stage that the contract has drawn."""
    seats = []
    for settler in world.settlers:
        stage = (await world.run.members(settler.account_key.account)).stage
        seats.append(make_seat(MANIFEST, stage, settler.transport.record(), settler.account_key))
    return replace(world.roster, seats=tuple(sorted(seats, key=lambda seat: seat.stage)))


@asynccontextmanager
async def club(folder: Path) -> AsyncIterator[tuple[Club, MemoryTransport, MemoryTransport]]:
    async with (
        settlement(MANIFEST, folder, held=lambda stage, receipt: False) as world,
        world.network.start(JOINER) as joiner,
        world.network.start(OTHER) as other,
    ):
        found = Club(world, await drawn_roster(world))
        for number, settler in enumerate(world.settlers):
            found.seen.append(Seen())
            found.trainings.append(Fake())
            found.members.append(
                Membership(
                    MANIFEST,
                    transport=settler.transport,
                    chain=world.ledger.chain,
                    account_key=settler.account_key,
                    book=settler.book,
                    training=found.trainings[-1],
                    roster=lambda: found.roster,
                    attendance=found.seen[-1],
                    changed=anyio.lowlevel.checkpoint,
                    leaving=lambda number=number: number in found.leaving,
                )
            )
            found.members[-1].serve()
        yield found, joiner, other


def seat_of(transport: MemoryTransport, stage: int = 0, account: AccountKey = JOINERS_ACCOUNT) -> Seat:
    return make_seat(MANIFEST, stage, transport.record(), account)


def asked(seat: Seat) -> dict[str, Any]:
    return {"joiner": seat.to_value()}


def test_who_was_drawn_a_seat_gets_in_and_signs_from_then_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with club(tmp_path) as (world, joiner, _):
            await world.admit(joiner, await world.drawn(joiner), JOINERS_ACCOUNT)
            assert await world.run.is_worker(JOINERS_ACCOUNT.account)
            assert await world.run.worker_count() == 5

    run_virtual(main)


def test_a_forged_admission_gets_no_signature(tmp_path: Path) -> None:
    async def main() -> None:
        async with club(tmp_path) as (world, joiner, other):
            with pytest.raises(Refused, match="the contract has not drawn stage 0"):
                await world.vote(joiner, **asked(seat_of(joiner)))
            honest = await world.drawn(joiner)
            stolen = seat_of(other, honest.stage, OTHERS_ACCOUNT)
            elsewhere = (honest.stage + 1) % 4
            mine = asked(honest)
            bent: list[tuple[dict[str, Any], type[TesseraError], str]] = [
                (asked(stolen), Refused, "a joiner asks for himself"),
                (asked(seat_of(joiner, elsewhere)), Refused, "has not drawn stage"),
                (asked(seat_of(joiner, honest.stage, OTHERS_ACCOUNT)), Refused, "has not drawn stage"),
                (asked(replace(honest, account=OTHERS_ACCOUNT.account)), Misbehaviour, "signed by"),
                (asked(replace(honest, stage=elsewhere)), Misbehaviour, "signed by"),
                (asked(seat_of(joiner, 4)), Invalid, "stage 4 of 4"),
                ({**mine, "joiner": {}}, Invalid, "a seat has the fields"),
                ({**mine, "leaver": ACCOUNTS[0].account}, Invalid, "a joiner or a leaver"),
                ({"op": "vote", "number": 0}, Invalid, "a joiner or a leaver"),
                ({**mine, "number": "0"}, Invalid, "a change has a number"),
                ({"op": "admit"}, Invalid, "unknown operation"),
            ]
            with pytest.raises(Refused, match="has not drawn stage"):  # his account, from another peer
                await world.vote(other, **asked(seat_of(other, honest.stage)))
            for request, expected, message in bent:
                with pytest.raises(expected, match=message):
                    await world.vote(joiner, **request)
            assert await world.vote(joiner, **mine)

    run_virtual(main)


def test_two_for_one_account_and_one_for_two_seats_get_no_signature(tmp_path: Path) -> None:
    async def main() -> None:
        async with club(tmp_path) as (world, joiner, other):
            await world.admit(joiner, await world.drawn(joiner), JOINERS_ACCOUNT)
            for seat, sender in (
                (seat_of(other, 1), other),  # the joiner's account, with another peer
                (seat_of(joiner, 1, OTHERS_ACCOUNT), joiner),  # the joiner's peer, with another account
                (seat_of(joiner, 1), joiner),
                (seat_of(other, 1, ACCOUNTS[2]), other),  # a worker's account
            ):
                with pytest.raises(Refused, match="one account, one seat, ever"):
                    await world.vote(sender, number=1, **asked(seat))

    run_virtual(main)


def test_a_change_number_serves_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with club(tmp_path) as (world, joiner, other):
            first, second = await world.drawn(joiner), await world.drawn(other, OTHERS_ACCOUNT)
            for number in (1, -1, 2**70):
                with pytest.raises(Conflict, match="is not the next one"):
                    await world.vote(joiner, number=number, **asked(first))
            mine = [await world.vote(joiner, voter=voter, **asked(first)) for voter in range(4)]
            await world.admit(other, second, OTHERS_ACCOUNT)
            ordered = [s for _, s in sorted(zip((int(a.account, 16) for a in ACCOUNTS), mine, strict=True))]
            with pytest.raises(Conflict, match="not the next change"):
                await world.run.change(JOINERS_ACCOUNT, 0, JOINERS_ACCOUNT.account, "0x" + "00" * 20, ordered)
            with pytest.raises(Invalid, match="not a worker's signature"):
                await world.run.change(JOINERS_ACCOUNT, 1, JOINERS_ACCOUNT.account, "0x" + "00" * 20, ordered)
            with pytest.raises(Conflict, match="the workers have changed 1 times, we know of 0"):
                await propose(
                    joiner,
                    world.world.ledger.chain,
                    JOINERS_ACCOUNT,
                    MANIFEST,
                    replace(world.roster, changes=0),
                    Proposal(first),
                )

    run_virtual(main)


def test_nobody_is_driven_out_who_is_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with club(tmp_path) as (world, joiner, other):
            attacker, victim = world.world.settlers[0].transport, ACCOUNTS[2].account
            world.seen[1].gone[KEYS[2].id] = LAST_ABSENT_S - 1  # the only one of his stage: he may take longer
            with pytest.raises(Refused, match="was here 3599 s ago"):
                await world.vote(attacker, leaver=victim)
            world.seen[1].gone[KEYS[2].id] = LAST_ABSENT_S
            assert await world.vote(attacker, leaver=victim)
            world.seen[1].gone.clear()
            await world.companion(joiner)
            with pytest.raises(Refused, match="was here 0 s ago"):
                await world.vote(attacker, number=1, leaver=victim)
            with pytest.raises(Refused, match="only this run's workers"):
                await world.vote(other, number=1, leaver=victim)
            with pytest.raises(Missing):
                await world.vote(attacker, number=1, leaver=OTHERS_ACCOUNT.account)
            world.seen[1].gone[KEYS[2].id] = ABSENT_S - 1
            with pytest.raises(Refused, match="was here 599 s ago"):
                await world.vote(attacker, number=1, leaver=victim)
            world.seen[1].gone[KEYS[2].id] = ABSENT_S
            assert await world.vote(attacker, number=1, leaver=victim)
            world.seen[2].gone[KEYS[2].id] = ABSENT_S  # whatever he thinks of himself
            with pytest.raises(Refused, match="was here"):
                await world.vote(attacker, voter=2, number=1, leaver=victim)

    run_virtual(main)


def test_who_has_not_answered_for_long_is_taken_off_by_those_who_see_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with club(tmp_path) as (world, joiner, _):
            await world.companion(joiner)
            for number in (0, 1):
                world.seen[number].gone[KEYS[2].id] = 10 * ABSENT_S
            with pytest.raises(Unavailable, match="2 of 5 workers signed change 1, more than 2/3 needed"):
                await world.members[0]._dismiss_absent()
            world.seen[3].gone[KEYS[2].id] = 10 * ABSENT_S
            with pytest.raises(Unavailable, match="3 of 5 workers"):
                await world.members[0]._dismiss_absent()
            assert await world.run.is_worker(ACCOUNTS[2].account)

    run_virtual(main)


def test_a_leaver_who_is_alone_stays(tmp_path: Path) -> None:
    """Whatever his own program says."""

    async def main() -> None:
        async with club(tmp_path) as (world, joiner, _):
            with pytest.raises(Unavailable, match="1 of 4 workers signed"):
                await world.members[2]._leave()
            assert (world.trainings[2].frozen, world.trainings[2].thawed) == (1, 1)
            await world.companion(joiner)
            world.trainings[2].ready = False  # another has come, but is not in step
            await world.members[2]._leave()
            assert world.trainings[2].frozen == 1
            world.trainings[2].ready = True
            await world.members[2]._leave()
            assert world.members[2].left.is_set()
            assert (world.trainings[2].frozen, world.trainings[2].thawed) == (2, 1)
            assert not await world.run.is_worker(ACCOUNTS[2].account)

    run_virtual(main)


def test_a_leavers_receipts_are_his_and_real(tmp_path: Path) -> None:
    def body(receipts: list[Receipt]) -> bytes:
        return encoding.encode([receipt.to_row() for receipt in receipts])

    async def main() -> None:
        async with club(tmp_path) as (world, joiner, _):
            leaver = world.world.settlers[2].transport
            at_work = [next(key for key in KEYS if key.id == seat.peer) for seat in world.roster.seats]
            signed = [r for r in all_receipts(MANIFEST, at_work, range(3)) if r.signer == KEYS[2].id]
            forged = replace(signed[0], signature=bytes(64))
            others = [r for r in all_receipts(MANIFEST, at_work, range(1)) if r.signer != KEYS[2].id][:1]
            inflated = replace(signed[0], microbatches=(0, 99)).signed_by(KEYS[2])
            stranger = replace(signed[0], worker=JOINER.id).signed_by(KEYS[2])
            await world.companion(joiner)
            mine = {"number": 1, "leaver": ACCOUNTS[2].account}
            for wrong in ([forged], others, [inflated], [stranger]):
                with pytest.raises(Misbehaviour):
                    await world.vote(leaver, body(wrong), **mine)
            for rubbish in (b"", b"{}", b"[7]", body(signed[:1] * (LAST_RECEIPTS + 1))):
                with pytest.raises(Invalid):
                    await world.vote(leaver, rubbish, **mine)
            assert await world.vote(leaver, body(signed), voter=0, **mine)
            held = world.world.settlers[0].book.of_steps(MANIFEST.run_id, range(3))
            assert set(signed) <= set(held)

    run_virtual(main)

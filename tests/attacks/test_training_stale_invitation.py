"""Invitations that are old, cut, altered, copied, taken back or foreign; and hosts that answer something else."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tessera.chain.faces import ModelShare, Run
from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Refused, Unavailable
from tessera.core.ids import Account, PeerId
from tessera.p2p.calls import serve_calls
from tessera.p2p.memory import MemoryNetwork, MemoryTransport, VirtualClock, run_virtual
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import PeerRecord
from tessera.training.home import Home
from tessera.training.invitation import Invitation
from tessera.training.manifest import Manifest, Settlement
from tessera.training.protocols import JOIN, RUN, SMALL
from tessera.training.roster import Seat
from tessera.training.rpc_link import serve_rpc
from tessera.training.seating import Seated
from tessera.training.terms import terms_of
from tessera.training.worker import Worker
from training_run import HOST_KEY, OPERATOR, Ledger, hosted, invitation_to, make_seat, make_worker
from training_world import account_keys, peer_keys, small_manifest

MANIFEST = small_manifest()


def invitation(clock: FakeClock | VirtualClock, record: PeerRecord | None = None, **changes: Any) -> Invitation:
    record = record or PeerRecord.sign(HOST_KEY, ("memory:nowhere",), clock.time() + 10**6)
    return invitation_to(MANIFEST, record, **{"expires": int(clock.time()) + 1000, **changes})


def test_it_reads_back_also_when_a_mail_program_broke_its_lines() -> None:
    clock = FakeClock()
    shown = invitation(clock, relays=(RelayUrl("http://relay.example:3340", "secret-token"),))
    text = shown.to_text()
    assert Invitation.parse(text, clock) == shown
    assert Invitation.parse("\n ".join(text[i : i + 20] for i in range(0, len(text), 20)), clock) == shown


def test_an_expired_one_says_when_what_the_clock_says_and_what_to_do() -> None:
    clock = FakeClock(1_800_000_000)
    text = invitation(clock).to_text()
    clock.advance(1001)
    with pytest.raises(Invalid, match=r"expired at 2027-01-15 08:16 UTC, and this machine's clock says .* ask whoever"):
        Invitation.parse(text, clock)
    assert Invitation.parse(text, clock, even_expired=True).run_id == MANIFEST.run_id


def test_nothing_in_it_can_be_changed_on_its_way() -> None:
    """It is signed by the host: whatever is read back is what the host wrote."""
    clock = FakeClock()
    text, rng = invitation(clock).to_text(), random.Random(0)
    for _ in range(300):
        place = rng.randrange(len(text))
        changed = text[:place] + rng.choice("ABCabc019-_") + text[place + 1 :]
        for wrong in (changed, text[:place], text[:place] + text[place + 1 :]):
            try:
                read = Invitation.parse(wrong, clock)
            except Invalid:
                continue
            assert read == invitation(clock)


@pytest.mark.parametrize(
    "changes",
    [
        {"seats": 10},
        {"expires": 9_999_999_998},
        {"chain_id": 1},
        {"relays": (RelayUrl("http://evil.example", ""),)},
        {"id": "cd" * 16},
    ],
)
def test_what_somebody_bent_on_the_way_is_refused(changes: dict[str, Any]) -> None:
    honest = invitation(FakeClock())
    bent = replace(honest, **changes)
    with pytest.raises(Invalid, match="damaged"):
        Invitation.parse(bent.to_text(), FakeClock())


@pytest.mark.parametrize("text", ["tessera1", "petals1abc", "tessera1" + "A" * 20_000, "", "tessera1" + "e30"])
def test_what_is_no_invitation_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        Invitation.parse(text, FakeClock())


@pytest.mark.parametrize(
    "changes", [{"seats": 0}, {"seats": 10**6}, {"expires": -1}, {"chain_id": 0}, {"id": "x"}, {"peers": ()}]
)
def test_values_out_of_range_are_refused_even_when_signed(changes: dict[str, Any]) -> None:
    with pytest.raises((Invalid, IndexError)):
        Invitation.parse(invitation(FakeClock(), **changes).to_text(), FakeClock())


# --- the host's side --------------------------------------------------------------------------------------------------


def test_an_unknown_revoked_expired_or_used_up_one_opens_no_seat(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            book = world.book
            book.save_invitation("11" * 16, 1, 10**10)
            book.save_invitation("22" * 16, 1, 5)
            book.save_invitation("33" * 16, 4, 10**10)
            book.revoke_invitation("33" * 16)
            with pytest.raises(Refused, match="gave no such invitation"):
                await world.join(0, invitation="ff" * 16)
            with pytest.raises(Refused, match="has expired"):
                await world.join(0, invitation="22" * 16)
            with pytest.raises(Refused, match="was taken back"):
                await world.join(0, invitation="33" * 16)
            assert world.host.seats == []
            take = world.request(0, await world.bond(0, invitation="11" * 16))
            await world.ask(0, JOIN, {**take, "invitation": "11" * 16})
            with pytest.raises(Refused, match="somebody copied it"):
                await world.join(1, invitation="11" * 16)
            for shown in ("11" * 16, "33" * 16, "ff" * 16):  # a seat stays its peer's
                assert (await world.ask(0, JOIN, {**take, "invitation": shown}))[0] == {"admitted": True}
            book.revoke_invitation("11" * 16)
            assert (await world.ask(0, JOIN, {**take, "invitation": "11" * 16}))[0] == {"admitted": True}

    run_virtual(main)


def test_looking_takes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            world.book.save_invitation("11" * 16, 1, 10**10)
            for peer in (0, 1):
                reply, body = await world.ask(peer, JOIN, world.request(peer, op="look", invitation="11" * 16))
                assert (reply["stages"], reply["returning"], body) == ([0, 1, 2, 3], False, MANIFEST.canonical)
            assert world.host.seats == []
            assert world.book.invitation("11" * 16).users == ()

    run_virtual(main)


# --- joining ----------------------------------------------------------------------------------------------------------

Answer = tuple[dict[str, Any], bytes]
Handler = Callable[[PeerId, dict[str, Any], bytes], Answer]


@asynccontextmanager
async def joining(
    folder: Path, join: Handler, run: Handler = lambda peer, request, body: ({}, b""), **changes: Any
) -> AsyncIterator[tuple[Worker, MemoryTransport]]:
    """A worker with an invitation to a host that answers as the test says, and that host's transport."""
    clock = VirtualClock()
    network = MemoryNetwork(random.Random(0), clock=clock)
    home = Home(folder / "worker")
    async with network.start(HOST_KEY) as host, network.start(home.peer_key) as transport:
        for protocol, handler in ((JOIN, join), (RUN, run)):

            async def answer(peer: PeerId, request: dict[str, Any], body: bytes, handler: Handler = handler) -> Answer:
                return handler(peer, request, body)

            serve_calls(host, protocol, answer, request_limit=SMALL)

        async def serve(seated: Seated) -> None:
            pytest.fail("it trained")

        shown = invitation(clock, host.record(), **changes)
        yield make_worker(home, shown, transport, clock, serve, patience_s=20), host


def fails_with(folder: Path, expected: type[Exception], match: str, *args: Any, **changes: Any) -> None:
    async def main() -> None:
        async with joining(folder, *args, **changes) as (worker, _):
            with pytest.raises(expected, match=match):
                await worker.run()

    run_virtual(main)


NOWHERE = account_keys()[0].account


def seat_of(manifest: Manifest, stages: Any = (0, 1), run: str = NOWHERE, coin: str = NOWHERE, **taken: Any) -> Handler:
    """A host that offers `stages` in the contract `run`, says that the first is drawn, and gives it."""
    offer = {
        "stages": stages, "run": run, "coin": coin, "returning": False, "phase": "seating", "step": 0,
        "tokens_per_s": 0.0, "members": [],
    }  # fmt: skip
    given = {"admitted": True, **taken}

    def join(peer: PeerId, request: dict[str, Any], body: bytes) -> Answer:
        now = int(VirtualClock().time())
        answers = {"look": {**offer, "now": now}, "bond": {"stage": taken.get("stage", 0)}, "take": given}
        return answers[request["op"]], manifest.canonical

    return join


def test_the_host_of_another_run_refuses_and_the_worker_says_so(tmp_path: Path) -> None:
    def refuse(peer: PeerId, request: dict[str, Any], body: bytes) -> Answer:
        raise Conflict("the invitation is for another run, ask for a new one")

    fails_with(tmp_path, Conflict, "for another run", refuse)


def test_a_host_cannot_show_another_manifest_for_the_run_id(tmp_path: Path) -> None:
    fails_with(tmp_path, Misbehaviour, "the manifest hashes to", seat_of(small_manifest(steps=7)))


def test_a_manifest_for_another_chain_than_the_invitations_is_refused(tmp_path: Path) -> None:
    fails_with(tmp_path, Misbehaviour, "for chain 31337, the invitation for 1", seat_of(MANIFEST), chain_id=1)


@pytest.mark.parametrize("stages", [[4], [-1], ["0"], None, [0.5], []])
def test_a_seat_that_does_not_exist_is_refused(stages: object, tmp_path: Path) -> None:
    fails_with(
        tmp_path, Misbehaviour, "the host's offer cannot be read|the host offers stage", seat_of(MANIFEST, stages)
    )


def test_a_host_that_is_gone_is_looked_for_and_then_named(tmp_path: Path) -> None:
    async def main() -> None:
        clock = VirtualClock()
        network = MemoryNetwork(random.Random(0), clock=clock)
        home, started = Home(tmp_path / "worker"), clock.time()
        async with network.start(home.peer_key) as transport:

            async def serve(seated: Seated) -> None:
                pytest.fail("it trained")

            worker = make_worker(home, invitation(clock), transport, clock, serve, patience_s=20)
            with pytest.raises(Unavailable, match=r"nobody answers for run .* at memory:nowhere: is it still running"):
                await worker.run()
        assert 20 <= clock.time() - started < 40

    run_virtual(main)


def test_nothing_is_bonded_in_a_contract_that_is_not_this_runs(tmp_path: Path) -> None:
    """The host names a run contract for another run, on other terms, in another coin, or some other code."""

    async def main() -> None:
        ledger, staked = Ledger(MANIFEST), small_manifest(settlement=Settlement(stake_units=5))
        coin, other_coin, run_id = await ledger.coin(), await ledger.coin(), bytes.fromhex(MANIFEST.run_id)
        home, terms = Home(tmp_path / "worker"), terms_of(MANIFEST)

        async def deployed(coin: Account, run_id: bytes, terms: Run.Term) -> str:
            return (await Run.deploy(ledger.chain, OPERATOR, coin, run_id, terms)).address

        longer = terms._replace(delay_s=terms.delay_s + 1)
        contracts = {
            "is for run": await deployed(coin, bytes.fromhex(staked.run_id), terms),
            "says delay_s 86401, the manifest 86400": await deployed(coin, run_id, longer),
            "says stake 5, the manifest 0": await deployed(coin, run_id, terms_of(staked)),
            "says most 7, the manifest 8": await deployed(coin, run_id, terms._replace(most=7)),
            "takes": await deployed(other_coin, run_id, terms),
            "are not contracts/run.vy's": coin,
            "holds 0 bytes": home.account_key.account,
        }
        for message, run in contracts.items():
            asked: list[str] = []

            def join(peer: PeerId, request: dict[str, Any], body: bytes, run: str = run, asked: Any = asked) -> Answer:
                asked.append(request["op"])
                return seat_of(MANIFEST, run=run, coin=coin)(peer, request, body)

            async with joining(tmp_path, join) as (worker, host):
                serve_rpc(host, ledger.exchange)
                with pytest.raises(Misbehaviour, match=message):
                    await worker.run()
            assert asked == ["look"]

    run_virtual(main)


def test_a_stage_that_the_contract_has_not_drawn_is_not_believed(tmp_path: Path) -> None:
    async def main() -> None:
        ledger = Ledger(MANIFEST)
        coin, home = await ledger.coin(), Home(tmp_path / "worker")
        run = await ledger.deploy_run(coin)
        drawn = await ledger.bond(run, home.account_key, home.peer_key.id)
        for stage in ((drawn + 1) % 4, None, "0"):
            async with joining(tmp_path, seat_of(MANIFEST, run=run.address, coin=coin, stage=stage)) as (worker, host):
                serve_rpc(host, ledger.exchange)
                with pytest.raises(Misbehaviour, match="the host gives stage"):
                    await worker.run()
        second = await ledger.deploy_run(coin)
        async with joining(tmp_path, seat_of(MANIFEST, run=second.address, coin=coin)) as (worker, host):
            serve_rpc(host, ledger.exchange)
            with pytest.raises(Misbehaviour, match="do not follow it"):
                await worker.run()

    run_virtual(main)


def test_a_share_that_is_not_this_runs_is_not_worked_for(tmp_path: Path) -> None:
    """The host names a share contract of another run, or that another contract issues, or other workers."""

    async def main() -> None:
        ledger = Ledger(MANIFEST)
        keys, others, home = peer_keys(), account_keys(), Home(tmp_path / "worker")
        mine, run_id = home.account_key, bytes.fromhex(MANIFEST.run_id)
        run, share = await ledger.begin([(mine, home.peer_key.id), *((others[i], keys[i].id) for i in range(1, 4))])
        coin, drawn = await run.asset(), (await run.members(mine.account)).stage
        stages = [stage for stage in range(4) if stage != drawn]
        mates = [
            make_seat(MANIFEST, stages[i - 1], PeerRecord.sign(keys[i], ("memory:x",), 2e9), others[i])
            for i in range(1, 4)
        ]
        stranger = make_seat(MANIFEST, stages[2], PeerRecord.sign(peer_keys(5)[4], ("memory:x",), 2e9), others[0])

        async def issued(run_id: bytes, issuer: Account) -> Account:
            share = await ModelShare.deploy(ledger.chain, OPERATOR, "small", "TSRA", coin, run_id, issuer)
            return share.address

        cases = {
            "is for run": (await issued(bytes(32), run.address), mates),
            "is issued by": (await issued(run_id, coin), mates),
            "and the run contract issues": (await issued(run_id, run.address), mates),
            "are not contracts/model_share.vy's": (coin, mates),
            "names other workers": (share.address, [*mates[:2], stranger]),
        }
        for message, (named, rest) in cases.items():

            def roster(
                peer: PeerId, request: dict[str, Any], body: bytes, named: str = named, rest: list[Seat] = rest
            ) -> Answer:
                own = make_seat(MANIFEST, drawn, PeerRecord.sign(home.peer_key, ("memory:x",), 2e9), mine)
                rows = [seat.to_value() for seat in sorted((own, *rest), key=lambda seat: seat.stage)]
                contracts = {"run": run.address, "share": named, "coin": coin}
                return {"ready": True, "seats": rows, **contracts, "past": [], "changes": 0}, b""

            host_says = seat_of(MANIFEST, run=run.address, coin=coin, stage=drawn)
            async with joining(tmp_path, host_says, roster) as (worker, host):
                serve_rpc(host, ledger.exchange)
                with pytest.raises(Misbehaviour, match=message):
                    await worker.run()

    run_virtual(main)


def test_an_honest_answer_is_not_a_stale_one(tmp_path: Path) -> None:
    """The other side of these tests: the same door lets an honest host through to the next question."""
    asked: list[str] = []

    def rosters(peer: PeerId, request: dict[str, Any], body: bytes) -> Answer:
        asked.append(request["op"])
        raise Conflict("far enough")

    async def main() -> None:
        ledger, home = Ledger(MANIFEST), Home(tmp_path / "worker")
        coin = await ledger.coin()
        run = await ledger.deploy_run(coin)
        drawn = await ledger.bond(run, home.account_key, home.peer_key.id)
        host_says = seat_of(MANIFEST, run=run.address, coin=coin, stage=drawn)
        async with joining(tmp_path, host_says, rosters) as (worker, host):
            serve_rpc(host, ledger.exchange)
            with pytest.raises(Conflict, match="far enough"):
                await worker.run()

    run_virtual(main)
    assert asked == ["roster"]

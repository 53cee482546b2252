"""Holders that lie, stall, pretend or put their pieces together: a stage comes back, or somebody is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from snapshot_world import Node, World, ask, put_all, state_of, world
from tessera.core.errors import Invalid, Misbehaviour, Missing, Refused
from tessera.core.ids import PeerId
from tessera.p2p.calls import serve_calls
from tessera.p2p.memory import run_virtual
from tessera.training.protocols import SNAPSHOT
from tessera.training.snapshot_code import open_snapshot
from tessera.training.snapshot_header import Moment, SnapshotHeader
from tessera.training.snapshots import CHUNK_BYTES, Snapshots

Reply = tuple[dict[str, Any], bytes]
Twist = Callable[[dict[str, Any], dict[str, Any], bytes], Reply]


def lies(node: Node, twist: Twist) -> None:
    """From now on `node` answers with what `twist(request, reply, body)` makes of the honest reply."""
    honest: Snapshots = node.snapshots

    async def answer(peer: PeerId, request: dict[str, Any], body: bytes) -> Reply:
        return twist(request, *await honest._answer(peer, request, body))

    serve_calls(node.transport, SNAPSHOT, answer, request_limit=2 * CHUNK_BYTES)


async def orphaned(run: World, stage: int = 0) -> tuple[Node, list[Node]]:
    """The worker of `stage` is gone; his successor, and who holds pieces of step 40."""
    await run.train(40)
    holders = [node for node in run.nodes if node.stage != stage]
    await run.lose(run.at(stage)[0])
    return await run.add(stage, 99), holders


def flipped(request: dict[str, Any], reply: dict[str, Any], body: bytes) -> Reply:
    return reply, body[:-1] + bytes([body[-1] ^ 1]) if request["op"] == "get" else body


def other_share(request: dict[str, Any], reply: dict[str, Any], body: bytes) -> Reply:
    return {**reply, "share": "academic acid"} if request["op"] == "get" else reply, body


def no_share(request: dict[str, Any], reply: dict[str, Any], body: bytes) -> Reply:
    return {} if request["op"] == "get" else reply, body


def too_long(request: dict[str, Any], reply: dict[str, Any], body: bytes) -> Reply:
    return reply, body * 2


def nothing(request: dict[str, Any], reply: dict[str, Any], body: bytes) -> Reply:
    return reply, b""


@pytest.mark.parametrize("twist", [flipped, other_share, no_share, too_long, nothing])
def test_a_holder_that_serves_something_else_is_named_and_replaced(twist: Twist, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, stages=5) as run:
            newcomer, holders = await orphaned(run)
            liar = holders[0]
            lies(liar, twist)
            restored = await run.restore(newcomer, 0)
            assert restored.state == state_of(0, 1, 40)
            assert set(restored.wrong) <= {liar.transport.id}
            await run.lose(holders[1])  # three are needed and left, the liar among them
            with pytest.raises(Misbehaviour) as caught:
                await run.restore(newcomer, 0)
            assert caught.value.evidence["peers"] == [liar.transport.id]
            assert (caught.value.fields["have"], caught.value.fields["needed"]) == (2, 3)
            await run.lose(holders[2])  # now two offer anything: nobody is to blame for that
            with pytest.raises(Missing):
                await run.restore(newcomer, 0)

    run_virtual(main)


def made_up(request: dict[str, Any], reply: dict[str, Any], body: bytes) -> Reply:
    """The old snapshot, called newer than any."""
    if request["op"] == "list":
        reply = {"headers": [{**header, "step": header["step"] + 1000} for header in reply["headers"]]}
    return reply, body


def too_many(request: dict[str, Any], reply: dict[str, Any], body: bytes) -> Reply:
    return {"headers": reply["headers"] * 9} if request["op"] == "list" else reply, body


def no_list(request: dict[str, Any], reply: dict[str, Any], body: bytes) -> Reply:
    return {"headers": 7} if request["op"] == "list" else reply, body


@pytest.mark.parametrize("twist", [made_up, too_many, no_list])
def test_a_holder_cannot_make_headers_up(twist: Twist, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            newcomer, holders = await orphaned(run)
            lies(holders[1], twist)
            restored = await run.restore(newcomer, 0)
            assert (restored.step, restored.state) == (40, state_of(0, 1, 40))
            assert list(restored.wrong) == [holders[1].transport.id]

    run_virtual(main)


def test_an_old_snapshot_is_not_taken_for_the_newest(tmp_path: Path) -> None:
    """One holder kept step 20 and denies step 40: true headers, told apart by the step that the maker signed."""

    async def main() -> None:
        async with world(tmp_path) as run:
            newcomer, holders = await orphaned(run)

            def stale(request: dict[str, Any], reply: dict[str, Any], body: bytes) -> Reply:
                return {"headers": reply["headers"][1:]} if request["op"] == "list" else reply, body

            lies(holders[0], stale)
            assert (await run.restore(newcomer, 0)).step == 40
            lies(holders[1], stale)  # two of three: what one alone has cannot be opened, by nobody
            restored = await run.restore(newcomer, 0)
            assert (restored.step, restored.state) == (20, state_of(0, 1, 20))
            with pytest.raises(Missing):  # who knows that there must be a newer one says so
                await run.restore(newcomer, 0, 40)

    run_virtual(main)


def test_a_holder_shows_only_pieces_of_his_own(tmp_path: Path) -> None:
    """A header in which he has no part, of another stage, of another run, or by one who never held the stage."""

    async def main() -> None:
        async with world(tmp_path) as run:
            dead = run.at(0)[0]
            newcomer, holders = await orphaned(run)
            liar, stranger = holders[0], holders[1]
            others = [node.transport.id for node in holders]
            shown: list[SnapshotHeader] = [
                run.sealed(dead, Moment(1, 60), holders=others[1:]).header,
                run.sealed(dead, Moment(1, 60), stage=3, holders=others).header,
                run.sealed(dead, Moment(1, 60), run_id="cd" * 32, holders=others).header,
                run.sealed(stranger, Moment(1, 60), stage=0, holders=[liar.transport.id, newcomer.transport.id]).header,
            ]
            for header in shown:

                def twist(request: dict[str, Any], reply: dict[str, Any], body: bytes) -> Reply:
                    return {"headers": [header.to_value()]} if request["op"] == "list" else reply, body  # noqa: B023

                lies(liar, twist)
                restored = await run.restore(newcomer, 0, made_by=lambda peer, stage: peer == dead.transport.id)
                assert restored.state == state_of(0, 1, 40)
                assert list(restored.wrong) == [liar.transport.id]

    run_virtual(main)


def test_a_holder_that_never_ends_does_not_hold_the_others_up(tmp_path: Path) -> None:
    """Each call may take 40 s; whoever is done takes the next holder instead of waiting for the slow one."""

    async def main() -> None:
        async with world(tmp_path) as run:
            newcomer, holders = await orphaned(run)
            honest = holders[0].snapshots

            async def stall(peer: PeerId, request: dict[str, Any], body: bytes) -> Reply:
                if request["op"] == "get":
                    await anyio.sleep(39)
                return await honest._answer(peer, request, body)

            serve_calls(holders[0].transport, SNAPSHOT, stall)
            began = anyio.current_time()
            assert (await run.restore(newcomer, 0)).state == state_of(0, 1, 40)
            assert anyio.current_time() - began < 2

    run_virtual(main)


def test_an_outsider_is_given_nothing(tmp_path: Path) -> None:
    """Neither a stranger, nor a worker of another stage, nor one who was replaced."""

    async def main() -> None:
        async with world(tmp_path) as run:
            await run.train(40)
            holder, worker = run.at(1)[0], run.at(2)[0]
            digest = holder.snapshots._shelf.headers(0)[0].digest
            dismissed = run.at(0)[0]
            run.nodes.remove(dismissed)
            stranger = await run.add(5, 77)
            for outsider in (stranger, worker, dismissed):
                for request in ({"op": "list", "stage": 0}, {"op": "get", "snapshot": digest, "offset": 0}):
                    with pytest.raises(Refused) as caught:
                        await ask(outsider.transport, holder, **request)
                    assert caught.value.rule == "own_stage"
            for stage in (None, "0", True, -1, 2**70):
                with pytest.raises(Refused):
                    await ask(worker.transport, holder, op="list", stage=stage)

    run_virtual(main)


def test_fewer_than_k_colluders_read_nothing_and_k_read_all(tmp_path: Path) -> None:
    """With their disks side by side: three of five open a snapshot, two do not, however they share their pieces."""

    async def main() -> None:
        async with world(tmp_path, stages=6) as run:
            await run.train(20)
            state = state_of(0, 1, 20)
            holders = [node for node in run.nodes if node.stage != 0]

            def stolen(colluders: Sequence[Node]) -> tuple[SnapshotHeader, dict[int, bytes], dict[int, str]]:
                shelves = [node.snapshots._shelf for node in colluders]
                (header,) = shelves[0].headers(0)
                pieces = [shelf.read(header.digest, 0, CHUNK_BYTES) for shelf in shelves]
                numbers = [header.number_of(node.transport.id) for node in colluders]
                fragments = {n: data for n, (_, data) in zip(numbers, pieces, strict=True)}
                return header, fragments, {n: share for n, (share, _) in zip(numbers, pieces, strict=True)}

            for pair in (holders[:2], holders[1:3], holders[3:]):
                header, fragments, shares = stolen(pair)
                for piece in fragments.values():
                    assert not any(state[i : i + 8] in piece for i in range(0, len(state), 8))
                with pytest.raises(Missing):
                    open_snapshot(header, fragments, shares)
                (number, *_) = [n for n in range(header.count) if n not in shares]
                forged = {**shares, number: next(iter(shares.values()))}
                with pytest.raises(Misbehaviour):
                    open_snapshot(header, fragments, forged)
            assert open_snapshot(*stolen(holders[:3])).state == state

    run_virtual(main)


def test_a_maker_who_signs_something_false_is_named_and_the_one_before_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            await run.train(20)
            maker, *holders = run.nodes
            true = run.sealed(maker, Moment(1, 40))
            false = replace(true.header, state="00" * 32).signed_by(maker.key)
            run.moment = Moment(1, 40)
            await put_all(maker, replace(true, header=false), holders)
            await run.lose(maker)
            newcomer = await run.add(0, 99)
            restored = await run.restore(newcomer, 0)
            assert (restored.step, restored.state) == (20, state_of(0, 1, 20))
            with pytest.raises(Misbehaviour) as caught:
                await run.restore(newcomer, 0, 40)
            assert caught.value.evidence["peers"] == [maker.transport.id]
            with pytest.raises(Misbehaviour, match="at most"):
                await run.restore(newcomer, 0, 20, size_limit=2_999)

    run_virtual(main)


def test_rubbish_is_refused_and_the_holder_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            newcomer, holders = await orphaned(run)
            holder = holders[0]
            digest = holder.snapshots._shelf.headers(0)[0].digest
            rubbish: list[dict[str, Any]] = [
                {},
                {"op": 1},
                {"op": "put"},
                {"op": "put", "header": [], "share": ""},
                {"op": "put", "header": {"run_id": 1}, "share": 5},
                {"op": "chunk"},
                {"op": "chunk", "snapshot": "../../../etc/passwd", "offset": 0},
                {"op": "chunk", "snapshot": digest, "offset": "0"},
                {"op": "get", "snapshot": digest, "offset": -1},
                {"op": "get", "snapshot": digest, "offset": 2**70},
                {"op": "get", "snapshot": 5, "offset": 0},
                {"op": "get", "snapshot": "../" + digest, "offset": 0},
            ]
            for request in rubbish:
                with pytest.raises((Invalid, Missing)):
                    await ask(newcomer.transport, holder, **request)
            with pytest.raises(Invalid):
                await ask(newcomer.transport, holder, bytes(2 * CHUNK_BYTES), op="chunk", snapshot=digest, offset=0)
            assert (await run.restore(newcomer, 0)).state == state_of(0, 1, 40)

    run_virtual(main)

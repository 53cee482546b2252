"""What somebody may try with a holder's disk: another's turn, another run, absurd sizes, old news, half a fragment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from snapshot_world import CONFIG, Node, World, ask, put, put_all, state_of, world
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused, Unavailable
from tessera.core.ids import PeerId
from tessera.p2p.calls import serve_calls
from tessera.p2p.memory import run_virtual
from tessera.training.protocols import SNAPSHOT
from tessera.training.snapshot_code import Sealed
from tessera.training.snapshot_header import SEGMENT, Moment
from tessera.training.snapshots import CHUNK_BYTES


@dataclass
class Scene:
    """Four stages at step 100; the worker of stage 0 is the maker, that of stage 1 the holder."""

    run: World
    maker: Node
    holder: Node

    def sealed(self, step: int, session: int = 1, **changed: Any) -> Sealed:
        return self.run.sealed(self.maker, Moment(session, step), **changed)

    async def begin(self, sealed: Sealed, sender: Node | None = None, **changed: Any) -> dict[str, Any]:
        number = sealed.header.number_of(self.holder.transport.id)
        request = {"op": "put", "header": sealed.header.to_value(), "share": sealed.shares[number], **changed}
        reply, _ = await ask((sender or self.maker).transport, self.holder, **request)
        return reply

    def steps(self, stage: int = 0) -> list[int]:
        return [header.step for header in self.holder.snapshots._shelf.headers(stage)]

    def files(self) -> list[tuple[str, int]]:
        folder = self.holder.folder / "snapshots"
        return sorted((file.suffix, file.stat().st_size) for file in folder.iterdir() if file.suffix != ".head")


@asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[Scene]:
    async with world(folder) as run:
        run.moment = Moment(1, 100)
        yield Scene(run, run.at(0)[0], run.at(1)[0])


def test_an_honest_piece_is_taken_once_and_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            sealed = s.sealed(20)
            fragment = sealed.fragments[sealed.header.number_of(s.holder.transport.id)]
            assert await put(s.maker, sealed, s.holder) == {"have": len(fragment), "whole": True}
            assert await s.begin(sealed) == {"have": len(fragment), "whole": True}
            assert s.files() == [(".data", len(fragment))]
            assert 20 in s.holder.snapshots.steps_kept()

    run_virtual(main)


def test_a_snapshot_of_another_run_stage_turn_or_interval_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            others = [node for node in s.run.nodes if node is not s.holder]
            peers = [node.transport.id for node in s.run.nodes if node is not s.maker]
            refused: list[tuple[str, Sealed, Node]] = [
                ("run", s.sealed(20, run_id="cd" * 32), s.maker),
                ("other_stage", s.sealed(20, stage=1), s.maker),
                ("other_stage", s.sealed(20, stage=4), s.maker),
                ("maker", s.sealed(20, stage=2), s.maker),
                ("maker", s.sealed(20), others[1]),  # the maker's own header, in another's hand
                ("interval", s.sealed(21), s.maker),
            ]
            for rule, sealed, sender in refused:
                with pytest.raises(Refused) as caught:
                    await s.begin(sealed, sender)
                assert caught.value.rule == rule
            elsewhere = s.sealed(20, holders=[peer for peer in peers if peer != s.holder.transport.id])
            request = {"op": "put", "header": elsewhere.header.to_value(), "share": elsewhere.shares[0]}
            with pytest.raises(Invalid):
                await ask(s.maker.transport, s.holder, **request)
            assert s.files() == []

    run_virtual(main)


def test_with_replicas_only_whose_turn_it_is_may_put(tmp_path: Path) -> None:
    """Each has every other turn, so that a bad one cannot fill both places."""

    async def main() -> None:
        async with world(tmp_path, replicas=2) as run:
            run.moment = Moment(1, 100)
            holder = run.at(1)[0]
            taken: dict[int, PeerId] = {}
            for step in (20, 40, 60, 80):
                for maker in run.at(0):
                    sealed = run.sealed(
                        maker, Moment(1, step), holders=[node.record.id for node in run.at(1)], needed=2
                    )
                    with suppress(Refused):
                        await put_all(maker, sealed, [holder])
                        assert step not in taken
                        taken[step] = maker.transport.id
                turn, other = sorted(run.at(0), key=lambda node: node.transport.id != taken[step])
                foreign = run.sealed(other, Moment(1, step), holders=[node.record.id for node in run.at(1)], needed=2)
                with pytest.raises(Refused):  # nor may he hand on what another has made
                    await put_all(turn, foreign, [holder])
            assert len(taken) == 4
            assert taken[20] == taken[60] != taken[40] == taken[80]

    run_virtual(main)


def test_another_share_than_the_signed_one_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            sealed = s.sealed(20)
            with pytest.raises(Misbehaviour):
                await s.begin(sealed, share="academic acid")
            for share in (None, 5, "x" * 513):
                with pytest.raises(Invalid):
                    await s.begin(sealed, share=share)

    run_virtual(main)


def test_a_huge_size_is_refused_before_a_byte_of_it(tmp_path: Path) -> None:
    """Each stage has its own part of the quota, and one fragment at most half of that."""

    async def main() -> None:
        async with scene(tmp_path) as s:
            sealed = s.sealed(20)
            for size in (SEGMENT, 1 << 32, 1 << 40):
                header = replace(sealed.header, size=size).signed_by(s.maker.key)
                with pytest.raises(Refused) as caught:
                    await s.begin(replace(sealed, header=header))
                assert caught.value.rule == "quota"
            value = {**sealed.header.to_value(), "size": 1 << 41}
            with pytest.raises(Invalid):
                await ask(s.maker.transport, s.holder, op="put", header=value, share=sealed.shares[0])
            assert s.files() == []

    run_virtual(main)


def test_a_stage_that_fills_its_part_leaves_the_others_theirs(tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            part = CONFIG.quota_bytes // 3
            most = 2 * (part // 2) - 40
            for step in (20, 40, 60):
                sealed = s.sealed(step, state=bytes(most))
                assert (await put(s.maker, sealed, s.holder))["whole"]
                assert sum(size for _, size in s.files()) <= part
            assert s.steps() == [60, 40]
            other = s.run.at(2)[0]
            await put_all(other, s.run.sealed(other, Moment(1, 20)), [s.holder])
            assert (s.steps(2), s.steps()) == ([20], [60, 40])

    run_virtual(main)


def test_a_fragment_that_is_not_the_signed_one_is_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            sealed = s.sealed(20)
            fragment = sealed.fragments[sealed.header.number_of(s.holder.transport.id)]
            with pytest.raises(Misbehaviour, match="not the one in the header"):
                await put(s.maker, sealed, s.holder, fragment[:-1] + bytes([fragment[-1] ^ 1]))
            assert s.files() == []
            with pytest.raises(Invalid):
                await put(s.maker, sealed, s.holder, fragment + b"x")
            assert await s.begin(sealed) == {"have": 0, "whole": False}
            digest = sealed.header.digest
            with pytest.raises(Conflict) as caught:
                await ask(s.maker.transport, s.holder, b"x", op="chunk", snapshot=digest, offset=5)
            assert caught.value.fields["have"] == 0
            with pytest.raises(Conflict):
                await ask(s.maker.transport, s.holder, b"x", op="chunk", snapshot=digest, offset=-1)
            with pytest.raises(Missing):  # nobody else writes into it
                await ask(s.run.at(2)[0].transport, s.holder, b"x", op="chunk", snapshot=digest, offset=0)
            with pytest.raises(Missing):  # nor reads half of it, not even who is admitted
                await ask(s.maker.transport, s.holder, op="get", snapshot=digest, offset=0)
            assert (await put(s.maker, sealed, s.holder))["whole"]

    run_virtual(main)


def test_only_the_newest_two_are_kept_and_old_ones_do_not_come_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            for step in (20, 40, 60):
                await put_all(s.maker, s.sealed(step), [s.holder])
            assert s.steps() == [60, 40]
            with pytest.raises(Conflict):
                await put(s.maker, s.sealed(20), s.holder)
            await s.begin(s.sealed(100))
            with pytest.raises(Conflict):  # one is under way that is newer
                await s.begin(s.sealed(80))
            assert s.steps() == [60, 40]
            assert len(s.files()) == 3

    run_virtual(main)


def test_a_moment_that_the_run_has_not_reached_waits(tmp_path: Path) -> None:
    """Else one maker could take all later ones' place for ever."""

    async def main() -> None:
        async with scene(tmp_path) as s:
            for step, session in ((120, 1), (20, 2), (2**52 - 2**52 % 20, 1)):
                with pytest.raises(Unavailable):
                    await s.begin(s.sealed(step, session, state=b"state"))
            s.run.moment = Moment(2, 120)
            assert (await s.begin(s.sealed(120, 1)))["have"] == 0

    run_virtual(main)


def test_a_run_that_went_back_drops_what_it_left_and_takes_no_more_of_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            for step in (40, 60):
                await put_all(s.maker, s.sealed(step), [s.holder])
            s.run.moment = Moment(2, 100)
            await put_all(s.maker, s.sealed(60, session=2), [s.holder])
            held = [header.moment for header in s.holder.snapshots._shelf.headers(0)]
            assert held == [Moment(2, 60), Moment(1, 40)]
            for step in (60, 80):
                with pytest.raises(Conflict):
                    await put(s.maker, s.sealed(step, session=1), s.holder)

    run_virtual(main)


@pytest.mark.parametrize("reply", [{"have": 0, "whole": False}, {"have": 1, "whole": True}])
def test_a_holder_that_does_not_count_what_it_takes_is_given_up(reply: dict[str, Any], tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            maker, greedy = run.at(0)[0], run.at(1)[0]
            taken = [0]

            async def swallow(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
                taken[0] += len(body)
                return reply if body else {"have": 0, "whole": False}, b""

            serve_calls(greedy.transport, SNAPSHOT, swallow, request_limit=2 * CHUNK_BYTES)
            await run.train(20)
            spread = maker.snapshots.last
            assert spread is not None
            assert "bytes where" in spread.missing[greedy.transport.id]
            assert spread.restorable
            fragment_bytes = spread.header.fragment_bytes
            assert taken[0] == 3 * fragment_bytes  # one piece of each other stage

    run_virtual(main)


def test_a_holder_that_forgets_what_it_took_does_not_get_it_without_end(tmp_path: Path) -> None:
    """It takes all but the end, breaks off, and says the next time that nothing is there: our uplink is not its toy."""

    async def main() -> None:
        async with world(tmp_path) as run:
            maker, greedy = run.at(0)[0], run.at(1)[0]
            taken = [0]

            async def forget(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
                if body and peer == maker.transport.id:
                    taken[0] += len(body)
                    raise Unavailable("just a moment")
                return {"have": 0, "whole": False}, b""

            serve_calls(greedy.transport, SNAPSHOT, forget, request_limit=2 * CHUNK_BYTES)
            run.moment = Moment(1, 20)
            maker.checkpoints.save(20, bytes(4 * CHUNK_BYTES))
            maker.snapshots.offer(run.moment)
            await anyio.sleep(100)
            spread = maker.snapshots.last
            assert spread is not None
            assert "again and again" in spread.missing[greedy.transport.id]
            assert taken[0] <= 3 * (spread.header.fragment_bytes + CHUNK_BYTES)

    run_virtual(main)


@pytest.mark.parametrize(
    "reply", [{}, {"have": -1, "whole": False}, {"have": "0", "whole": False}, {"have": 2**60, "whole": 1}]
)
def test_a_holder_that_answers_rubbish_is_named(reply: dict[str, Any], tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            maker, liar = run.at(0)[0], run.at(1)[0]

            async def answer(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
                return reply, b""

            serve_calls(liar.transport, SNAPSHOT, answer)
            await run.train(20)
            spread = maker.snapshots.last
            assert spread is not None
            assert "answers a snapshot with" in spread.missing[liar.transport.id]
            assert len(spread.placed) == 2

    run_virtual(main)


def test_the_maker_of_a_stage_alone_has_nobody_to_ask(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, stages=2) as run:
            await run.train(20)
            assert [node.snapshots.last for node in run.nodes] == [None, None]
            assert run.at(0)[0].checkpoints.load(20) == state_of(0, 1, 20)

    run_virtual(main)

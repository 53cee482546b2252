"""What a worker does with what its neighbours send: each microbatch once, again when asked, naming who is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from tessera.core.errors import Invalid, Misbehaviour, TesseraError
from tessera.core.hashing import sha256
from tessera.p2p.memory import run_virtual
from tessera.training.frames import Frame, Kind
from tessera.training.receipts import Receipt, payloads_digest
from tessera.training.work import OPEN_RECEIPTS
from work_desk import DOWN, MANIFEST, ME, OTHER_DOWN, OTHER_UP, TERM, UP, Desk


def at_desk(test: Callable[[Desk], Any], folder: Path, *, opened: bool = True) -> None:
    async def main() -> None:
        desk = Desk(folder)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(desk.work.run)
            if opened:
                await desk.open()
            await test(desk)
            tasks.cancel_scope.cancel()
        desk.book.close()

    run_virtual(main)


@contextmanager
def named_wrong(peer: Any) -> Iterator[None]:
    with pytest.raises(Misbehaviour) as caught:
        yield
    assert caught.value.fields["evidence"]["peer"] == peer.id


def test_codes_go_down_and_gradients_up_once(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        await desk.pass_through(0)
        assert [(peer, f.kind, f.index) for peer, f in desk.wire.down] == [(DOWN.id, Kind.FORWARD, 0)]
        assert [(peer, f.kind, f.index) for peer, f in desk.wire.up] == [(UP.id, Kind.GRADIENT, 0)]
        assert desk.said == [{"op": "done", "step": 0, "index": 0, "loss": None}]

    at_desk(test, tmp_path)


def test_a_frame_may_come_before_the_leads_word(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        await desk.hear(UP, Kind.FORWARD, 1)
        assert not desk.wire.down
        await desk.take(1)
        assert len(desk.wire.down) == 1

    at_desk(test, tmp_path)


def test_a_frame_of_the_next_step_or_term_waits_for_it(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        for index in range(3):
            await desk.pass_through(index)
        await desk.hear(UP, Kind.FORWARD, 0, step=1)
        await desk.commit()
        await desk.take(0)
        assert [f.step for _, f in desk.wire.down if f.kind is Kind.FORWARD] == [0, 0, 0, 1]
        await desk.hear(UP, Kind.FORWARD, 0, term=TERM + 1, step=1)
        await desk.open(TERM + 1, 1)
        await desk.take(0)
        assert desk.wire.down[-1][1].term == TERM + 1

    at_desk(test, tmp_path)


def test_what_an_earlier_lead_asked_for_is_not_computed(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        await desk.take(0)
        await desk.hear(UP, Kind.FORWARD, 0, term=TERM - 1)
        await desk.hear(UP, Kind.FORWARD, 0, step=0, term=TERM - 1)
        assert not desk.wire.down

    at_desk(test, tmp_path)


def test_asked_again_it_sends_again_and_computes_nothing(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        await desk.pass_through(0)
        computed = len(desk.calls)
        await desk.take(0, OTHER_UP)  # the upper neighbour died: another has his microbatch now
        await desk.hear(OTHER_UP, Kind.FORWARD, 0)
        assert desk.wire.up[-1] == (OTHER_UP.id, desk.wire.up[0][1])
        await desk.take(0, OTHER_UP, OTHER_DOWN, again=True)  # and now the lower one
        assert desk.wire.down[-1] == (OTHER_DOWN.id, desk.wire.down[0][1])
        await desk.hear(OTHER_DOWN, Kind.GRADIENT, 0)
        assert len(desk.calls) == computed
        assert [m["op"] for m in desk.said] == ["done"]

    at_desk(test, tmp_path)


def test_only_who_serves_a_microbatch_is_heard(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        await desk.take(0)
        await desk.hear(OTHER_UP, Kind.FORWARD, 0, b"\1" * desk.size)  # would be paid for what he was not given
        assert not desk.wire.down
        await desk.hear(UP, Kind.FORWARD, 0)
        await desk.hear(OTHER_DOWN, Kind.GRADIENT, 0)
        assert not desk.wire.up
        await desk.hear(DOWN, Kind.GRADIENT, 0)
        assert len(desk.wire.up) == 1

    at_desk(test, tmp_path)


def test_a_gradient_that_comes_twice_counts_once(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        await desk.take(0)
        await desk.hear(UP, Kind.FORWARD, 0)
        for _ in range(5):
            desk.work.deliver(DOWN.id, Frame(Kind.GRADIENT, TERM, 0, 0, bytes(desk.size)))
        await desk.settle()
        assert desk.calls.count("backward") == 1

    at_desk(test, tmp_path)


@pytest.mark.parametrize("kind", [Kind.FORWARD, Kind.GRADIENT, Kind.EVALUATE])
@pytest.mark.parametrize(("index", "size"), [(60_000, None), (0, 0), (0, 1), (0, 10**6)])
def test_frames_of_no_honest_neighbour(kind: Kind, index: int, size: int | None, tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        payload = bytes(desk.size if size is None else size)
        with named_wrong(UP):
            desk.work.deliver(UP.id, Frame(kind, TERM, 0, index, payload))

    at_desk(test, tmp_path)


def test_frames_of_times_to_come_take_bounded_memory(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        for term in range(200):
            for index in range(3):
                desk.work.deliver(UP.id, Frame(Kind.FORWARD, TERM + 1 + term, term, index, bytes(desk.size)))
        assert len(desk.work._held) == 3

    at_desk(test, tmp_path)


def test_bytes_that_hold_no_message_cost_the_link(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        def refuse(name: str, step: int, index: int) -> None:
            raise Invalid("this is no message")

        desk.trainer.before_call = refuse
        await desk.take(0)
        await desk.hear(UP, Kind.FORWARD, 0, b"\xff" * desk.size)
        assert desk.wire.dropped == [UP.id]

    at_desk(test, tmp_path)


def test_a_step_ends_with_receipts_for_both_neighbours(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        for index in range(3):
            await desk.pass_through(index)
        await desk.commit()
        (to_up,) = [f for peer, f in desk.wire.up if f.kind is Kind.RECEIPT and peer == UP.id]
        (to_down,) = [f for peer, f in desk.wire.down if f.kind is Kind.RECEIPT and peer == DOWN.id]
        for frame, worker, direction in ((to_up, UP, "forward"), (to_down, DOWN, "backward")):
            receipt = Receipt.from_payload(MANIFEST.run_id, 0, worker.id, ME.id, direction, frame.payload)  # type: ignore[arg-type]
            receipt.check()
            hashes = {index: sha256(bytes([index]) * desk.size) for index in range(3)}
            assert receipt.microbatches == (0, 1, 2)
            assert receipt.digest == payloads_digest(hashes)
            assert receipt in desk.book.of_steps(MANIFEST.run_id, range(1))

    at_desk(test, tmp_path)


def test_receipts_are_checked_against_what_was_sent(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        for index in range(3):
            await desk.pass_through(index)
        sent = {f.index: sha256(f.payload) for _, f in desk.wire.down if f.kind is Kind.FORWARD}
        honest = desk.receipt(DOWN, "forward", 0, sent)
        forged = desk.receipt(OTHER_DOWN, "forward", 0, sent)  # signed by somebody else
        other_bytes = desk.receipt(DOWN, "forward", 0, {0: sha256(b"other")})
        for payload in (forged.to_payload(), other_bytes.to_payload()):
            with pytest.raises(Misbehaviour):
                desk.work.deliver(DOWN.id, Frame(Kind.RECEIPT, TERM, 0, 0, payload))
        with pytest.raises(TesseraError):
            desk.work.deliver(DOWN.id, Frame(Kind.RECEIPT, TERM, 0, 0, b"short"))
        with named_wrong(OTHER_DOWN):  # for what he was not sent
            own = desk.receipt(OTHER_DOWN, "forward", 0, sent)
            desk.work.deliver(OTHER_DOWN.id, Frame(Kind.RECEIPT, TERM, 0, 0, own.to_payload()))
        assert not desk.book.of_steps(MANIFEST.run_id, range(1))
        desk.work.deliver(DOWN.id, Frame(Kind.RECEIPT, TERM, 0, 0, honest.to_payload()))
        assert desk.book.of_steps(MANIFEST.run_id, range(1)) == [honest]

    at_desk(test, tmp_path)


def test_a_neighbour_who_never_signs_is_left_out(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        for _ in range(OPEN_RECEIPTS + 1):
            for index in range(3):
                await desk.pass_through(index)
            await desk.commit()
        assert set(desk.wire.dropped) == {UP.id, DOWN.id}

    at_desk(test, tmp_path)


def test_dropped_microbatches_leave_nothing_behind(tmp_path: Path) -> None:
    async def test(desk: Desk) -> None:
        await desk.pass_through(0)
        await desk.take(1)
        await desk.hear(UP, Kind.FORWARD, 1)  # under way
        await desk.take(2)  # not here yet
        desk.work.do(lambda: desk.work.drop([0, 1, 2]))  # 0 is in the sums already: it stays
        await desk.hear(DOWN, Kind.GRADIENT, 1)
        await desk.commit()
        assert desk.trainer.counted == [0]
        assert desk.trainer.step == 1

    at_desk(test, tmp_path)

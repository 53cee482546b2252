"""A session: complete receipts between honest neighbours, and a named end for every other kind."""

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from tessera.core.errors import Late, Misbehaviour, TesseraError, Unavailable
from tessera.p2p.memory import run_virtual
from tessera.p2p.transport import Stream
from tessera.training.frames import Frame, Kind
from tessera.training.manifest import Manifest
from training_world import (
    Neighbour,
    Stage,
    first_failure,
    linked,
    make_stage,
    peer_keys,
    small_manifest,
    train_together,
    verified,
)

PAIR = small_manifest(stages=2)
KEYS = peer_keys(4)
COUNT = PAIR.schedule.microbatches
Script = Callable[[Neighbour], Awaitable[None]]


async def run_all(manifest: Manifest, folder: Path, first_step: int = 0, delay_s: float = 0.0) -> list[Stage]:
    count = manifest.model.stages
    keys = peer_keys(count)
    async with linked(keys, delay_s) as pairs:
        stages = [
            make_stage(
                manifest,
                keys,
                i,
                folder,
                up=pairs[i - 1][1] if i else None,
                down=pairs[i][0] if i < count - 1 else None,
                first_step=first_step,
            )
            for i in range(count)
        ]
        for stage in stages:
            stage.trainer.step = first_step
        await train_together(stages)
    return stages


async def against(script: Script, folder: Path, *, below: bool = True, wait_s: float = 120.0) -> TesseraError:
    """The failure of one honest stage whose only neighbour follows `script`."""
    async with linked(KEYS[:2]) as pairs:
        upper, lower = pairs[0]
        mine, his = (0, 1) if below else (1, 0)
        honest = make_stage(
            PAIR, KEYS, mine, folder, up=None if below else lower, down=upper if below else None, wait_s=wait_s
        )
        neighbour = Neighbour(PAIR, KEYS[his], KEYS[mine].id, lower if below else upper)
        return await first_failure(honest.session.run, partial(script, neighbour))


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_honest_neighbours_sign_every_step(stages: int, delay_s: float, tmp_path: Path) -> None:
    manifest = small_manifest(stages=stages)
    done = run_virtual(run_all, manifest, tmp_path, 0, delay_s)
    steps = range(manifest.schedule.steps)
    peers = [key.id for key in peer_keys(stages)]
    for i, stage in enumerate(done):
        receipts = stage.book.of_steps(manifest.run_id, steps)
        for receipt in receipts:
            receipt.check()
        assert verified(manifest, receipts, peers, steps)[i] == manifest.schedule.microbatches * len(steps)
        mine, given = ([r for r in receipts if (r.worker == peers[i]) is own] for own in (True, False))
        assert len(mine) == len(given) == len(steps) * ((i > 0) + (i < stages - 1))
    assert done[-1].told.losses == [(step, pytest.approx(5.0 - 0.1 * step)) for step in steps]
    assert done[-1].told.validations == [(0, 3.0), (2, 3.0), (4, 3.0), (6, 3.0)]
    assert done[0].told.wire["bytes"] > done[0].told.wire["tokens"] * manifest.model.message_bytes_per_token()


def test_both_ends_of_a_link_hold_the_same_receipt(tmp_path: Path) -> None:
    upper, lower = run_virtual(run_all, PAIR, tmp_path)
    steps = range(PAIR.schedule.steps)
    assert upper.book.of_steps(PAIR.run_id, steps) == lower.book.of_steps(PAIR.run_id, steps)


def test_a_run_that_is_trained_is_only_evaluated(tmp_path: Path) -> None:
    done = run_virtual(run_all, PAIR, tmp_path, PAIR.schedule.steps)
    assert done[-1].told.validations == [(6, 3.0)]
    assert all(stage.told.losses == [] and stage.trainer.params == b"fresh" for stage in done)


def test_a_neighbour_who_is_done_first_may_sign_before_we_are(tmp_path: Path) -> None:
    async def main() -> None:
        async with linked(KEYS[:2]) as pairs:
            honest = make_stage(PAIR, KEYS, 0, tmp_path, up=None, down=pairs[0][0])
            neighbour = Neighbour(PAIR, KEYS[1], KEYS[0].id, pairs[0][1])
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(honest.session.run)
                await neighbour.recv_forwards()
                await neighbour.send_gradients(0)  # all of them wait at stage 0 when the receipt comes
                await neighbour.send(Kind.RECEIPT, 0, 0, neighbour.receipt(0))
                await neighbour.recv(Kind.FORWARD)
                tasks.cancel_scope.cancel()
            held = honest.book.of_steps(PAIR.run_id, range(1))
            assert {(r.direction, r.worker) for r in held} == {("forward", KEYS[0].id), ("backward", KEYS[1].id)}

    run_virtual(main)


def test_a_cancelled_session_has_let_go_of_its_trainer(tmp_path: Path) -> None:
    async def main() -> None:
        async with linked(KEYS[:2]) as pairs:
            upper, lower = (
                make_stage(PAIR, KEYS, 0, tmp_path, up=None, down=pairs[0][0]),
                make_stage(PAIR, KEYS, 1, tmp_path, up=pairs[0][1], down=None),
            )
            reached = anyio.Event()

            def slowly(name: str, step: int, index: int) -> None:
                if (name, step) == ("forward", 2):
                    anyio.from_thread.run_sync(reached.set)

            lower.trainer.before_call = slowly
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(train_together, [upper, lower])
                await reached.wait()
                tasks.cancel_scope.cancel()
            assert upper.trainer.busy == lower.trainer.busy == 0
            assert upper.trainer.step == lower.trainer.step == 2

    run_virtual(main)


# --- neighbours below, who do wrong -----------------------------------------------------------------------------------


async def finish_first_step(him: Neighbour) -> None:
    await him.recv_forwards()
    await him.send_gradients(0)


def sends(kind: Kind, step: int, index: int, payload: bytes | None = None) -> Script:
    async def script(him: Neighbour) -> None:
        await him.recv(Kind.EVALUATE)
        await him.send(kind, step, index, payload)

    return script


def sends_bytes(data: bytes) -> Script:
    async def script(him: Neighbour) -> None:
        await him.stream.send(data)

    return script


def signs(step: int = 0, times: int = 1, **changes: Any) -> Script:
    async def script(him: Neighbour) -> None:
        await finish_first_step(him)
        for _ in range(times):
            await him.send(Kind.RECEIPT, step, 0, him.receipt(0, **changes))

    return script


async def cuts_a_receipt_short(him: Neighbour) -> None:
    await finish_first_step(him)
    await him.send(Kind.RECEIPT, 0, 0, him.receipt(0)[:-1])


async def leaves_its_signature_empty(him: Neighbour) -> None:
    await finish_first_step(him)
    await him.send(Kind.RECEIPT, 0, 0, him.receipt(0)[:64] + bytes(64))


async def signs_before_its_last_gradient(him: Neighbour) -> None:
    await him.recv_forwards()
    await him.send(Kind.RECEIPT, 0, 0, bytes(128))
    await him.send(Kind.RECEIPT, 0, 0, bytes(128))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (sends(Kind.GRADIENT, 0, 1), "expected index 0 of 3"),
        (sends(Kind.GRADIENT, 1, 0), "our step is 0"),
        (sends(Kind.GRADIENT, 0, 0, b"short"), "5 bytes, expected 96"),
        (sends(Kind.FORWARD, 0, 0), "against the stream"),
        (sends(Kind.EVALUATE, 0, 0), "against the stream"),
        (sends(Kind.DONE, 0, 0, b""), "our step is 0|6 steps to go"),
        (sends(Kind.DONE, 6, 0, b""), "our step is 0"),
        (sends(Kind.GRADIENT, 0, 0, bytes(1000)), "at most"),
        (sends(Kind.RECEIPT, 5, 0, bytes(128)), "not owed"),
        (sends_bytes(b"Z" + bytes(103)), "unknown kind"),
        (sends_bytes(b"G"), "at least 8 expected"),
        (signs(microbatches=(0, 1)), "forged"),
        (signs(direction="backward"), "forged"),
        (signs(digest=bytes(32)), "signed other bytes than we sent"),
        (signs(times=2), "not owed|second receipt"),
        (cuts_a_receipt_short, "127 bytes, expected 128"),
        (leaves_its_signature_empty, "forged"),
        (signs_before_its_last_gradient, "second receipt"),
    ],
)
def test_wrong_frames_from_below_are_misbehaviour(script: Script, message: str, tmp_path: Path) -> None:
    failure = run_virtual(partial(against, script, tmp_path))
    assert isinstance(failure, Misbehaviour), failure
    assert failure.evidence
    with pytest.raises(Misbehaviour, match=message):
        raise failure


async def floods_forwards(him: Neighbour) -> None:
    await asks_twice(him, 1)
    for index in range(COUNT):
        await him.send(Kind.FORWARD, 0, index)
    await him.send(Kind.FORWARD, 0, COUNT)


async def asks_twice(him: Neighbour, times: int = 2) -> None:
    for _ in range(times):
        for index in range(2):
            await him.send(Kind.EVALUATE, 0, index)


async def evaluates_when_nothing_is_due(him: Neighbour) -> None:
    for index in range(COUNT):
        await him.send(Kind.FORWARD, 0, index)
    for _ in range(COUNT):
        await him.recv(Kind.GRADIENT)
    await him.send(Kind.EVALUATE, 1, 0)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (sends_bytes(Frame(Kind.GRADIENT, 0, 0, bytes(128)).to_bytes()), "against the stream"),
        (sends_bytes(Frame(Kind.EVALUATE, 0, 1, bytes(128)).to_bytes()), "expected index 0 of 2"),
        (sends_bytes(Frame(Kind.FORWARD, 0, 3, bytes(128)).to_bytes()), "expected index 0 of 3"),
        (sends_bytes(Frame(Kind.DONE, 0, 0).to_bytes()), "6 steps to go"),
        (floods_forwards, "expected index 3 of 3|our step is 1"),
        (asks_twice, "expected index 2 of 2"),
        (evaluates_when_nothing_is_due, "no validation is due"),
    ],
)
def test_wrong_frames_from_above_are_misbehaviour(script: Script, message: str, tmp_path: Path) -> None:
    failure = run_virtual(partial(against, script, tmp_path, below=False))
    with pytest.raises(Misbehaviour, match=message):
        raise failure


def test_more_microbatches_than_may_be_in_flight_are_misbehaviour(tmp_path: Path) -> None:
    manifest = small_manifest(stages=3)
    schedule = manifest.schedule.model_copy(update={"microbatches": 40})
    manifest = manifest.model_copy(update={"schedule": schedule})

    async def main() -> None:
        async with linked(KEYS[:3]) as pairs:
            middle = make_stage(manifest, KEYS, 1, tmp_path, up=pairs[0][1], down=pairs[1][0])
            above = Neighbour(manifest, KEYS[0], KEYS[1].id, pairs[0][0])

            async def flood() -> None:
                for index in range(40):
                    await above.send(Kind.FORWARD, 0, index)

            with pytest.raises(Misbehaviour, match="more than 4 microbatches in flight"):
                raise await first_failure(middle.session.run, flood)

    run_virtual(main)


# --- neighbours who leave ---------------------------------------------------------------------------------------------


async def closes(him: Neighbour) -> None:
    await him.recv_forwards()
    await him.stream.send(b"", last=True)


async def breaks_off(him: Neighbour) -> None:
    await him.recv_forwards()
    await him.stream.abort()


async def falls_silent(him: Neighbour) -> None:
    await him.recv_forwards()


@pytest.mark.parametrize("script", [closes, breaks_off])
def test_a_neighbour_that_leaves_is_unavailable(script: Script, tmp_path: Path) -> None:
    assert isinstance(run_virtual(partial(against, script, tmp_path)), Unavailable)


def test_a_silent_neighbour_is_late(tmp_path: Path) -> None:
    async def main() -> float:
        start = anyio.current_time()
        failure = await against(falls_silent, tmp_path, wait_s=77.0)
        assert isinstance(failure, Late), failure
        return anyio.current_time() - start

    assert run_virtual(main) == pytest.approx(77.0, abs=1.0)


class Stuck:
    """A stream whose other end takes nothing."""

    peer = KEYS[1].id
    sent_bytes = received_bytes = 0

    async def send(self, data: bytes | bytearray | memoryview, *, last: bool = False) -> None:
        await anyio.sleep_forever()

    async def recv(self, limit: int) -> bytes:
        await anyio.sleep_forever()
        raise AssertionError("unreachable")

    async def abort(self, code: int = 0) -> None:
        return


def test_a_neighbour_that_takes_nothing_is_late(tmp_path: Path) -> None:
    stream: Stream = Stuck()

    async def main() -> None:
        honest = make_stage(PAIR, KEYS, 0, tmp_path, up=None, down=stream, wait_s=30)
        with pytest.raises(Late, match="did not take"):
            raise await first_failure(honest.session.run)

    run_virtual(main)

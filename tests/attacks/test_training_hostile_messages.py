"""Oversize, malformed and absurd messages on every protocol of a run: refused by name, and everybody else goes on."""

import random
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import Invalid, Misbehaviour, Refused, TesseraError
from tessera.models.presets import tiny_spec
from tessera.models.trainer import StageTrainer
from tessera.models.wire import Wire
from tessera.p2p.calls import call
from tessera.p2p.memory import run_virtual
from tessera.p2p.transport import Transport
from tessera.training.frames import Frame, Kind
from tessera.training.protocols import EPOCH, JOIN, RUN, SMALL
from training_run import STRANGER, hosted, settle_all, settlement
from training_world import small_manifest
from work_desk import TERM, UP, Desk

MANIFEST = small_manifest(steps=3, epoch_steps=3)


async def raw(transport: Transport, record: Any, protocol: str, data: bytes) -> None:
    """Bytes where a request should be; whatever comes back is read."""
    stream = await transport.open(record, protocol, timeout_s=5)
    try:
        await stream.send(data, last=True)
        while await stream.recv(1 << 20):
            pass
    except TesseraError:
        return
    finally:
        await stream.abort()


def rubbish() -> list[bytes]:
    rng = random.Random(0)
    return [rng.randbytes(size) for size in (1, 10, 1000, SMALL - 10)] + [
        b"{}",
        b"[]",
        b"null",
        b'{"op":1}',
        b"{" * 2000,
    ]


@pytest.mark.parametrize("protocol", [JOIN, RUN])
def test_a_host_outlives_rubbish(protocol: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with hosted(MANIFEST, tmp_path) as world:
            await world.join(0)
            record = world.host_transport.record()
            for data in rubbish():
                for peer in (0, 4):  # seated, and a stranger
                    await raw(world.peers[peer], record, protocol, data)
            with pytest.raises(Invalid):
                await world.ask(0, protocol, {"op": "report", "report": {"note": "x" * 2 * SMALL}})
            assert [seat.peer for seat in world.host.seats] == [world.keys[0].id]
            assert world.reports == []
            for peer in range(1, 4):
                await world.join(peer)
            assert (await world.host.seat_everyone()).stages == 4

    run_virtual(main)


def test_keepers_settle_beside_rubbish(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world, world.network.start(STRANGER) as stranger:
            for settler in world.settlers:
                settler.keeper.serve()
            for data in rubbish():
                for transport in (world.settlers[0].transport, stranger):
                    await raw(transport, world.roster.seats[1].record, EPOCH, data)
            for epoch in (-1, 1, 2**70, True, None, "0", 0.0):
                with pytest.raises(Invalid):
                    await world.ask(0, 1, {"op": "receipts", "epoch": epoch})
            with pytest.raises(Invalid):
                await world.ask(0, 1, {"op": "vote", "epoch": 0, "attempt": 0, "root": "00"}, bytes(1 << 20))
            record = world.roster.seats[1].record
            with pytest.raises(Refused):
                await call(stranger, record, EPOCH, {"op": "vote", "epoch": 0}, timeout_s=5, reply_limit=SMALL)
            await settle_all(world.settlers)
            assert await world.share.epoch_count() == 1

    run_virtual(main)


@given(st.binary(max_size=300))
def test_no_bytes_break_the_frame_parser(data: bytes) -> None:
    readable = len(data) >= 12 and data[:1] in {kind.value for kind in Kind}
    if readable:
        frame = Frame.parse(data)
        assert Frame.parse(frame.to_bytes()) == frame
    else:
        with pytest.raises(Misbehaviour) as caught:
            Frame.parse(data)
        assert caught.value.evidence is not None


WORD = st.integers(0, 2**32 - 1)


@given(st.sampled_from(Kind), WORD, WORD, st.integers(0, 2**16 - 1), st.binary(max_size=50))
def test_every_frame_reads_back(kind: Kind, term: int, step: int, index: int, payload: bytes) -> None:
    frame = Frame(kind, term, step, index, payload)
    assert Frame.parse(frame.to_bytes()) == frame


# --- bytes of the right size that hold no message ---------------------------------------------------------------------

SPEC = tiny_spec(3)
REAL = small_manifest(stages=3, steps=20).model_copy(update={"model": SPEC})


class Ids:
    validation_count = 1

    async def ready(self, step: int) -> None:
        pass

    def train(self, step: int, index: int) -> Any:
        return np.full((2, 9), index + 1)

    def validation(self, index: int) -> Any:
        return np.full((2, 9), 5)


def below_gets(payload: bytes, trainer: StageTrainer, folder: Path) -> Desk:
    """The worker of stage 1 after stage 0 has sent `payload` as its first message."""
    torch.set_num_threads(1)

    async def main() -> Desk:
        desk = Desk(folder, REAL, trainer, Ids())
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(desk.work.run)
                await desk.open()
                await desk.take(0)
                desk.work.deliver(UP.id, Frame(Kind.FORWARD, TERM, 0, 0, payload))
                await desk.settle()
                tasks.cancel_scope.cancel()
        finally:
            desk.book.close()
        return desk

    return run_virtual(main)


def good() -> bytes:
    return Wire(SPEC).pack(torch.ones(2, 8, SPEC.codec.k))


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff" * len(good()),  # scales that are not numbers
        good()[:32] + b"\x80" * (len(good()) - 32),  # the code -128, which is never sent
        b"\x7f\x7f" * 16 + b"\x7f" * (len(good()) - 32),  # codes that overflow with their scale
    ],
    ids=["no number", "no code", "overflow"],
)
def test_codes_that_nobody_packs_are_the_senders_fault(payload: bytes, tmp_path: Path) -> None:
    desk = below_gets(payload, StageTrainer(SPEC, 1, steps=3), tmp_path)
    assert desk.wire.dropped == [UP.id]
    assert desk.wire.down == []


def test_honest_codes_are_computed_on(tmp_path: Path) -> None:
    desk = below_gets(good(), StageTrainer(SPEC, 1, steps=3), tmp_path)
    assert desk.wire.dropped == []
    assert len(desk.wire.down) == 1


def test_a_model_that_diverges_is_nobodys_fault(tmp_path: Path) -> None:
    trainer = StageTrainer(SPEC, 1, steps=3)
    with torch.no_grad():
        for parameter in trainer.stage.parameters():
            parameter.fill_(float("inf"))
    with pytest.raises(BaseExceptionGroup) as caught:
        below_gets(good(), trainer, tmp_path)
    (failure,) = caught.value.exceptions
    while isinstance(failure, BaseExceptionGroup):
        (failure,) = failure.exceptions
    assert isinstance(failure, Invalid), failure
    assert "diverged" in failure.message

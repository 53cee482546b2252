"""Strangers at a served model's desk, and a host that lies to its holders: refused, and nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from plain_world import write_folder, write_tokenizer
from tessera.core import encoding
from tessera.core.clock import SystemClock
from tessera.core.errors import Invalid, Misbehaviour, Refused, TesseraError
from tessera.core.signing import PeerKey
from tessera.devnet import stage_table
from tessera.devnet.library import Import, import_model
from tessera.devnet.stage_holding import _Holder
from tessera.devnet.stage_hosting import StageDesk
from tessera.devnet.stage_invitation import StageInvitation
from tessera.devnet.stage_table import STAGES, StageTable
from tessera.models.card import ModelCard
from tessera.p2p.memory import MemoryNetwork
from tessera.p2p.transport import PeerRecord, Stream
from tessera.training.home import Home

pytestmark = pytest.mark.anyio
CLOCK = SystemClock()
HOST = PeerKey(b"\x07" * 32)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    path = tmp_path_factory.mktemp("model")
    folder = write_folder(path / "qwen3", "qwen3")
    write_tokenizer(folder)
    return import_model(Home(path / "state"), folder, "qwen3", Import(stages=2))


@dataclass
class World:
    network: MemoryNetwork
    host: Any
    stranger: Any
    table: StageTable
    desk: StageDesk
    invitation: StageInvitation

    async def say(self, *messages: dict[str, Any] | bytes) -> dict[str, Any]:
        """The stranger's words, and the host's last one after them; what ends the stream is "gone"."""
        stream = await self.stranger.open(self.host.record(), STAGES, timeout_s=5)
        heard: dict[str, Any] = {}
        try:
            for message in messages:
                await stream.send(message if isinstance(message, bytes) else encoding.encode(message))
            with anyio.fail_after(5):
                while data := await stream.recv(1 << 22):
                    heard = encoding.decode(data, 1 << 22)
                    if heard["op"] == "roster":
                        return heard
        except TesseraError as error:
            return {"op": "gone", "error": error.code, **heard}
        finally:
            await stream.abort()
        return heard

    def asks(self, **changes: Any) -> dict[str, Any]:
        known = {"secret": self.invitation.secret, "digest": self.invitation.digest, "want": -1}
        return {"op": "ask", **known, **changes}

    async def settled(self) -> None:
        with anyio.fail_after(5):
            while self.desk.members or any(self.table.holders(stage) for stage in range(self.table.stages)):
                await anyio.sleep(0.01)
        assert self.desk._coming == [0] * self.table.stages


@asynccontextmanager
async def desk(card: ModelCard, expires: float = 2.0**40) -> AsyncIterator[World]:
    network = MemoryNetwork(random.Random(1))
    async with network.start(HOST) as host, network.start(PeerKey.generate()) as stranger:
        invitation = StageInvitation.make(HOST, card.digest, host=host.record(), expires=int(expires))
        table = StageTable(card.spec.stages)
        yield World(network, host, stranger, table, StageDesk(host, card, table, invitation, CLOCK), invitation)


async def test_only_who_has_the_invitation_gets_a_stage(card: ModelCard) -> None:
    async with desk(card) as world:
        for wrong in ({"secret": "0" * 32}, {"secret": ""}, {"digest": "0" * 64}, {"secret": "\u00e9" * 32}):
            assert (await world.say(world.asks(**wrong)))["reason"].startswith("this invitation is not")
        await world.settled()
    async with desk(card, expires=CLOCK.time() - 1) as world:
        assert "no longer" in (await world.say(world.asks()))["reason"]


async def test_words_out_of_place_end_the_stream_and_leave_nothing(card: ModelCard) -> None:
    async with desk(card) as world:
        other = PeerRecord.sign(PeerKey.generate(), ("memory:elsewhere",), 2.0**40).to_text()
        own = world.stranger.record().to_text()
        for words in (
            [b"\xff"], [b"[]"], [{"op": 7}], [{"op": "alive"}], [{"op": "ready", "record": own}],
            [world.asks(want="0")], [world.asks(colour=1)], [world.asks(), world.asks()],
            [world.asks(), {"op": "ready"}], [world.asks(), {"op": "ready", "record": "no record"}],
            [world.asks(), {"op": "ready", "record": other}],
            [world.asks(), {"op": "ready", "record": own}, {"op": "ready", "record": own}],
        ):  # fmt: skip
            heard = await world.say(*words)
            assert heard["op"] in ("sorry", "gone", "roster"), words
            await world.settled()


async def test_a_holder_is_in_the_roster_from_its_word_to_its_end(card: ModelCard) -> None:
    async with desk(card) as world:
        record = world.stranger.record().to_text()
        roster = await world.say(world.asks(want=1), {"op": "alive"}, {"op": "ready", "record": record})
        assert roster == {"op": "roster", "stages": [[], [record]]}
        await world.settled()


async def test_newcomers_get_different_stages_while_they_load_and_none_gets_two(card: ModelCard) -> None:
    async with desk(card) as world, world.network.start(PeerKey.generate()) as other:
        streams: list[Stream] = []
        seats = []
        for transport in (world.stranger, other, world.stranger):
            stream = await transport.open(world.host.record(), STAGES, timeout_s=5)
            await stream.send(encoding.encode(world.asks(want=0)))
            seats.append(encoding.decode(await stream.recv(1 << 22), 1 << 22))
            streams.append(stream)
        assert [seat.get("stage") for seat in seats] == [0, 1, None]
        assert "holds a stage already" in seats[2]["reason"]
        for stream in streams:
            await stream.abort()
        await world.settled()


async def test_a_silent_member_is_let_go(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_table, "SILENCE_S", 0.2)
    async with desk(card) as world:
        stream = await world.stranger.open(world.host.record(), STAGES, timeout_s=5)
        await stream.send(encoding.encode(world.asks()))
        record = world.stranger.record().to_text()
        await stream.send(encoding.encode({"op": "ready", "record": record}))
        with anyio.fail_after(5):
            while not any(world.table.holders(stage) for stage in range(2)):
                await anyio.sleep(0.01)
        await world.settled()
        await stream.abort()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([{"op": "seat", "stage": 9}], Misbehaviour),
        ([{"op": "seat", "stage": -1}], Misbehaviour),
        ([{"op": "seat", "stage": 0, "card": "{}"}], Invalid),
        ([{"op": "seat", "stage": "0"}], Misbehaviour),
        ([{"op": "roster", "stages": []}], Misbehaviour),
        ([{"op": "sorry", "reason": "no"}], Refused),
        (["other"], Misbehaviour),
    ],
)
async def test_a_host_that_shows_another_model_than_it_invited_to_is_left(
    card: ModelCard, words: list[Any], error: type[TesseraError], tmp_path: Path
) -> None:
    other = card.model_copy(update={"name": "other"})
    network = MemoryNetwork(random.Random(1))
    async with network.start(HOST) as host, network.start(PeerKey.generate()) as member:

        async def lie(stream: Stream) -> None:
            await stream.recv(1 << 20)
            for word in words:
                said = {"op": "seat", "stage": 0, "card": other.canonical.decode()} if word == "other" else word
                if said["op"] == "seat" and "card" not in said:
                    said = {**said, "card": card.canonical.decode()}
                await stream.send(encoding.encode(said))

        host.serve(STAGES, lie)
        invitation = StageInvitation.make(HOST, card.digest, host=host.record(), expires=2**40)
        holder = _Holder(Home(tmp_path / "member"), member, invitation, lambda holding: None)
        with pytest.raises(error):
            await holder.once()
        assert holder.stage == -1


def test_an_invitation_is_read_whole_or_not_at_all() -> None:
    host = PeerRecord.sign(HOST, ("memory:host",), 2.0**40)
    invitation = StageInvitation.make(HOST, "ab" * 32, host=host, expires=2**40)
    text = invitation.to_text()
    assert StageInvitation.parse(f"  {text[:40]}\n{text[40:]} ", CLOCK) == invitation
    swapped = text[:60] + ("A" if text[60] != "A" else "B") + text[61:]
    for bad in ("", "tessera1abc", text[:-1], text[:60], text + "A", swapped):
        with pytest.raises(Invalid):
            StageInvitation.parse(bad, CLOCK)
    with pytest.raises(Invalid, match="expired"):
        StageInvitation.parse(StageInvitation.make(HOST, "ab" * 32, host=host, expires=1).to_text(), CLOCK)
    with pytest.raises(Invalid):  # signed by somebody else than the host that it names
        StageInvitation.make(PeerKey.generate(), "ab" * 32, host=host, expires=2**40)


@pytest.mark.parametrize("value", [None, [], [[]], [[], "x"], [[], [7]], [[], ["record"] * 65], [[], ["{}"]]])
def test_a_roster_is_checked_before_it_counts(value: object) -> None:
    table = StageTable(2)
    with pytest.raises(Invalid):
        table.load(value)
    assert (table.complete, table.holders(0), table.holders(1)) == (False, [], [])

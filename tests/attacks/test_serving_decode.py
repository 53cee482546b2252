"""Hostile peers and broken ones on the decode protocol: refused by name, and nothing is kept."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import anyio
import pytest

from serving_peers import Shards, open_shards, tokens
from tessera.core.errors import Late, TesseraError, Unavailable
from tessera.core.signing import PeerKey
from tessera.serving.decoding.frames import HEADER_LIMIT
from tessera.serving.decoding.links import PROTOCOL
from tessera.serving.engine import Sampling

pytestmark = pytest.mark.anyio
NAME = "a" * 32
LAST = PeerKey(b"\3" * 32).id  # of two stages
HOW = Sampling().to_dict()
OPEN = {"op": "open", "session": NAME, "stage": 0, "last": LAST, "sampling": HOW}
LEAVE = {"recoveries": 0, "run_tokens": 1}  # a gateway that gives up at once, and that is asked for each token
LISTEN = {"op": "listen", "session": NAME, "ring": False}
STEP = {"op": "step", "start": 0, "want": 1, "more": 0}


async def refusal(shards: Shards, stage: int, header: dict[str, Any], ids: tuple[int, ...] = (), **kw: Any) -> str:
    """What a stage says to a first frame that it must not take."""
    link = await shards.link(stage, **kw)
    await link.send(header, ids or (1,) * (header["op"] == "open"), timeout_s=1)
    with pytest.raises(TesseraError) as caught:
        await link.await_ready(5)
    await shards.settled()
    return caught.value.message


@pytest.mark.parametrize(
    ("stage", "header", "reason"),
    [
        (0, {"op": "step", "start": 0}, "misbehaviour"),
        (0, {"op": "step", "session": NAME}, "misbehaviour"),
        (0, OPEN | {"session": "short"}, "misbehaviour"),
        (0, OPEN | {"session": 7}, "misbehaviour"),
        (0, OPEN | {"stage": 1}, "invalid"),
        (0, OPEN | {"extra": 1}, "misbehaviour"),
        (0, OPEN | {"last": 7}, "invalid"),
        (0, OPEN | {"sampling": {}}, "invalid"),
        (0, OPEN | {"sampling": HOW | {"seed": -1}}, "invalid"),
        (0, OPEN | {"sampling": HOW | {"temperature": "hot"}}, "invalid"),
        (0, OPEN, "missing"),
        (1, OPEN | {"stage": 1}, "refused"),
        (0, LISTEN, "invalid"),
        (1, LISTEN | {"ring": 1}, "misbehaviour"),
        (1, {"op": "listen", "session": NAME}, "misbehaviour"),
        (1, LISTEN | {"ring": True}, "refused"),
    ],
)
async def test_a_bad_first_frame_is_refused_by_name(stage: int, header: dict[str, Any], reason: str) -> None:
    async with open_shards(2) as shards:
        assert f"({reason})" in await refusal(shards, stage, header)


async def test_a_listener_whose_session_never_comes_is_let_go() -> None:
    async with open_shards(2, open_timeout_s=0.05) as shards:
        link = await shards.link(1)
        await link.send(LISTEN, timeout_s=1)
        await link.await_ready(1)
        with pytest.raises(Late):
            await link.receive(5)
        await shards.settled()


async def open_session(shards: Shards, last: int) -> tuple[Any, Any]:
    listening = await shards.link(last)
    await listening.send(LISTEN, timeout_s=1)
    await listening.await_ready(1)
    chain = await shards.link(0)
    await chain.send(OPEN | {"last": listening.peer}, [1, 2], timeout_s=1)
    await chain.await_ready(1)
    return listening, chain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("header", "ids"),
    [
        (STEP | {"start": 1}, [1]),
        (STEP | {"start": -1}, [1]),
        (STEP, []),
        (STEP | {"start": "0"}, [1]),
        (STEP | {"start": False}, [1]),
        ({"op": "step"}, [1]),
        ({"op": "nonsense"}, []),
        (STEP, [10**6]),
        (STEP, [1] * 65),
        (STEP | {"want": 2}, [1]),
        (STEP | {"want": 18}, [1] * 20),
        (STEP | {"want": -1}, [1]),
        (STEP | {"more": -1}, [1]),
        (STEP | {"more": 64}, [1]),
        (STEP | {"more": 3, "want": 2}, [1, 2]),
        (STEP | {"extra": 1}, [1]),
    ],
)
async def test_a_bad_step_ends_the_session_everywhere(header: dict[str, Any], ids: list[int]) -> None:
    async with open_shards(2) as shards:
        listening, chain = await open_session(shards, 1)
        await chain.send(header, ids, timeout_s=1)
        with pytest.raises(Unavailable):
            await listening.receive(5)
        await shards.settled()


async def test_a_prompt_with_code_bytes_is_refused_by_stage_0() -> None:
    async with open_shards(2) as shards:
        listening, chain = await open_session(shards, 1)
        await chain.send(STEP, [1], b"\0" * 10, timeout_s=1)
        with pytest.raises(Unavailable):
            await listening.receive(5)
        await shards.settled()


@pytest.mark.parametrize(
    "data",
    [b"\0", b"\0\0\0\x02{}", b"\xff\xff\xff\xff", b"\0\0\0\x0a{}", b"\0\0\0\x04nope", b'\0\0\0\x0a{"ids":-1}',
     b'\0\0\0\x09{"ids":5}', b'\0\0\0\x0c{"ids": true}', b'\0\0\0\x09{"ids":1}\xff\xff\xff\xff',
     (HEADER_LIMIT + 1).to_bytes(4, "big") + b" " * (HEADER_LIMIT + 1), b"\0" * 100_000],
    ids=repr,
)  # fmt: skip
async def test_garbage_frames_end_the_stream_and_nothing_else(data: bytes) -> None:
    async with open_shards(2) as shards:
        stream = await shards.gateway.open(shards.roster.holders(0)[0], PROTOCOL, timeout_s=5)
        with suppress(Unavailable):  # the stage may hang up before it has it all
            await stream.send(data)
        await shards.settled()
        assert len(await tokens(shards.engine, [1], Sampling(max_tokens=3))) == 3
        await stream.abort()


async def test_one_session_more_than_the_limit_is_unavailable_and_places_come_back() -> None:
    async with open_shards(2, max_sessions=2, gateway_settings=LEAVE) as shards:
        running = [shards.engine.generate([1], Sampling(max_tokens=9)) for _ in range(2)]
        for generation in running:
            await anext(generation)
        with pytest.raises(Unavailable):
            await tokens(shards.engine, [1], Sampling(max_tokens=1))
        for generation in running:
            await generation.aclose()
        await shards.settled()
        assert len(await tokens(shards.engine, [1], Sampling(max_tokens=2))) == 2


async def test_closing_the_generator_frees_every_stage() -> None:
    async with open_shards(4) as shards:
        generation = shards.engine.generate([1, 2], Sampling(max_tokens=30))
        await anext(generation)
        assert [server.sessions for server in shards.servers] == [1] * 4
        assert [len(decoder) for decoder in shards.decoders] == [1] * 4
        await generation.aclose()
        await shards.settled()


async def test_cancelling_in_mid_step_frees_every_stage() -> None:
    async with open_shards(4) as shards:
        for delay_s in (0.0, 0.002, 0.01, 0.03):
            with anyio.move_on_after(delay_s):
                await tokens(shards.engine, [1, 2], Sampling(max_tokens=40))
            await shards.settled()


async def test_a_gateway_that_vanishes_frees_every_stage() -> None:
    async with open_shards(3) as shards:
        listening, chain = await open_session(shards, 2)
        await chain.send(STEP, [1, 2], timeout_s=1)
        assert (await listening.receive(5)).op == "token"
        await chain.abort()
        await listening.abort()
        await shards.settled()


async def test_an_idle_session_is_freed() -> None:
    async with open_shards(3, idle_timeout_s=0.4, gateway_settings=LEAVE) as shards:
        generation = shards.engine.generate([1, 2], Sampling(max_tokens=30))
        await anext(generation)
        await shards.settled()
        with pytest.raises((Late, Unavailable)):
            await anext(generation)


@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_a_stage_that_fails_in_mid_generation_ends_it_everywhere(stage: int) -> None:
    async with open_shards(3, gateway_settings=LEAVE) as shards:
        generation = shards.engine.generate([1, 2], Sampling(max_tokens=30))
        await anext(generation)
        shards.decoders[stage].drop(next(iter(shards.decoders[stage]._sessions)))  # its cache is lost
        with pytest.raises(Unavailable, match="stage failed"):
            await anext(generation)
        await shards.settled()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
async def test_a_stage_killed_without_a_word_is_noticed_and_the_others_are_freed(stage: int) -> None:
    async with open_shards(3, gateway_settings=LEAVE) as shards:
        generation = shards.engine.generate([1, 2], Sampling(max_tokens=30))
        await anext(generation)
        assert shards.network is not None
        shards.network.kill(shards.transports[stage].id)
        with anyio.fail_after(6), pytest.raises((Unavailable, Late)):
            await anext(generation)
        del shards.servers[stage], shards.decoders[stage]  # dead ones free nothing
        await shards.settled()


@pytest.mark.parametrize("real", [False, True], ids=["memory", "quic"])
@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_a_stage_that_goes_away_in_mid_generation_is_unavailable_soon(stage: int, real: bool) -> None:
    async with open_shards(3, real=real, gateway_settings=LEAVE) as shards:
        generation = shards.engine.generate([1, 2], Sampling(max_tokens=30))
        await anext(generation)
        await shards.transports[stage].close()
        with anyio.fail_after(5), pytest.raises(Unavailable):
            await anext(generation)
        await shards.settled()

"""What every transport promises, on every adapter."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from p2p_world import LIMIT, WORLDS, echo, key, serve_all
from tessera.core import encoding
from tessera.core.errors import (
    Conflict,
    Invalid,
    Late,
    Misbehaviour,
    Missing,
    Refused,
    TesseraError,
    Unavailable,
)
from tessera.core.ids import PeerId
from tessera.p2p import iroh_link, iroh_transport, memory, switchboard, zmq_link, zmq_transport
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.switchboard import hello
from tessera.p2p.transport import PeerRecord, Stream, Transport
from tessera.p2p.versions import PRODUCT, VERSION

Contract = Callable[[Any], Awaitable[None]]


def on_every_adapter(contract: Contract) -> Callable[[Any], None]:
    """The test runs once in each world, in that world's time."""

    def test(world_class: Any) -> None:
        world = world_class()
        world.run(contract)

    test.__doc__ = contract.__doc__
    parametrized = pytest.mark.parametrize("world_class", WORLDS, ids=lambda w: w.name)(test)
    parametrized.__name__ = contract.__name__
    return parametrized


@asynccontextmanager
async def pair(world: Any) -> AsyncIterator[tuple[Transport, Transport]]:
    """A caller and a server of `echo/1` and `answer/1`."""
    async with world.start(key(1)) as caller, world.start(key(2)) as server:
        serve_all(server)
        yield caller, server


async def ask(
    transport: Transport, peer: PeerRecord, body: bytes = b"", wait_s: float = 0, timeout_s: float = 10
) -> bytes:
    reply, back = await call(
        transport, peer, "answer/1", {"wait_s": wait_s}, body, timeout_s=timeout_s, reply_limit=LIMIT
    )
    assert reply["peer"] == transport.id
    return back


@on_every_adapter
async def test_messages_come_back_whole_and_every_byte_is_counted(world: Any) -> None:
    async with pair(world) as (caller, server):
        stream = await caller.open(server.record(), "echo/1", timeout_s=5)
        assert stream.peer == server.id
        before = stream.sent_bytes, stream.received_bytes
        for message in (b"x", b"hello" * 100, bytes(70_000)):
            await stream.send(message)
            assert await stream.recv(LIMIT) == message
        each_way = 3 * 4 + 1 + 500 + 70_000
        assert (stream.sent_bytes, stream.received_bytes) == (before[0] + each_way, before[1] + each_way)
        assert before[0] == 4 + len(hello("echo/1", bulk=False, confirm=True))


@on_every_adapter
async def test_eight_mebibytes_come_back_unchanged(world: Any) -> None:
    message = random.Random(1).randbytes(8 << 20)
    async with pair(world) as (caller, server):
        stream = await caller.open(server.record(), "echo/1", timeout_s=5, bulk=True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.send, message)
            assert await stream.recv(LIMIT) == message


@on_every_adapter
async def test_many_small_messages_keep_their_order(world: Any) -> None:
    async with pair(world) as (caller, server):
        stream = await caller.open(server.record(), "echo/1", timeout_s=5)
        sent = [b"%d" % n * (n % 50 + 1) for n in range(300)]

        async def send_all() -> None:
            for message in sent:
                await stream.send(message)
            await stream.send(b"", last=True)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_all)
            assert [await stream.recv(LIMIT) for _ in sent] == sent
        assert await stream.recv(LIMIT) == b""


@on_every_adapter
async def test_an_end_that_was_said_differs_from_a_cut(world: Any) -> None:
    async def say_two(stream: Stream) -> None:
        await stream.send(b"one")
        await stream.send(b"two", last=True)

    async def break_off(stream: Stream) -> None:
        await stream.send(b"one")
        await stream.recv(9)
        raise Conflict("no more")

    async with pair(world) as (caller, server):
        server.serve("two/1", say_two)
        server.serve("cut/1", break_off)
        stream = await caller.open(server.record(), "two/1", timeout_s=5)
        assert [await stream.recv(9) for _ in range(4)] == [b"one", b"two", b"", b""]
        stream = await caller.open(server.record(), "cut/1", timeout_s=5)
        assert await stream.recv(9) == b"one"
        await stream.send(b"go on")
        with pytest.raises(Unavailable):
            await stream.recv(9)


@on_every_adapter
async def test_empty_messages_and_messages_after_the_last_are_refused_at_home(world: Any) -> None:
    async with pair(world) as (caller, server):
        stream = await caller.open(server.record(), "echo/1", timeout_s=5)
        with pytest.raises(Invalid, match="empty"):
            await stream.send(b"")
        await stream.send(b"x", last=True)
        with pytest.raises(Conflict):
            await stream.send(b"y")
        assert [await stream.recv(9), await stream.recv(9)] == [b"x", b""]


@on_every_adapter
async def test_another_key_at_a_right_address_is_not_accepted(world: Any) -> None:
    async with pair(world) as (caller, server):
        posing = PeerRecord.sign(key(3), server.record().addrs, expires=2**40)
        with pytest.raises(Unavailable) as caught:
            await caller.open(posing, "echo/1", timeout_s=20)
        assert caught.value.fields["peer"] == key(3).id
        await ask(caller, server.record())


@pytest.mark.slow
@on_every_adapter
async def test_a_dead_address_is_unavailable_and_a_short_deadline_is_late(world: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (memory, iroh_transport, zmq_transport):
            patch.setattr(module, "DIAL_S", 1.0)
        async with world.start(key(1)) as caller:
            nobody = PeerRecord.sign(key(3), (world.dead_address(),), expires=1)
            with pytest.raises(Late):
                await caller.open(nobody, "echo/1", timeout_s=0.3)
            with pytest.raises(Unavailable, match="does not answer"):
                await caller.open(nobody, "echo/1", timeout_s=20)


@on_every_adapter
async def test_a_record_that_leads_nowhere_is_invalid(world: Any) -> None:
    async with world.start(key(1)) as caller:
        with pytest.raises(Invalid, match="itself"):
            await caller.open(caller.record(), "echo/1", timeout_s=1)
        with pytest.raises(Invalid, match="address"):
            await caller.open(PeerRecord.sign(key(3), ("carrier:pigeon",), expires=1), "echo/1", timeout_s=1)


@pytest.mark.slow
@on_every_adapter
async def test_a_killed_peer_is_unavailable_within_five_seconds(world: Any) -> None:
    async with world.start(key(1)) as caller, world.doomed(key(2)) as doomed:
        stream = await caller.open(doomed.record, "echo/1", timeout_s=20)
        await stream.send(b"are you there?")
        assert await stream.recv(LIMIT) == b"are you there?"
        failures: list[tuple[float, TesseraError]] = []
        seen: list[str] = []

        async def expect_failure(action: Callable[[], Awaitable[Any]]) -> None:
            try:
                await action()
            except TesseraError as error:
                failures.append((anyio.current_time() - killed, error))

        async def watch() -> None:
            async for state in caller.watch(doomed.record.id):
                seen.append(state)
                if state == "down":
                    return

        async with anyio.create_task_group() as tasks:
            killed = anyio.current_time()
            tasks.start_soon(watch)
            tasks.start_soon(expect_failure, lambda: stream.recv(LIMIT))
            tasks.start_soon(expect_failure, lambda: ask(caller, doomed.record, wait_s=60, timeout_s=60))
            await anyio.sleep(0.3)
            killed = anyio.current_time()
            doomed.kill()
        assert [type(error) for _, error in failures] == [Unavailable, Unavailable]
        assert all(world.silence_s < after <= 5 for after, _ in failures), failures
        assert seen == ["up", "down"]


@pytest.mark.slow
@on_every_adapter
async def test_a_peer_that_restarts_elsewhere_is_found_by_its_new_record(world: Any) -> None:
    async with world.start(key(1)) as caller:
        async with world.doomed(key(2)) as doomed:
            await ask(caller, doomed.record)
            doomed.kill()
            await anyio.sleep(1.1)  # a record's time has whole seconds, and the newest wins
            async with world.start(key(2)) as reborn:
                serve_all(reborn)
                assert reborn.record().addrs != doomed.record.addrs
                started = anyio.current_time()
                assert await ask(caller, reborn.record(), b"again") == b"again"
                assert anyio.current_time() - started < 2
                assert await ask(caller, reborn.record(), b"still") == b"still"


@on_every_adapter
async def test_a_cancelled_call_leaves_the_link_usable(world: Any) -> None:
    async with pair(world) as (caller, server):
        for _ in range(120):  # more than a link has places for streams
            with anyio.move_on_after(0.002):
                await ask(caller, server.record(), bytes(50_000), wait_s=0.05)
        assert await ask(caller, server.record(), b"fine") == b"fine"


@on_every_adapter
async def test_a_cancelled_recv_loses_nothing(world: Any) -> None:
    async with pair(world) as (caller, server):
        stream = await caller.open(server.record(), "echo/1", timeout_s=5)
        with anyio.move_on_after(0.05) as scope:
            await stream.recv(LIMIT)
        assert scope.cancelled_caught
        message = random.Random(2).randbytes(3_000_000)
        got = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.send, message)
            while got is None:
                with anyio.move_on_after(0.003):
                    got = await stream.recv(LIMIT)
        assert got == message


@on_every_adapter
async def test_a_cancelled_send_breaks_its_stream_and_no_other(world: Any) -> None:
    async def ignore(stream: Stream) -> None:
        await anyio.sleep(3600)

    async with pair(world) as (caller, server):
        server.serve("ignore/1", ignore)
        stream = await caller.open(server.record(), "ignore/1", timeout_s=5)
        with anyio.move_on_after(0.3) as scope:
            await stream.send(bytes(32 << 20))
        assert scope.cancelled_caught
        assert stream.sent_bytes < 16 << 20, "a peer that does not read must slow the sender down"
        with pytest.raises(Unavailable):
            await stream.send(b"more")
        assert await ask(caller, server.record(), b"fine") == b"fine"


@on_every_adapter
async def test_abort_wakes_whoever_waits(world: Any) -> None:
    async def ignore(stream: Stream) -> None:
        await anyio.sleep(3600)

    async with pair(world) as (caller, server):
        server.serve("ignore/1", ignore)
        stream = await caller.open(server.record(), "ignore/1", timeout_s=5)
        failures: list[str] = []

        async def fail(action: Awaitable[Any]) -> None:
            try:
                await action
            except Unavailable as error:
                failures.append(error.code)

        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fail, stream.recv(LIMIT))
                tasks.start_soon(fail, stream.send(bytes(32 << 20)))
                await anyio.sleep(0.2)
                await stream.abort()
                await stream.abort()
        assert failures == ["unavailable", "unavailable"]
        with pytest.raises(Unavailable):
            await stream.recv(LIMIT)
        assert await ask(caller, server.record(), b"fine") == b"fine"


@on_every_adapter
async def test_an_oversize_message_is_misbehaviour_with_evidence(world: Any) -> None:
    caught: list[Misbehaviour] = []

    async def take_little(stream: Stream) -> None:
        try:
            await stream.recv(1000)
        except Misbehaviour as error:
            caught.append(error)
            raise

    async with pair(world) as (caller, server):
        server.serve("little/1", take_little)
        stream = await caller.open(server.record(), "little/1", timeout_s=5)
        with pytest.raises(Unavailable):
            await stream.send(bytes(8 << 20))
        assert caught[0].evidence["peer"] == caller.id
        assert (caught[0].evidence["length"], caught[0].evidence["limit"]) == (8 << 20, 1000)
        assert await ask(caller, server.record(), b"fine") == b"fine"


@on_every_adapter
async def test_two_hundred_calls_at_once_are_all_answered(world: Any) -> None:
    async with pair(world) as (caller, server):
        answers: list[bytes] = []

        async def one(number: int) -> None:
            answers.append(await ask(caller, server.record(), b"%d" % number * 100, timeout_s=30))

        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(one, number)
        assert sorted(answers) == sorted(b"%d" % number * 100 for number in range(200))


@on_every_adapter
async def test_an_unknown_protocol_is_missing_however_one_asks(world: Any) -> None:
    async with pair(world) as (caller, server):
        with pytest.raises(Missing, match="does not serve"):
            await caller.open(server.record(), "nothing/1", timeout_s=5)
        with pytest.raises(Missing):
            await call(caller, server.record(), "nothing/1", {}, timeout_s=5, reply_limit=100)
        with pytest.raises(Missing):
            await call(caller, server.record(), "nothing/1", {}, bytes(8 << 20), timeout_s=5, reply_limit=100)
        stream = await caller.open(server.record(), "nothing/1", timeout_s=5, confirm=False)
        with pytest.raises(Missing):
            await stream.recv(100)
        with pytest.raises(Invalid):
            await caller.open(server.record(), "Not A Name", timeout_s=5)


@on_every_adapter
async def test_another_version_of_a_protocol_is_refused_naming_both_and_who_must_upgrade(world: Any) -> None:
    async with pair(world) as (caller, server):
        server.serve("tessera/blob/3", echo)
        for asked, advice in (("tessera/blob/4", "they must upgrade"), ("tessera/blob/2", "upgrade our side")):
            with pytest.raises(Refused) as caught:
                await caller.open(server.record(), asked, timeout_s=5)
            assert caught.value.message == (
                f"they speak tessera/blob/3 ({PRODUCT}), we speak {asked} ({PRODUCT}): {advice}"
            )
            assert caught.value.rule == "version"
            assert caught.value.fields["peer"] == server.id
            with pytest.raises(Refused, match=f"we speak {asked}"):
                await call(caller, server.record(), asked, {}, timeout_s=5, reply_limit=100)
        for other in ("tessera/blob/x", "tessera/blob", "blob/3", "tessera/blob/3/1"):
            with pytest.raises(Missing, match=f"\\({PRODUCT}\\) does not serve"):
                await caller.open(server.record(), other, timeout_s=5)


@on_every_adapter
async def test_another_version_of_the_link_is_refused_in_the_words_of_whoever_asks(world: Any) -> None:
    async with pair(world) as (caller, server):
        with pytest.MonkeyPatch.context() as patch:  # one process speaks both: only the hello is from another time
            for module in (memory, iroh_link, zmq_link):
                patch.setattr(module, "hello", lambda *args, **kinds: _hello_of_tomorrow())
            with pytest.raises(Refused) as caught:
                await caller.open(server.record(), "echo/1", timeout_s=5)
        assert caught.value.message == (
            f"they speak {VERSION} ({PRODUCT}), we speak {VERSION + 1} (tessera 9.1): they must upgrade"
        )
        assert caught.value.fields["theirs"] == VERSION
        await ask(caller, server.record())


def _hello_of_tomorrow() -> bytes:
    return encoding.encode({"product": "tessera 9.1", "version": VERSION + 1, "what": ["else"]})


@pytest.mark.slow
@on_every_adapter
async def test_a_flood_of_streams_hurts_only_whoever_sends_it(world: Any) -> None:
    async def hold(stream: Stream) -> None:
        if await stream.recv(100) == b"hold":
            await anyio.sleep(3600)

    async with pair(world) as (flooder, server), world.start(key(3)) as other:
        server.serve("hold/1", hold, max_streams=4)
        refused: list[TesseraError] = []
        holding: list[Stream] = []

        async def flood() -> None:
            try:
                stream = await flooder.open(server.record(), "hold/1", timeout_s=20)
                await stream.send(b"hold")
                holding.append(stream)
            except TesseraError as error:
                refused.append(error)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(switchboard, "QUEUE_S", 2.5)
            async with anyio.create_task_group() as tasks:
                for _ in range(30):
                    tasks.start_soon(flood)
                await anyio.sleep(0.3)
                with anyio.fail_after(2):
                    stream = await other.open(server.record(), "hold/1", timeout_s=2)
                    await stream.send(b"x", last=True)
                    assert await stream.recv(10) == b""
                    await ask(flooder, server.record())
        assert len(holding) == 4
        assert {type(error) for error in refused} == {Unavailable}
        assert len(refused) == 26


@on_every_adapter
async def test_one_link_serves_both_directions(world: Any) -> None:
    async with pair(world) as (caller, server):
        serve_all(caller)
        await ask(caller, server.record())
        unreachable = PeerRecord.sign(key(1), (world.dead_address(),), expires=2**40)
        assert await ask(server, unreachable, b"back") == b"back"


@on_every_adapter
async def test_peers_that_dial_each_other_at_once_both_get_through(world: Any) -> None:
    async with pair(world) as (a, b):
        serve_all(a)
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(ask, a, b.record(), b"from a")
                tasks.start_soon(ask, b, a.record(), b"from b")
        assert await ask(a, b.record(), b"later") == b"later"
        assert await ask(b, a.record(), b"later") == b"later"


@on_every_adapter
async def test_a_handlers_error_keeps_its_class_and_a_bug_keeps_its_secret(world: Any) -> None:
    async def fail(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if request["how"] == "conflict":
            raise Conflict("somebody was first", winner="late_worker")
        if request["how"] == "fields":
            raise Unavailable("try later", retry_after_s=7.0, value={1, 2})
        if request["how"] == "reply":
            return {"value": object()}, b""
        raise ValueError("the password is tree")

    async with pair(world) as (caller, server):
        serve_calls(server, "fail/1", fail, request_limit=1000)

        async def how(what: str) -> TesseraError:
            with pytest.raises(TesseraError) as caught:
                await call(caller, server.record(), "fail/1", {"how": what}, timeout_s=5, reply_limit=1000)
            return caught.value

        conflict = await how("conflict")
        assert type(conflict) is Conflict
        assert conflict.message == "somebody was first"
        assert conflict.fields == {"winner": "late_worker", "peer": server.id}
        assert type(await how("fields")) is Unavailable
        assert type(await how("reply")) is Invalid
        bug = await how("bug")
        assert type(bug) is TesseraError
        assert "tree" not in str(bug.to_dict())


@on_every_adapter
async def test_calls_keep_to_their_limits(world: Any) -> None:
    async with pair(world) as (caller, server):
        with pytest.raises(Invalid, match="at most"):
            await ask(caller, server.record(), bytes(8 << 20))
        with pytest.raises(Misbehaviour, match="at most"):
            await call(caller, server.record(), "answer/1", {}, bytes(5000), timeout_s=5, reply_limit=4000)
        with pytest.raises(Misbehaviour, match="at most"):
            await call(caller, server.record(), "answer/1", {"pad": "x" * 500}, timeout_s=5, reply_limit=400)
        with pytest.raises(Late):
            await ask(caller, server.record(), wait_s=30, timeout_s=0.3)
        assert await ask(caller, server.record(), b"fine") == b"fine"


@on_every_adapter
async def test_what_was_said_last_arrives_although_the_speaker_leaves(world: Any) -> None:
    message = random.Random(3).randbytes(300_000)
    got: list[bytes] = []

    async def listen(stream: Stream) -> None:
        got.append(await stream.recv(LIMIT))

    async with world.start(key(2)) as server:
        server.serve("listen/1", listen)
        async with world.start(key(1)) as caller:
            stream = await caller.open(server.record(), "listen/1", timeout_s=5)
            await stream.send(message, last=True)
        with anyio.move_on_after(5):
            while not got:
                await anyio.sleep(0.01)
        assert got == [message]


@on_every_adapter
async def test_closing_is_quick_and_ends_everything(world: Any) -> None:
    async with pair(world) as (caller, server):
        stream = await caller.open(server.record(), "echo/1", timeout_s=5)
        ended: list[str] = []

        async def wait() -> None:
            try:
                await stream.recv(LIMIT)
            except Unavailable as error:
                ended.append(error.code)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.sleep(0.1)
            started = anyio.current_time()
            await server.close()
            await server.close()
            assert anyio.current_time() - started < 1
        assert ended == ["unavailable"]
        assert anyio.current_time() - started < 1.5, "a peer that says goodbye is gone at once"
        with pytest.raises(Unavailable, match="closed"):
            await server.open(caller.record(), "echo/1", timeout_s=1)


@on_every_adapter
async def test_a_handlers_work_goes_on_when_the_peer_leaves(world: Any) -> None:
    done = anyio.Event()

    async def work(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        await anyio.sleep(0.5)
        done.set()
        return {}, b""

    async with world.start(key(2)) as server:
        serve_calls(server, "work/1", work, request_limit=100)
        async with world.start(key(1)) as caller:
            with pytest.raises(Late):
                await call(caller, server.record(), "work/1", {}, timeout_s=0.2, reply_limit=100)
        with anyio.fail_after(5):
            await done.wait()


@on_every_adapter
async def test_a_watcher_hears_of_up_and_down(world: Any) -> None:
    seen: list[str] = []

    async def watch(transport: Transport) -> None:
        async for state in transport.watch(key(2).id):
            seen.append(state)

    async with world.start(key(1)) as caller, anyio.create_task_group() as tasks:
        tasks.start_soon(watch, caller)
        for _ in range(2):
            async with world.start(key(2)) as server:
                serve_all(server)
                await ask(caller, server.record())
            await anyio.sleep(0.2)
        tasks.cancel_scope.cancel()
    assert seen == ["down", "up", "down", "up", "down"]


@on_every_adapter
async def test_a_failure_inside_the_body_comes_out_as_itself(world: Any) -> None:
    with pytest.raises(Conflict):
        async with world.start(key(1)):
            raise Conflict("mine")


@on_every_adapter
async def test_a_handler_can_be_replaced_and_a_protocol_needs_a_name_and_places(world: Any) -> None:
    async def shout(stream: Stream) -> None:
        await stream.send((await stream.recv(100)).upper(), last=True)

    async with pair(world) as (caller, server):
        for handler, expected in ((echo, b"hi"), (shout, b"HI")):
            server.serve("say/1", handler)
            stream = await caller.open(server.record(), "say/1", timeout_s=5)
            await stream.send(b"hi")
            assert await stream.recv(100) == expected
            await stream.abort()
        with pytest.raises(Invalid):
            server.serve("Bad Name", echo)
        with pytest.raises(Invalid):
            server.serve("say/1", echo, max_streams=0)

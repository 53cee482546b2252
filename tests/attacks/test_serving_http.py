"""Hostile and broken HTTP clients: nothing is served wrongly, nothing is kept, nothing is a 500."""

from __future__ import annotations

import json
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest

from tessera.serving.engine import FakeEngine
from tessera.serving.envelope import CutOff
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import FakePayments, Free, Usage
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio
MODEL = "m"
ROUTES = ("/v1/completions", "/v1/chat/completions")


class RawClient:
    """Speaks ASGI itself, so that it can dawdle, lie and hang up."""

    def __init__(self, app: Any, chunks: list[bytes], *, stall: bool = False, hang_up_after: int | None = None) -> None:
        self._app = app
        self._chunks = chunks
        self._stall = stall
        self._hang_up_after = hang_up_after
        self._gone = anyio.Event()
        self.bodies: list[bytes] = []
        self.status = 0

    async def post(self, path: str, headers: dict[str, str] | None = None) -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": "POST", "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "server": ("gateway", 80), "client": ("1.2.3.4", 5),
            "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        }  # fmt: skip
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._chunks:
            body = self._chunks.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(self._chunks) or self._stall}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def hang_up(self) -> None:
        self._gone.set()

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.bodies.append(message.get("body", b""))
        if self._hang_up_after is not None and len(self.bodies) >= self._hang_up_after:
            self.hang_up()
            await anyio.lowlevel.checkpoint()


def make_app(engine: FakeEngine | None = None, payments: FakePayments | None = None, **settings: Any) -> Any:
    model = LocalModel(MODEL, engine or FakeEngine(), CharTokenizer())
    return create_app(GatewayConfig(**settings), [model], [payments or Free()])


def body(**changes: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "abc", "max_tokens": 100} | changes).encode()


async def answer(app: Any, content: bytes, path: str = ROUTES[0], **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://g") as client:
        return await client.post(path, content=content, headers=headers)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"{}", b'{"model":1}', b"[" * 50_000, b'{"a":' * 30_000,
     b'{"model":"m","prompt":NaN}', b'{"model":"m","prompt":"x","temperature":1e999}', b'{"model":"m","prompt":[1e3]}',
     b'{"model":"m","messages":[]}', b'{"model":"m","messages":[{"role":"tool","content":"x"}]}',
     b'{"model":"m","prompt":"x","max_tokens":99999999999999999999999999}', b'{"model":"m","prompt":{"a":1}}',
     b'{"model":"m","messages":[{"role":"user","content":[{"type":"image_url"}]}]}', b'{"model":"m","prompt":[]}'],
)  # fmt: skip
async def test_malformed_bodies_are_a_400_in_the_envelope(path: str, content: bytes) -> None:
    response = await answer(make_app(), content, path)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_an_announced_oversize_body_is_not_read() -> None:
    client = RawClient(make_app(max_body_bytes=100), [], stall=True)
    with anyio.fail_after(5):
        await client.post(ROUTES[0], {"content-length": "101"})
    assert client.status == 413


async def test_an_unannounced_oversize_body_is_cut_at_the_limit() -> None:
    client = RawClient(make_app(max_body_bytes=100), [b"x" * 60] * 50, stall=True)
    with anyio.fail_after(5):
        await client.post(ROUTES[0])
    assert client.status == 413
    assert len(client._chunks) == 48


async def test_a_body_that_dawdles_is_a_408_and_takes_no_place() -> None:
    engine = FakeEngine()
    client = RawClient(make_app(engine, body_timeout_s=0.05), [b'{"model":'], stall=True)
    with anyio.fail_after(5):
        await client.post(ROUTES[0])
    assert client.status == 408
    assert engine.started == 0


async def test_a_client_that_leaves_during_its_body_is_no_error() -> None:
    client = RawClient(make_app(), [b"{"], stall=True)
    client.hang_up()
    with anyio.fail_after(5):
        await client.post(ROUTES[0])
    assert client.status in (0, 499)


async def test_hanging_up_in_mid_stream_frees_the_session_and_the_place() -> None:
    engine = FakeEngine(delay_s=0.001)
    payments = FakePayments({"c1"})
    app = make_app(engine, payments, max_concurrent=1)
    client = RawClient(app, [body(stream=True)], hang_up_after=5)
    with anyio.fail_after(5):
        await client.post(ROUTES[0], {"PAYMENT-SIGNATURE": "c1"})
    assert engine.open == 0
    assert engine.produced < 20
    assert payments.held == set()
    assert payments.owed == {}
    assert payments.metered == [Usage(3, engine.produced)]
    assert (await answer(app, b"")).status_code == 400
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://g") as http:
        assert (await http.get("/healthz")).json()["active"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_before_the_answer_frees_everything_and_costs_nothing(stream: bool) -> None:
    engine = FakeEngine(delay_s=5.0)
    payments = FakePayments({"c1"})
    client = RawClient(make_app(engine, payments), [body(stream=stream)])
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(client.post, ROUTES[0], {"PAYMENT-SIGNATURE": "c1"})
            while not engine.open:
                await anyio.sleep(0.001)
            client.hang_up()
    assert (engine.open, payments.settled, payments.held) == (0, [], set())


async def test_a_client_that_leaves_while_the_money_moves_may_come_again() -> None:
    class SlowPayments(FakePayments):
        moving = anyio.Event()

        async def hold(self, request: Any) -> Any:
            hold = await super().hold(request)
            start = hold.start

            async def slow() -> dict[str, str]:
                self.moving.set()
                await anyio.sleep(0.05)
                return await start()

            hold.start = slow  # type: ignore[method-assign]
            return hold

    payments = SlowPayments({"c1"})
    app = make_app(payments=payments)
    client = RawClient(app, [body()])
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(client.post, ROUTES[0], {"PAYMENT-SIGNATURE": "c1"})
            await payments.moving.wait()
            client.hang_up()
    assert payments.settled == ["c1"]
    again = await answer(app, body(), **{"PAYMENT-SIGNATURE": "c1"})
    assert again.status_code == 200
    assert payments.settled == ["c1"]
    assert (await answer(app, body(), **{"PAYMENT-SIGNATURE": "c1"})).status_code == 402


async def test_a_stream_whose_client_left_before_the_first_event_is_owed() -> None:
    payments = FakePayments({"c1"})
    app = make_app(payments=payments)

    class Leaver(RawClient):
        async def _send(self, message: Any) -> None:
            self.hang_up()
            await anyio.sleep_forever()

    with anyio.fail_after(5):
        await Leaver(app, [body(stream=True)]).post(ROUTES[0], {"PAYMENT-SIGNATURE": "c1"})
    assert payments.settled == ["c1"]
    again = await answer(app, body(stream=True), **{"PAYMENT-SIGNATURE": "c1"})
    assert again.text.endswith("data: [DONE]\n\n")
    assert payments.settled == ["c1"]


async def test_a_reader_that_stops_reading_is_cut_off() -> None:
    engine = FakeEngine(context=10_000)

    class Stuck(RawClient):
        async def _send(self, message: Any) -> None:
            await super()._send(message)
            if len(self.bodies) == 3:
                await anyio.sleep_forever()

    client = Stuck(make_app(engine, answer_timeout_s=0.05), [body(stream=True, max_tokens=9_000)])
    with anyio.fail_after(5):
        await client.post(ROUTES[0])
    assert engine.open == 0


async def test_one_coin_sent_many_times_at_once_pays_once_and_is_served_once() -> None:
    payments = FakePayments({"c1"})
    engine = FakeEngine(delay_s=0.001)
    app = make_app(engine, payments, max_concurrent=100)
    statuses: list[int] = []

    async def replay() -> None:
        statuses.append((await answer(app, body(max_tokens=5), **{"PAYMENT-SIGNATURE": "c1"})).status_code)

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(replay)
    assert sorted(statuses) == [200] + [402] * 19
    assert payments.settled == ["c1"]


async def test_a_prompt_never_reaches_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(fail_after=1, error=RuntimeError("my secret prompt"))
    await answer(make_app(engine), body(prompt="my secret prompt"))
    with pytest.raises(CutOff):
        await answer(make_app(engine), body(prompt="my secret prompt", stream=True, n=2))
    captured = capsys.readouterr()
    assert "request_failed" in captured.out + captured.err
    assert "secret" not in captured.out + captured.err

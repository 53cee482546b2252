"""What the operator sees: counts and spans of bounded names, and never a word of what was said, nor a key."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from opentelemetry import trace

from serving_upstream import SECRET, FakeUpstream, make_upstream
from tessera.cli.logs import forget_logs
from tessera.core.errors import Unavailable
from tessera.serving import observing
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import FakePayments, Free
from tessera.serving.paying.keys import OperatorKeys
from tessera.serving.text import CharTokenizer
from tessera.serving.upstreams import upstream

pytestmark = pytest.mark.anyio
MARKER = "xyzzy-the-marker"


def make_client(engine: FakeEngine, *models: Any, ways: Any = None) -> httpx.AsyncClient:
    app = create_app(GatewayConfig(), [LocalModel("ours", engine, CharTokenizer()), *models], ways or [Free()])
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


def lines(text: str) -> dict[str, float]:
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def test_requests_tokens_and_times_are_counted_by_route_and_model() -> None:
    async with make_client(FakeEngine()) as client:
        for stream in (False, True):
            asked = {"model": "ours", "prompt": "abc", "max_tokens": 5, "stream": stream}
            await client.post("/v1/completions", json=asked)
        await client.post("/v1/completions", json={"model": "no such model", "prompt": "x"})
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = lines(response.text)
    labels = '{model="ours",route="/v1/completions"'
    assert found[f'tessera_gateway_requests_total{labels},status="200"}}'] == 2
    assert found['tessera_gateway_requests_total{model="",route="/v1/completions",status="404"}'] == 1
    assert found['tessera_gateway_tokens_total{kind="prompt",model="ours"}'] == 6
    assert found['tessera_gateway_tokens_total{kind="completion",model="ours"}'] == 10
    assert found[f"tessera_gateway_duration_seconds_count{labels}}}"] == 2
    assert found[f"tessera_gateway_first_byte_seconds_count{labels}}}"] == 2
    assert found["tessera_gateway_active_answers"] == 0


async def test_no_caller_can_make_a_new_series() -> None:
    async with make_client(FakeEngine()) as client:
        for number in range(50):
            await client.get(f"/{MARKER}/{number}")
            await client.get(f"/v1/models/{MARKER}-{number}")
            await client.request(f"M{number}", "/v1/completions")
            await client.post("/v1/completions", json={"model": f"{MARKER}-{number}", "prompt": "x"})
        text = (await client.get("/metrics")).text
    assert MARKER not in text
    assert len([name for name in lines(text) if name.startswith("tessera_gateway_requests_total")]) == 4


class Span(trace.NonRecordingSpan):
    """Keeps what it is told."""

    def __init__(self, tracer: Tracer, name: str, context: trace.SpanContext) -> None:
        super().__init__(context)
        self.name, self.attributes, self.status = name, dict[str, Any](), trace.StatusCode.UNSET
        tracer.spans.append(self)

    def is_recording(self) -> bool:
        return True

    def set_attribute(self, key: str, value: Any) -> None:
        self.attributes[key] = value

    def set_status(self, status: Any, description: str | None = None) -> None:
        self.status = status

    def record_exception(self, exception: BaseException, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("an exception's message could quote a prompt")


class Tracer(trace.NoOpTracer):
    """A working tracer without an SDK."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def start_as_current_span(self, name: str, context: Any = None, *args: Any, **kwargs: Any) -> Iterator[Span]:
        parent = trace.get_current_span(context).get_span_context()
        own = trace.SpanContext(parent.trace_id or 7, len(self.spans) + 1, False, trace.TraceFlags(1))
        span = Span(self, name, own)
        assert kwargs["record_exception"] is False
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            yield span


async def test_a_span_tells_model_and_tokens_and_goes_on_at_the_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer, fake = Tracer(), FakeUpstream()
    monkeypatch.setattr(observing.trace, "get_tracer", lambda *names: tracer)
    async with make_client(FakeEngine(), make_upstream(fake)) as client:
        asked = {"model": "m", "messages": [{"role": "user", "content": MARKER}]}
        parent = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
        await client.post("/v1/chat/completions", json=asked, headers={"traceparent": parent})
        await client.get(f"/{MARKER}")
    chat, other = tracer.spans
    assert chat.name == "chat"
    assert chat.attributes == {
        "http.response.status_code": 200, "gen_ai.operation.name": "chat", "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 2, "gen_ai.usage.output_tokens": 5,
    }  # fmt: skip
    assert fake.asked[0].headers["traceparent"] == "00-" + "ab" * 16 + "-" + f"{1:016x}" + "-01"
    assert (other.name, other.attributes) == ("GET other", {"http.response.status_code": 404})
    assert upstream.PROPAGATOR.fields == {"traceparent", "tracestate"}  # no baggage: that is a caller's own words


async def test_prompts_answers_and_keys_reach_no_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    forget_logs()  # a handler of a test before, whose stream is closed, would print the whole error beside
    caplog.set_level(logging.DEBUG)
    key = "operator-key-" + MARKER
    fake = FakeUpstream(pieces=[MARKER], faults={"one": 500})
    broken = [FakeEngine(fail_after=2, error=error) for error in (RuntimeError(MARKER), Unavailable("stage 1 is gone"))]
    for engine in (FakeEngine(), *broken):
        async with make_client(
            engine, make_upstream(fake), ways=[OperatorKeys([key]), FakePayments({MARKER})]
        ) as client:
            for model in ("ours", "m", MARKER):
                for change in ({}, {"stream": True}, {"n": 2}, {"user": MARKER}, {"logit_bias": MARKER}):
                    for headers in ({"authorization": f"Bearer {key}"}, {"payment-signature": MARKER}, {}):
                        asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": MARKER}]}
                        await client.post("/v1/chat/completions", content=json.dumps(asked | change), headers=headers)
    logged = "".join(capsys.readouterr()) + "".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("tessera", "uvicorn"))
    )
    assert "upstream_failed" in logged
    assert "request_failed" in logged
    assert MARKER not in logged
    assert SECRET not in logged

"""What an operator may see of the gateway: Prometheus metrics and OpenTelemetry spans, and never what was said.

Labels and attributes hold routes, ids of served models, statuses and counts: no prompt, no answer, no key, no address,
and no value that a caller can make up, so that their number is bounded. Metrics are of this process. Spans go through
OpenTelemetry's API: without an SDK, which an operator installs, they cost nothing to speak of.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessera import __version__
from tessera.serving.paying.charging import Usage

__all__ = ["METRICS_TYPE", "Metrics", "Note", "Observed", "note_of"]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NOTE = "tessera.note"
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
ROUTES = frozenset(
    (*OPERATIONS, "/v1/models", "/v1/credit", "/v1/sign-in", "/v1/rights", "/healthz", "/healthz/ready", "/metrics",
     "/openapi.json")
)  # fmt: skip
DURATIONS_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(slots=True)
class Note:
    """What a route learns about its request. `model` is a served model's id, or nothing."""

    model: str = ""
    usage: Usage | None = None
    status: int = 0
    first_s: float | None = field(default=None)


def note_of(scope: Scope) -> Note:
    note = scope.get(NOTE)
    return note if isinstance(note, Note) else Note()


class Metrics:
    """One gateway's counters.

    Args:
        active: how many answers are in the making.
    """

    def __init__(self, active: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ("route", "model")
        self._requests = Counter(
            "tessera_gateway_requests", "Requests answered.", (*labels, "status"), registry=registry
        )
        self._duration = Histogram(
            "tessera_gateway_duration_seconds",
            "From the head of a request to the last byte of its answer.",
            labels,
            buckets=DURATIONS_S,
            registry=registry,
        )
        self._first = Histogram(
            "tessera_gateway_first_byte_seconds",
            "From the head of a request to the first byte of its answer.",
            labels,
            buckets=DURATIONS_S,
            registry=registry,
        )
        self._tokens = Counter(
            "tessera_gateway_tokens", "Tokens metered, prompt or completion.", ("model", "kind"), registry=registry
        )
        Gauge("tessera_gateway_active_answers", "Answers in the making.", registry=registry).set_function(active)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def count(self, route: str, note: Note, seconds: float) -> None:
        self._requests.labels(route, note.model, str(note.status)).inc()
        self._duration.labels(route, note.model).observe(seconds)
        if note.first_s is not None:
            self._first.labels(route, note.model).observe(note.first_s)
        if note.usage is not None:
            self._tokens.labels(note.model, "prompt").inc(note.usage.prompt_tokens)
            self._tokens.labels(note.model, "completion").inc(note.usage.completion_tokens)


class Observed:
    """ASGI middleware: counts each request of `app`, and makes its span."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = trace.get_tracer("tessera.serving", __version__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        note = scope[NOTE] = Note()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
            elif note.first_s is None and message.get("body"):
                note.first_s = time.perf_counter() - begun
            await send(message)

        route = _route(scope["path"])
        parent = PROPAGATOR.extract({name: _header(scope, name) for name in ("traceparent", "tracestate")})
        operation = OPERATIONS.get(route, "")
        name = operation or f"{scope['method'] if scope['method'] in ('GET', 'POST') else '?'} {route}"
        with self._tracer.start_as_current_span(
            name, parent, trace.SpanKind.SERVER, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                await self._app(scope, receive, watched)
            finally:
                self._metrics.count(route, note, time.perf_counter() - begun)
                if span.is_recording():
                    _describe(span, operation, note)


def _describe(span: trace.Span, operation: str, note: Note) -> None:
    span.set_attribute("http.response.status_code", note.status)
    if note.status >= 500 or not note.status:
        span.set_status(trace.StatusCode.ERROR)
    if not operation:
        return
    span.set_attribute("gen_ai.operation.name", operation)
    span.set_attribute("gen_ai.request.model", note.model)
    if note.usage is not None:
        span.set_attribute("gen_ai.usage.input_tokens", note.usage.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", note.usage.completion_tokens)


def _route(path: str) -> str:
    if path in ROUTES:
        return path
    return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"


def _header(scope: Scope, name: str) -> str:
    wanted = name.encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == wanted), "")

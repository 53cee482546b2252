"""A model behind a URL: vLLM, SGLang, Ollama or a hosted API, under the same payment, limits and count as our own.

Invariants: what passes is streamed on as it comes, an event at a time and never more than one held; leaving closes the
upstream's call; another target is tried before the first byte only; no header and no key of an upstream reaches the
caller, and no header of the caller reaches an upstream; what an upstream says went wrong on its side is a 503 or 504.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import structlog
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Invalid, Late, TesseraError, Unavailable
from tessera.serving.answers import closed, event, json_bytes, usage_object
from tessera.serving.paying.charging import Usage
from tessera.serving.upstreams.metering import Encoder, Meter
from tessera.serving.upstreams.outgoing import HttpPoster, HungUp, Poster, Reply
from tessera.serving.upstreams.passing import Passed, check_passing
from tessera.serving.upstreams.sse import Events
from tessera.serving.work import Kind, Work

__all__ = ["Target", "Upstream", "UpstreamConfig"]

log = structlog.get_logger()

ROUTES: Mapping[Kind, str] = {"chat": "/chat/completions", "completion": "/completions", "embedding": "/embeddings"}
CALLERS_FAULT = frozenset((400, 413, 422))  # the same anywhere: no other target is tried
MAX_COMPLAINT = 500  # characters of an upstream's complaint that are passed on
COMPLAINT_BYTES = 64 << 10
PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class Target:
    """One server that answers for a model."""

    url: str  # up to and with `/v1`
    model: str = ""  # what it calls the model; empty = as we do
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """Limits towards one model's targets. Times in seconds."""

    context: int | None = None  # told to callers; the upstream is who checks it
    default_max_tokens: int = 1_024  # when the request names none
    max_tokens: int = 32_768  # more is refused, for each choice
    connect_timeout_s: float = 5.0
    byte_timeout_s: float = 60.0  # for the first byte of an answer, and between two
    max_answer_bytes: int = 16 << 20
    max_event_bytes: int = 1 << 20  # one server-sent event
    max_connections: int = 1_000
    rest_s: float = 10.0  # a target that failed is asked after the others for so long


class Upstream:
    """A served model whose targets are asked in order.

    Args:
        tokenizer: the model's, where it is known: then we can count ourselves.
        poster: for tests; by default the network.
    """

    def __init__(
        self,
        model_id: str,
        targets: Sequence[Target],
        config: UpstreamConfig | None = None,
        *,
        tokenizer: Encoder | None = None,
        clock: Clock | None = None,
        poster: Poster | None = None,
    ) -> None:
        if not targets:
            raise Invalid(f"the upstream of {model_id} has no target")
        for target in targets:
            url = urlsplit(target.url)
            if url.scheme not in ("http", "https") or not url.hostname or url.password or url.username:
                raise Invalid("an upstream's URL is http(s)://host/v1 without a user or a password")
        self.id = model_id
        self.config = config or UpstreamConfig()
        self._targets = tuple(targets)
        self._tokenizer = tokenizer
        self._clock = clock or SystemClock()
        self._resting: dict[Target, float] = {}
        self._poster = poster or HttpPoster(
            connect_timeout_s=self.config.connect_timeout_s,
            byte_timeout_s=self.config.byte_timeout_s,
            max_connections=self.config.max_connections,
        )

    @property
    def context(self) -> int | None:
        return self.config.context

    @property
    def ready(self) -> bool:
        """Whether some target has not just failed."""
        return any(self._rested(target) for target in self._targets)

    async def plan(self, kind: Kind, data: Mapping[str, Any]) -> Work:
        """See `ServedModel.plan`."""
        asked = check_passing(
            kind, data, default_tokens=self.config.default_max_tokens, most_tokens=self.config.max_tokens
        )
        return _Passing(self, ROUTES[kind], asked, Meter(asked, self._tokenizer))

    async def aclose(self) -> None:
        await self._poster.aclose()

    async def call(self, route: str, body: Mapping[str, Any], held: ExitStack) -> Reply:
        """The first good answer of a target, its body unread; closed with `held`, like every other.

        Raises: Invalid when the request is at fault; Unavailable or Late when no target answers.
        """
        problem: TesseraError = Unavailable("no upstream")
        for target in sorted(self._targets, key=lambda target: not self._rested(target)):
            try:
                reply = await self._ask(target, route, body, held)
            except (Unavailable, Late) as error:
                self._resting[target] = self._clock.time() + self.config.rest_s
                log.warning("upstream_failed", model=self.id, host=urlsplit(target.url).hostname, reason=error.message)
                problem = error
            else:
                self._resting.pop(target, None)
                return reply
        raise problem

    def _rested(self, target: Target) -> bool:
        return self._resting.get(target, 0.0) <= self._clock.time()

    async def _ask(self, target: Target, route: str, body: Mapping[str, Any], held: ExitStack) -> Reply:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if target.api_key:
            headers["authorization"] = f"Bearer {target.api_key}"
        PROPAGATOR.inject(headers)
        try:
            content = json.dumps(dict(body, model=target.model or self.id), allow_nan=False).encode()
        except ValueError:
            raise Invalid("the body holds a number that JSON cannot carry", reason="invalid_value") from None
        url = target.url.rstrip("/") + route
        try:
            reply = await self._poster.post(url, headers, content)
        except HungUp:
            reply = await self._poster.post(url, headers, content)
        held.callback(reply.close)
        if reply.status != 200:
            raise await self._complaint(reply, target)
        if reply.headers.get("content-encoding", "identity") != "identity":
            raise Unavailable("the upstream answered in an encoding that was not asked for")
        return reply

    async def _complaint(self, reply: Reply, target: Target) -> TesseraError:
        """What went wrong: in the upstream's words only where the caller can do something about it."""
        status = reply.status
        if status not in CALLERS_FAULT:
            wait_s = reply.headers.get("retry-after", "")
            retry_after_s = min(float(wait_s), 3_600.0) if wait_s.isdecimal() and len(wait_s) < 6 else 1.0
            return Unavailable(f"the upstream answered {status}", retry_after_s=retry_after_s)
        try:
            told = json.loads(await _read(reply, COMPLAINT_BYTES))
        except (TesseraError, ValueError, RecursionError):
            told = None
        error = told.get("error", told) if isinstance(told, dict) else None
        said = error.get("message") if isinstance(error, dict) else error
        message = said[:MAX_COMPLAINT] if isinstance(said, str) else f"the upstream answered {status}"
        for secret in (target.api_key, target.url):
            message = message.replace(secret, "…") if secret else message
        param, code = (error.get("param"), error.get("code")) if isinstance(error, dict) else (None, None)
        return Invalid(
            message,
            param=param[:100] if isinstance(param, str) else None,
            reason=code[:100] if isinstance(code, str) else "invalid_value",
        )


class _Passing:
    """One request to an upstream."""

    def __init__(self, upstream: Upstream, route: str, asked: Passed, meter: Meter) -> None:
        self._upstream = upstream
        self._route = route
        self._asked = asked
        self._meter = meter
        self._held = ExitStack()
        self._closings: dict[int, dict[str, Any]] = {}
        self._events = self._run()
        self.prompt_tokens = asked.prompt_limit
        self.max_tokens = asked.token_limit
        self.choices = asked.choices
        self.stream = asked.stream

    def usage(self) -> Usage:
        return self._meter.usage()

    async def whole(self) -> bytes:
        reply = await self._upstream.call(self._route, self._asked.body, self._held)
        answer = _object(await _read(reply, self._upstream.config.max_answer_bytes))
        if not isinstance(answer.get("choices" if self.max_tokens else "data"), list):
            raise Unavailable("the upstream's answer holds no choices")
        self._meter.report(answer.get("usage"))
        self._meter.see(answer.get("choices"), streamed=False)
        usage = usage_object(self.usage())
        if not self.max_tokens:
            del usage["completion_tokens"]
        return json_bytes(answer | {"model": self._upstream.id, "usage": usage})

    def events(self) -> AsyncGenerator[bytes, None]:
        return self._events

    async def aclose(self) -> None:
        await self._events.aclose()
        self._held.close()

    async def _run(self) -> AsyncGenerator[bytes, None]:
        config = self._upstream.config
        reply = await self._upstream.call(self._route, self._asked.body, self._held)
        parser = Events(config.max_event_bytes)
        size, done = 0, False
        async with aclosing(reply.chunks()) as chunks:
            async for chunk in chunks:
                size += len(chunk)
                if size > config.max_answer_bytes:
                    raise Unavailable(f"the upstream sent more than {config.max_answer_bytes} bytes")
                passed = []
                for data in parser.feed(chunk):
                    done = data == b"[DONE]"
                    if done:
                        break
                    passed.append(self._pass(_object(data)))
                yield b"".join(passed)
        # An upstream that knows no `n` makes one choice, and is whole with it.
        if not self._closings or (len(self._closings) < self._asked.choices and not done):
            raise Unavailable("the upstream's stream ended before its answer")

    def ending(self, paid: Mapping[str, str]) -> bytes:
        ending = closed(list(self._closings.values()), paid)
        if self._asked.include_usage:
            last = next(reversed(self._closings.values()))
            ending += event(last | {"choices": [], "usage": usage_object(self.usage())})
        return ending

    def _pass(self, chunk: dict[str, Any]) -> bytes:
        """One event as the caller gets it now. What tells usage or closes a choice is kept for the end."""
        choices = chunk.get("choices", [])
        if chunk.get("error") is not None or not isinstance(choices, list):
            raise Unavailable("the upstream broke off its answer")
        self._meter.report(chunk.get("usage"))
        self._meter.see(choices, streamed=True)
        if not choices:
            return b""
        chunk["model"] = self._upstream.id
        if "usage" in chunk:
            chunk["usage"] = None
        going = []
        for choice in choices:
            if isinstance(choice, dict) and choice.get("finish_reason") is not None:
                self._close(choice.get("index", 0), chunk | {"choices": [choice]})
            else:
                going.append(choice)
        return event(chunk | {"choices": going}) if going else b""

    def _close(self, index: object, chunk: dict[str, Any]) -> None:
        if not isinstance(index, int) or not 0 <= index < self._asked.choices or index in self._closings:
            raise Unavailable("the upstream closed a choice that is not open")
        self._closings[index] = chunk


def _object(data: bytes) -> dict[str, Any]:
    """Raises: Unavailable for what is no JSON object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Unavailable("the upstream's answer is not a JSON object")
    return value


async def _read(reply: Reply, limit: int) -> bytes:
    """The whole body. Raises: Unavailable over `limit` bytes or when it breaks; Late when it stalls."""
    body = bytearray()
    async with aclosing(reply.chunks()) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > limit:
                raise Unavailable(f"the upstream sent more than {limit} bytes")
    return bytes(body)

"""The OpenAI-compatible gateway: routes, checks in the right order, payment around the work.

The order for every completion: body, parameters, length against the context, a free slot, payment held, work,
settlement, answer; what is metered is settled when the answer ends. So a request that could not be served is refused
before anybody pays, and an unpaid request costs no work. Prompts and completions are never logged.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tessera import __version__
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Invalid, Late, Missing, TesseraError, Unavailable
from tessera.core.hashing import sha256
from tessera.serving import envelope, streams
from tessera.serving.answers import DONE, Answer, event, model_card
from tessera.serving.charging import API_KEY_HEADER, PAYMENT_HEADER, Charge, PaidRequest, Payments, Usage
from tessera.serving.engine import Engine, Sampling
from tessera.serving.schemas import ChatRequest, CompletionRequest, parse_body
from tessera.serving.text import Generation, TextTokenizer, flatten_chat

__all__ = ["GatewayConfig", "create_app"]

log = structlog.get_logger()

CLIENT_CLOSED = 499  # nobody reads it; the access log does


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """How the gateway behaves. Times in seconds."""

    model: str  # the id that requests name
    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 10.0
    max_concurrent: int = 8  # generations at once; more get 503
    retry_after_s: float = 1.0
    default_max_tokens: int = 128  # when the request names none and the context has room
    default_temperature: float = 1.0
    token_timeout_s: float = 60.0  # for the first token, and between two
    answer_timeout_s: float = 300.0  # for everything, a slow reader included
    stop_tokens: tuple[int, ...] = ()  # token ids that end every generation, such as the tokenizer's end of text
    public_url: str = ""  # scheme and host that buyers see, for the payment offer; empty = as requested


def create_app(
    config: GatewayConfig,
    engine: Engine,
    tokenizer: TextTokenizer,
    ways: Sequence[Payments],
    *,
    clock: Clock | None = None,
) -> FastAPI:
    """The gateway as an ASGI app; other parts may mount more routes on it.

    Args:
        ways: to pay, in the order in which they are tried; `Free()` serves anybody for nothing.

    Raises: Invalid when nobody could use it, because there is no way to pay.
    """
    gateway = _Gateway(config, engine, tokenizer, ways, clock or SystemClock())
    app = FastAPI(title="Tessera gateway", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    envelope.install(app)
    app.add_api_route("/healthz", gateway.health, methods=["GET"])
    app.add_api_route("/v1/models", gateway.models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", gateway.model, methods=["GET"])
    for kind, route in ((CompletionRequest, gateway.completions), (ChatRequest, gateway.chat)):
        app.add_api_route(kind.route, route, methods=["POST"], response_model=None, openapi_extra=_body_schema(kind))
    return app


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request that can be served: everything is checked but the payment."""

    prompt: list[int]
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    answer: Answer


class _Gateway:
    def __init__(
        self, config: GatewayConfig, engine: Engine, tokenizer: TextTokenizer, ways: Sequence[Payments], clock: Clock
    ) -> None:
        if not ways:
            raise Invalid("a gateway needs a way to pay; Free() serves anybody for nothing")
        self._config = config
        self._engine = engine
        self._tokenizer = tokenizer
        self._ways = tuple(ways)
        self._clock = clock
        self._created = int(clock.time())
        self._active = 0

    async def health(self) -> dict[str, Any]:
        capacity = self._config.max_concurrent
        return {"status": "ok", "model": self._config.model, "active": self._active, "capacity": capacity}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def model(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return self._card()

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest)

    async def _answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        try:
            body = await streams.read_body(
                request, limit=self._config.max_body_bytes, timeout_s=self._config.body_timeout_s
            )
            plan = self._plan(parse_body(kind, body))
            async with AsyncExitStack() as held:
                charge = await self._admit(plan, request, body, held)
                generation = Generation(self._engine, self._tokenizer, plan.prompt, plan.sampling, plan.stops)
                held.push_async_callback(_settle_cancelled, charge, generation)
                held.push_async_callback(_free, generation)
                if not plan.stream:
                    return await streams.unless_gone(request.receive, lambda: self._whole(plan, generation, charge))
                first, headers = await streams.unless_gone(request.receive, lambda: self._begin(generation, charge))
                events = self._events(plan, generation, charge, first)
                return streams.EventStream(
                    events,
                    held.pop_all(),
                    headers=headers,
                    timeout_s=self._config.answer_timeout_s,
                    undelivered=charge.owe,
                )
        except streams.ClientGone:
            return Response(status_code=CLIENT_CLOSED)

    def _plan(self, asked: ChatRequest | CompletionRequest) -> _Plan:
        self._check_model(asked.model)
        prompt = self._prompt(asked)
        temperature = self._config.default_temperature if asked.temperature is None else asked.temperature
        sampling = Sampling(
            temperature=temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed % 2**63,
            max_tokens=self._token_limit(len(prompt), asked.token_limit),
            stop=self._config.stop_tokens,
        )
        chat = isinstance(asked, ChatRequest)
        name = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        answer = Answer(name, self._config.model, int(self._clock.time()), chat, asked.include_usage)
        if asked.stream_options is not None and not asked.stream:
            raise Invalid("stream_options needs stream: true", param="stream_options", reason="invalid_value")
        return _Plan(prompt, sampling, asked.stops, bool(asked.stream), answer)

    def _prompt(self, asked: ChatRequest | CompletionRequest) -> list[int]:
        if isinstance(asked, ChatRequest):
            name, prompt = "messages", self._encode(flatten_chat([(m.role, m.text) for m in asked.messages]))
        else:
            name, prompt = "prompt", self._completion_prompt(asked.prompt)
        if not prompt:
            raise Invalid(f"{name} holds no text to continue", param=name, reason="invalid_value")
        return prompt

    def _completion_prompt(self, prompt: str | Sequence[Any]) -> list[int]:
        if isinstance(prompt, str):
            return self._encode(prompt)
        if prompt and not isinstance(prompt[0], int):
            return self._completion_prompt(prompt[0])
        ids = list(prompt)
        if any(not 0 <= token < self._tokenizer.vocab_size for token in ids):
            limit = self._tokenizer.vocab_size
            raise Invalid(f"token ids run from 0 to {limit - 1}", param="prompt", reason="invalid_value")
        return ids

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Invalid("the prompt holds a lone surrogate: it is not text", reason="invalid_value") from None
        return self._tokenizer.encode(text)

    def _token_limit(self, prompt: int, asked: int | None) -> int:
        room = self._engine.context - prompt
        wanted = min(self._config.default_max_tokens, max(room, 1)) if asked is None else asked
        if wanted > room:
            raise Invalid(
                f"the model's context is {self._engine.context} tokens; the prompt has {prompt} and "
                f"{wanted} were asked for",
                param="max_tokens" if prompt < self._engine.context else "prompt",
                reason="context_length_exceeded",
            )
        return wanted

    def _check_model(self, model: str) -> None:
        if model != self._config.model:
            raise Missing(
                f"the model {model[:200]!r} is not served here; {self._config.model!r} is",
                param="model",
                reason="model_not_found",
            )

    async def _admit(self, plan: _Plan, request: Request, body: bytes, held: AsyncExitStack) -> Charge:
        """Takes a place and the payment. Both are given back when `held` closes."""
        held.enter_context(self._slot())
        paid = PaidRequest(
            (self._config.public_url.rstrip("/") or str(request.base_url).rstrip("/")) + request.url.path,
            sha256(request.url.path.encode(), b"\0", body),
            {name: request.headers[name] for name in (PAYMENT_HEADER, API_KEY_HEADER) if name in request.headers},
            self._config.model,
            len(plan.prompt),
            plan.sampling.max_tokens,
        )
        for way in self._ways:
            if (hold := await way.hold(paid)) is not None:
                charge = Charge(hold)
                held.push_async_callback(charge.release)
                return charge
        raise envelope.Unauthorized("this gateway serves API keys that it knows")

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self._active >= self._config.max_concurrent:
            raise Unavailable(
                f"all {self._config.max_concurrent} places are taken; nothing was charged",
                retry_after_s=self._config.retry_after_s,
            )
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    async def _whole(self, plan: _Plan, generation: Generation, charge: Charge) -> Response:
        try:
            with anyio.fail_after(self._config.answer_timeout_s):
                text = "".join([piece async for piece in generation.pieces()])
        except TimeoutError:
            raise Late(f"no answer within {self._config.answer_timeout_s:g} s; nothing was charged") from None
        answer = plan.answer.whole(text, generation.finish_reason, _usage(generation))
        return JSONResponse(answer, headers=await charge.settle(_used(generation)))

    async def _begin(self, generation: Generation, charge: Charge) -> tuple[str, dict[str, str]]:
        """The first piece of a stream, and the money that is due before it."""
        first = await self._next(generation) or ""
        return first, await charge.start()

    async def _next(self, generation: Generation) -> str | None:
        """The next piece; None at the end. Raises: Late when a token takes too long."""
        try:
            with anyio.fail_after(self._config.token_timeout_s):
                return await anext(generation.pieces(), None)
        except TimeoutError:
            raise Late(f"no token within {self._config.token_timeout_s:g} s") from None

    async def _events(
        self, plan: _Plan, generation: Generation, charge: Charge, first: str
    ) -> AsyncGenerator[bytes, None]:
        answer = plan.answer
        try:
            if opening := answer.opening():
                yield opening
            if first:
                yield answer.piece(first)
            while (piece := await self._next(generation)) is not None:
                if piece:
                    yield answer.piece(piece)
        except Exception as error:  # whatever broke, it broke on our side: the buyer keeps what was paid
            charge.owe()
            if not isinstance(error, TesseraError):
                raise
            yield event(envelope.error_body(error))
            return
        try:
            paid = await charge.finish(_used(generation))
        except TesseraError as error:  # the answer is out: its buyer learns that it is not paid for
            yield event(envelope.error_body(error))
            return
        yield answer.closing(generation.finish_reason, paid)
        if answer.include_usage:
            yield answer.usage(_usage(generation))
        yield DONE

    def _card(self) -> dict[str, Any]:
        return model_card(self._config.model, self._created, self._engine.context)


async def _settle_cancelled(charge: Charge, generation: Generation) -> None:
    """The buyer left, or reads too slowly: what was made until then is paid for. Nothing, where `finish` was."""
    try:
        await charge.finish(_used(generation))
    except TesseraError as error:
        log.warning("cancelled_answer_not_paid", reason=error.message)


async def _free(generation: Generation) -> None:
    with anyio.move_on_after(streams.CLOSE_TIMEOUT_S, shield=True):
        await generation.aclose()


def _used(generation: Generation) -> Usage:
    return Usage(generation.prompt_tokens, generation.completion_tokens)


def _usage(generation: Generation) -> dict[str, int]:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _body_schema(kind: type[ChatRequest] | type[CompletionRequest]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

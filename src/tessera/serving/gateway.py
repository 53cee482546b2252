"""The OpenAI-compatible gateway: routes, checks in the right order, payment around the work.

The order for every answer: the address's limit, body, model, parameters, length against the context, a free place,
payment held, the payer's limit, work, settlement, answer; what is metered is settled when the answer ends. So a request
that could not be served is refused before anybody pays, and an unpaid request costs no work. Whether the work is done
by a model of ours or by an upstream makes no difference here. Prompts and completions are never logged.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
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
from tessera.serving.answers import DONE, event, model_card
from tessera.serving.callers import CallerLimits, Callers, Visit, address_of
from tessera.serving.income.vouchers import PAYER, Payer
from tessera.serving.observing import METRICS_TYPE, Metrics, Note, Observed, note_of
from tessera.serving.openapi import describe
from tessera.serving.paying.charging import API_KEY_HEADER, PAYMENT_HEADER, Charge, PaidRequest, Payments
from tessera.serving.schemas import model_of, read_json
from tessera.serving.work import Kind, ServedModel, Work

__all__ = ["GatewayConfig", "create_app"]

log = structlog.get_logger()

CLIENT_CLOSED = 499  # nobody reads it; the access log does
NAMED_MODELS = 5  # in an error


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """How the gateway behaves. Times in seconds."""

    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 10.0
    max_concurrent: int = 8  # answers at once, each choice counted; more get 503
    retry_after_s: float = 1.0
    token_timeout_s: float = 60.0  # for the first token, and between two
    answer_timeout_s: float = 300.0  # for everything, a slow reader included
    callers: CallerLimits = field(default_factory=CallerLimits)
    public_url: str = ""  # scheme and host that buyers see, for the payment offer; empty = as requested


def create_app(
    config: GatewayConfig, models: Sequence[ServedModel], ways: Sequence[Payments], *, clock: Clock | None = None
) -> FastAPI:
    """The gateway as an ASGI app; other parts may mount more routes on it.

    Args:
        models: what is served, each by its id.
        ways: to pay, in the order in which they are tried; `Free()` serves anybody for nothing.

    Raises: Invalid when nobody could use it, because there is no model or no way to pay.
    """
    gateway = _Gateway(config, models, ways, clock or SystemClock())
    app = FastAPI(title="Tessera gateway", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    envelope.install(app)
    app.add_middleware(gateway.door)
    app.add_middleware(Observed, metrics=gateway.metrics)
    routes: tuple[tuple[str, str, Callable[..., Any]], ...] = (
        ("GET", "/healthz", gateway.alive),
        ("GET", "/healthz/ready", gateway.ready),
        ("GET", "/metrics", gateway.render_metrics),
        ("GET", "/v1/models", gateway.list_models),
        ("GET", "/v1/models/{model:path}", gateway.model),
        ("POST", "/v1/chat/completions", gateway.chat),
        ("POST", "/v1/completions", gateway.completions),
        ("POST", "/v1/embeddings", gateway.embeddings),
    )
    for method, path, route in routes:
        app.add_api_route(path, route, methods=[method], response_model=None)
    describe(app, [model.id for model in models])
    return app


class _Gateway:
    def __init__(
        self, config: GatewayConfig, models: Sequence[ServedModel], ways: Sequence[Payments], clock: Clock
    ) -> None:
        if not ways:
            raise Invalid("a gateway needs a way to pay; Free() serves anybody for nothing")
        self._models = {model.id: model for model in models}
        if not models or len(self._models) < len(models):
            raise Invalid("a gateway needs models, each with an id of its own")
        self._config = config
        self._ways = tuple(ways)
        self._created = int(clock.time())
        self._callers = Callers(config.callers, clock)
        self.door = self._callers.door
        self._active = 0
        self.metrics = Metrics(lambda: self._active)

    async def alive(self) -> dict[str, Any]:
        """The process answers: for whoever would restart it."""
        return {"status": "ok", "active": self._active, "capacity": self._config.max_concurrent}

    async def ready(self) -> JSONResponse:
        """Whether a request would find a place and a model: for whoever sends requests here or elsewhere."""
        models = {model.id: model.ready for model in self._models.values()}
        ready = any(models.values()) and self._active < self._config.max_concurrent
        return JSONResponse({"ready": ready, "models": models}, status_code=200 if ready else 503)

    async def render_metrics(self) -> Response:
        return Response(self.metrics.render(), media_type=METRICS_TYPE)

    async def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card(model) for model in self._models.values()]}

    async def model(self, model: str) -> dict[str, Any]:
        return self._card(self._find(model))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat")

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, "completion")

    async def embeddings(self, request: Request) -> Response:
        return await self._answer(request, "embedding")

    async def _answer(self, request: Request, kind: Kind) -> Response:
        note = note_of(request.scope)
        try:
            body = await streams.read_body(
                request, limit=self._config.max_body_bytes, timeout_s=self._config.body_timeout_s
            )
            data = read_json(body)
            model = self._find(model_of(data))
            note.model = model.id
            work = await model.plan(kind, data)
            async with AsyncExitStack() as held:
                charge = await self._admit(model, work, request, body, held)
                visit = held.enter_context(
                    self._callers.visit(
                        charge.caller or address_of(request.scope), work.prompt_tokens + work.max_tokens
                    )
                )
                held.push_async_callback(_end, charge, work, visit, note)
                held.push_async_callback(_free, work)
                if not work.stream:
                    return await streams.unless_gone(request.receive, lambda: self._whole(work, charge))
                first, headers = await streams.unless_gone(request.receive, lambda: self._begin(work, charge))
                return streams.EventStream(
                    self._events(work, charge, first),
                    held.pop_all(),
                    headers=headers,
                    timeout_s=self._config.answer_timeout_s,
                    undelivered=charge.owe,
                )
        except streams.ClientGone:
            return Response(status_code=CLIENT_CLOSED)

    def _find(self, name: str) -> ServedModel:
        model = self._models.get(name)
        if model is None:
            served = ", ".join(repr(model) for model in list(self._models)[:NAMED_MODELS])
            more = ", ..." if len(self._models) > NAMED_MODELS else ""
            raise Missing(
                f"the model {name[:200]!r} is not served here; {served}{more} is",
                param="model",
                reason="model_not_found",
            )
        return model

    async def _admit(
        self, model: ServedModel, work: Work, request: Request, body: bytes, held: AsyncExitStack
    ) -> Charge:
        """Takes a place and the payment. Both are given back when `held` closes."""
        held.enter_context(self._places(work.choices))
        paid = PaidRequest(
            (self._config.public_url.rstrip("/") or str(request.base_url).rstrip("/")) + request.url.path,
            sha256(request.url.path.encode(), b"\0", body),
            {name: request.headers[name] for name in (PAYMENT_HEADER, API_KEY_HEADER) if name in request.headers},
            model.id,
            work.prompt_tokens,
            work.max_tokens,
        )
        for way in self._ways:
            if (hold := await way.hold(paid)) is not None:
                charge = Charge(hold)
                PAYER.set(Payer(charge.caller, charge.purchase))
                held.push_async_callback(charge.release)
                return charge
        raise envelope.Unauthorized("this gateway serves API keys that it knows")

    @contextmanager
    def _places(self, count: int) -> Iterator[None]:
        capacity = self._config.max_concurrent
        if count > max(capacity, 1):
            raise Invalid(f"{count} choices, but this gateway has {capacity} places", param="n", reason="invalid_value")
        if self._active + count > capacity:
            raise Unavailable(
                f"{count} of {capacity} places needed, {capacity - self._active} free; nothing was charged",
                retry_after_s=self._config.retry_after_s,
            )
        self._active += count
        try:
            yield
        finally:
            self._active -= count

    async def _whole(self, work: Work, charge: Charge) -> Response:
        try:
            with anyio.fail_after(self._config.answer_timeout_s):
                answer = await work.whole()
        except TimeoutError:
            raise Late(f"no answer within {self._config.answer_timeout_s:g} s; nothing was charged") from None
        headers = await charge.settle(work.usage())
        return Response(answer, media_type="application/json", headers=headers)

    async def _begin(self, work: Work, charge: Charge) -> tuple[bytes, dict[str, str]]:
        """The first event of a stream, and the money that is due before it."""
        first = await self._next(work) or b""
        return first, await charge.start()

    async def _next(self, work: Work) -> bytes | None:
        """What the next token shows; None at the end. Raises: Late when a token takes too long."""
        try:
            with anyio.fail_after(self._config.token_timeout_s):
                return await anext(work.events(), None)
        except TimeoutError:
            raise Late(f"no token within {self._config.token_timeout_s:g} s") from None

    async def _events(self, work: Work, charge: Charge, first: bytes) -> AsyncGenerator[bytes, None]:
        try:
            shown: bytes | None = first
            while shown is not None:
                if shown:
                    yield shown
                shown = await self._next(work)
        except Exception as error:  # whatever broke, it broke on our side: the buyer keeps what was paid
            charge.owe()
            if not isinstance(error, TesseraError):
                raise
            yield event(envelope.error_body(error))
            return
        try:
            paid = await charge.finish(work.usage())
        except TesseraError as error:  # the answer is out: its buyer learns that it is not paid for
            yield event(envelope.error_body(error))
            return
        yield work.ending(paid) + DONE

    def _card(self, model: ServedModel) -> dict[str, Any]:
        return model_card(model.id, self._created, model.context)


async def _end(charge: Charge, work: Work, visit: Visit, note: Note) -> None:
    """The answer is over. If its buyer left, or reads too slowly, what was made until then is paid for."""
    usage = note.usage = work.usage()
    visit.used(usage.prompt_tokens + usage.completion_tokens)
    try:
        await charge.finish(usage)
    except TesseraError as error:
        log.warning("cancelled_answer_not_paid", reason=error.message)


async def _free(work: Work) -> None:
    with anyio.move_on_after(streams.CLOSE_TIMEOUT_S, shield=True):
        await work.aclose()

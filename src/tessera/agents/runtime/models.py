"""Models: any OpenAI-compatible endpoint, paid for through x402 when it asks for money; a script; a recorded one.

Invariant: a recorded answer is never asked for again, and a paid one is one intent, paid once whatever is killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import anyio
import httpx
from pydantic_ai.exceptions import ModelAPIError
from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models import Model, ModelRequestParameters
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.settings import ModelSettings

from tessera.agents.intents import intent_id
from tessera.agents.paying import Payer, Purchase
from tessera.agents.runtime.journal import Journal, RecordEnds
from tessera.core.amount import Amount
from tessera.core.errors import Invalid, Unavailable
from tessera.core.hashing import sha256

__all__ = ["PayingTransport", "RecordedModel", "close_model", "compatible", "nobody", "read_script", "scripted"]

SCRIPT_LIMIT = 1 << 20  # bytes
_QUESTION: ContextVar[str] = ContextVar("question")  # of which run, and its how-manieth
Line = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def compatible(
    url: str, name: str, *, api_key: str = "unused", transport: httpx.AsyncBaseTransport | None = None,
    timeout_s: float = 330.0,
) -> Model:  # fmt: skip
    """A model behind an OpenAI-compatible URL.

    Args:
        transport: how to reach it, such as a `PayingTransport`; None = plainly.
    """
    from openai import AsyncOpenAI  # takes half a second to import
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    http = httpx.AsyncClient(transport=transport, timeout=timeout_s, follow_redirects=False)
    client = AsyncOpenAI(base_url=url, api_key=api_key, http_client=http, max_retries=0 if transport else 2)
    return OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client))


async def close_model(model: Model) -> None:
    """Let go of its connections. Models of other makes hold none that we opened."""
    client = getattr(model, "client", None)
    if client is not None:
        await client.close()


class PayingTransport(httpx.AsyncBaseTransport):
    """HTTP that pays for what a `RecordedModel` asks: each question of a run is one intent, however often it is sent.

    Args:
        most: the highest price of one request.
    """

    def __init__(self, payer: Payer, mandate: str, most: Amount, purpose: str = "model") -> None:
        self._payer, self._mandate, self._most, self._purpose = payer, mandate, most, purpose

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        intent = intent_id(_QUESTION.get(), request.method, str(request.url), sha256(body).hex())
        purchase = Purchase(
            intent, self._mandate, str(request.url), self._most, request.method, body, headers, self._purpose
        )
        bought = await self._payer.buy(purchase)
        kept = {name: value for name, value in bought.headers.items() if name.lower() == "content-type"}
        return httpx.Response(bought.status, headers=kept, content=bought.body, request=request)


def scripted(lines: Sequence[Line]) -> Model:
    """A model that says these lines, whatever it hears: a text, or a call, or several at once.

    scripted([{"tool": "add", "arguments": {"a": 1, "b": 2}}, "It is 3."])
    """
    return FunctionModel(_script(list(lines)), model_name="scripted")


def read_script(text: bytes) -> list[Line]:
    """The lines of a JSON file. Raises: Invalid."""
    if len(text) > SCRIPT_LIMIT:
        raise Invalid(f"a script has at most {SCRIPT_LIMIT} bytes, not {len(text)}")
    try:
        lines = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"the script is no JSON: {error}") from error
    if not isinstance(lines, list):
        raise Invalid("a script is a list of lines: texts, and calls {tool, arguments}")
    for line in lines:
        _parts(line)
    return lines


def nobody() -> Model:
    """The model of a replay: it has nothing to say."""

    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        raise RecordEnds("a replay asks no model: the record ends before this answer")

    return FunctionModel(answer, model_name="nobody")


class RecordedModel(WrapperModel):  # type: ignore[misc]  # the library is not followed by the type checker
    """Says again what was recorded, then asks the model behind it and writes down what it says.

    Args:
        run: its id.
        check: raises when the run must not go on.
    """

    def __init__(self, wrapped: Model, run: str, journal: Journal, check: Callable[[], None], timeout_s: float) -> None:
        super().__init__(wrapped)
        self._run, self._journal, self._check, self._timeout_s = run, journal, check, timeout_s
        self._asked = 0

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        self._asked += 1
        if self._journal.peek() is not None:
            return _read(self._journal.take("model").body)
        self._check()
        _QUESTION.set(f"{self._run}/{self._asked}")
        try:
            with anyio.fail_after(self._timeout_s):
                response = await self.wrapped.request(messages, model_settings, model_request_parameters)
        except TimeoutError as error:
            raise Unavailable(f"the model did not answer in {self._timeout_s:g} s; the run can go on later") from error
        except ModelAPIError as error:
            raise Unavailable(f"the model cannot be asked: {error}; the run can go on later") from error
        (body,) = ModelMessagesTypeAdapter.dump_python([response], mode="json")
        await self._journal.add("model", body)
        return response


def _read(body: dict[str, Any]) -> ModelResponse:
    (message,) = ModelMessagesTypeAdapter.validate_python([body])
    if not isinstance(message, ModelResponse):
        raise Invalid("the recorded step is no model's answer")
    return message


def _script(lines: list[Line]) -> Callable[[list[ModelMessage], AgentInfo], ModelResponse]:
    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        said = sum(isinstance(message, ModelResponse) for message in messages)
        if said >= len(lines):
            raise Invalid(f"the script has {len(lines)} lines, and the run asks for another")
        return ModelResponse(parts=_parts(lines[said]))

    return answer


def _parts(line: Line) -> list[TextPart | ToolCallPart]:
    if isinstance(line, str):
        return [TextPart(line)]
    calls = [line] if isinstance(line, Mapping) else line
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        raise Invalid(f"a line of a script is a text, a call {{tool, arguments}} or a list of calls: {str(line)[:120]}")
    return [ToolCallPart(call["tool"], dict(call.get("arguments", {}))) for call in calls]


def _is_call(call: Any) -> bool:
    named = isinstance(call, Mapping) and isinstance(call.get("tool"), str) and call.keys() <= {"tool", "arguments"}
    return named and isinstance(call.get("arguments", {}), Mapping)

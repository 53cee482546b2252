"""The request bodies that the gateway takes: OpenAI's, strictly typed, for what a plain language model can do.

Three kinds of fields. Supported ones are declared here. Harmless ones (`IGNORED`) change nothing that we answer and are
ignored. Known ones that would change the answer (`NEUTRAL`) are refused unless they hold the value that asks for
nothing. Anything else is refused by name, so that a misspelt option never passes in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessera.core.errors import Invalid

__all__ = ["ChatRequest", "CompletionRequest", "parse_body"]

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 256

IGNORED = frozenset(
    ("metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention",
     "safety_identifier", "service_tier", "store", "user")
)  # fmt: skip
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Request(_Body):
    model: Annotated[str, Field(min_length=1, max_length=200)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens


class CompletionRequest(_Request):
    """`POST /v1/completions`: one prompt, as text or as token ids."""

    prompt: (
        str
        | list[int]
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=1)]
    )

    route: ClassVar[str] = "/v1/completions"


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """`POST /v1/chat/completions`: text messages only."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None

    route: ClassVar[str] = "/v1/chat/completions"

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


RequestT = TypeVar("RequestT", bound=_Request)


def parse_body(kind: type[RequestT], body: bytes) -> RequestT:
    """The request in `body`. Raises: Invalid, with `param` naming the field and `reason` a stable word."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Invalid("the body is not valid JSON", reason="invalid_json") from error
    if not isinstance(data, dict):
        raise Invalid(f"the body must be a JSON object, not {_kind(data)}", reason="invalid_json")
    wanted = _without_the_harmless(data)
    try:
        return kind.model_validate(wanted)
    except ValidationError as error:
        raise _first_problem(error) from None


def _without_the_harmless(data: dict[str, Any]) -> dict[str, Any]:
    wanted = {}
    for name, value in data.items():
        if name in NEUTRAL:
            if value is not None and not any(_same(value, neutral) for neutral in NEUTRAL[name]):
                raise Invalid(f"{name} is not supported by this model", param=name, reason="unsupported_parameter")
        elif name not in IGNORED:
            wanted[name] = value
    return wanted


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and not merely `True == 1`."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _first_problem(error: ValidationError) -> Invalid:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(str(part) for part in problem["loc"]) or None
    name = str(problem["loc"][0]) if problem["loc"] else "body"
    if problem["type"] == "extra_forbidden":
        return Invalid(f"unknown parameter: {param}"[:300], param=param, reason="unknown_parameter")
    if problem["type"] == "missing":
        return Invalid(f"missing parameter: {param}"[:300], param=param, reason="missing_required_parameter")
    return Invalid(f"{name}: {problem['msg']}"[:300], param=name, reason="invalid_value")


def _kind(value: object) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")

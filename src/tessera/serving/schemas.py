"""The request bodies that a model of ours takes: OpenAI's, strictly typed, for what a plain language model can do.

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
from tessera.serving.engine import MAX_LOGPROBS

__all__ = [
    "MAX_CHOICES",
    "ChatRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "StreamOptions",
    "asks_for_nothing",
    "model_of",
    "parse",
    "read_json",
    "validated",
]

MAX_CHOICES = 16  # of one request, all its prompts together
MAX_INPUTS = 256
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
    "dimensions": (),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Named(_Body):
    model: Annotated[str, Field(min_length=1, max_length=200)]


class _Request(_Named):
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

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
    """`POST /v1/completions`: prompts as text or as token ids."""

    prompt: (
        str
        | list[int]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    route: ClassVar[str] = "/v1/completions"

    @property
    def told(self) -> int | None:
        """How many likeliest tokens to tell beside each; None for no log-probabilities."""
        return self.logprobs


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    """One message. An answer of ours may come back as it was: what it says that it has not is allowed."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """`POST /v1/chat/completions`: text messages only."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    route: ClassVar[str] = "/v1/chat/completions"

    @property
    def told(self) -> int | None:
        """How many likeliest tokens to tell beside each; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class EmbeddingRequest(_Named):
    """`POST /v1/embeddings`: texts, or token ids, each to a vector of length 1."""

    input: (
        str
        | list[int]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None

    route: ClassVar[str] = "/v1/embeddings"


RequestT = TypeVar("RequestT", bound=_Named)


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises: Invalid."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Invalid("the body is not valid JSON", reason="invalid_json") from error
    if not isinstance(data, dict):
        raise Invalid(f"the body must be a JSON object, not {_kind(data)}", reason="invalid_json")
    return data


def model_of(data: Mapping[str, Any]) -> str:
    """The model that a request names. Raises: Invalid."""
    return validated(_Named, {"model": data["model"]} if "model" in data else {}).model


def parse(kind: type[RequestT], data: Mapping[str, Any]) -> RequestT:
    """The request in `data`. Raises: Invalid, with `param` naming the field and `reason` a stable word."""
    return validated(kind, _without_the_harmless(data))


ModelT = TypeVar("ModelT", bound=BaseModel)


def validated(kind: type[ModelT], data: dict[str, Any]) -> ModelT:
    """`data` as a `kind`. Raises: Invalid, as `parse`."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _first_problem(error) from None


def _without_the_harmless(data: Mapping[str, Any]) -> dict[str, Any]:
    wanted = {}
    for name, value in data.items():
        if name in NEUTRAL:
            if not asks_for_nothing(name, value):
                raise Invalid(f"{name} is not supported by this model", param=name, reason="unsupported_parameter")
        elif name not in IGNORED:
            wanted[name] = value
    return wanted


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a known field that we do not have holds the value that it has anyway."""
    return value is None or any(_same(value, neutral) for neutral in NEUTRAL.get(name, ()))


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

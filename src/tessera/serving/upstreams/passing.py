"""What may pass to an upstream: checked where it decides tokens or cost, otherwise the upstream's to understand.

Invariants: an upstream is always told how many tokens it may make, and always asked to report usage; nothing passes
that names the caller, buys a dearer service, or that we do not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tessera.core.errors import Invalid
from tessera.serving.schemas import (
    IGNORED,
    MAX_CHOICES,
    MAX_INPUTS,
    MAX_MESSAGES,
    StreamOptions,
    asks_for_nothing,
    validated,
)
from tessera.serving.work import Kind

__all__ = ["Passed", "check_passing"]

MAX_TOOLS = 128
# The bound of a prompt's tokens: one for each byte of it, and for what a chat template or an image adds.
TOKENS_PER_PART = 64
TOKENS_PER_IMAGE = 4_096

DROPPED = IGNORED - {"parallel_tool_calls"}  # they name the caller, or change the price and not the answer
PASSED = frozenset(
    ("chat_template_kwargs", "dimensions", "encoding_format", "frequency_penalty", "function_call", "functions",
     "guided_choice", "guided_json", "guided_regex", "logit_bias", "logprobs", "min_p", "min_tokens",
     "parallel_tool_calls", "presence_penalty", "reasoning_effort", "repetition_penalty", "response_format", "seed",
     "stop", "stop_token_ids", "structured_outputs", "suffix", "temperature", "tool_choice", "tools", "top_k",
     "top_logprobs", "top_p", "verbosity")
)  # fmt: skip

Count = Annotated[int, Field(ge=1, le=2**31)]
TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]


class _Passing(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None


class _Chat(_Passing):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]


class _Completion(_Passing):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    )


class _Embedding(_Passing):
    input: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
    )


KINDS: Mapping[Kind, tuple[type[_Passing], str]] = {
    "chat": (_Chat, "messages"),
    "completion": (_Completion, "prompt"),
    "embedding": (_Embedding, "input"),
}


@dataclass(frozen=True, slots=True)
class Passed:
    """A request as an upstream gets it, but for the model's name there.

    Attributes:
        prompt_limit: an upper bound of the prompt's tokens.
        token_limit: the most tokens of all choices together.
    """

    body: dict[str, Any]
    prompt: Any
    prompt_limit: int
    token_limit: int
    choices: int
    stream: bool
    include_usage: bool


def check_passing(kind: Kind, data: Mapping[str, Any], *, default_tokens: int, most_tokens: int) -> Passed:
    """`data` as it may pass. Raises: Invalid."""
    schema, name = KINDS[kind]
    wanted = {field: value for field, value in data.items() if not _dropped(field, value)}
    asked = validated(schema, wanted)
    for field in wanted:
        if field not in PASSED and field not in schema.model_fields:
            raise Invalid(f"unknown parameter: {field}"[:300], param=field[:100], reason="unknown_parameter")
    if asked.stream_options is not None and not asked.stream:
        raise Invalid("stream_options needs stream: true", param="stream_options", reason="invalid_value")
    prompt = wanted[name]
    choices = (asked.n or 1) * (_prompts(prompt) if kind == "completion" else 1)
    if choices > MAX_CHOICES:
        raise Invalid(f"at most {MAX_CHOICES} choices in one request", param="n", reason="invalid_value")
    body = wanted
    limit = 0
    if kind != "embedding":
        limit = asked.max_completion_tokens or asked.max_tokens or min(default_tokens, most_tokens)
        if limit > most_tokens:
            raise Invalid(f"at most {most_tokens} tokens are made", param="max_tokens", reason="invalid_value")
        field = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
        body = {key: value for key, value in wanted.items() if key not in ("max_tokens", "max_completion_tokens")}
        body[field] = limit
    if asked.stream:
        body["stream_options"] = {"include_usage": True}
    include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    return Passed(
        body, prompt, _bound(prompt, wanted), limit * choices, choices, bool(asked.stream and limit), include_usage
    )


def _dropped(field: str, value: Any) -> bool:
    return value is None or field in DROPPED or (field not in PASSED and asks_for_nothing(field, value))


def _prompts(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def _bound(prompt: Any, wanted: Mapping[str, Any]) -> int:
    """No tokenizer makes more tokens than there are bytes, but templates and images add some."""
    try:
        told = json.dumps([prompt, wanted.get("tools"), wanted.get("functions"), wanted.get("response_format")])
    except RecursionError:
        raise Invalid("the body is nested too deeply", reason="invalid_json") from None
    parts = len(prompt) if isinstance(prompt, list) else 1
    return len(told) + TOKENS_PER_PART * parts + TOKENS_PER_IMAGE * told.count('"image_url": {')

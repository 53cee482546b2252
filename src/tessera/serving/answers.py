"""The shapes of OpenAI's answers: completions, chat completions, their chunks, and embeddings."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tessera.core.errors import Unavailable
from tessera.serving.engine import Token
from tessera.serving.paying.charging import Usage

__all__ = [
    "DONE",
    "Answer",
    "Teller",
    "closed",
    "embedding",
    "event",
    "json_bytes",
    "model_card",
    "unit_length",
    "usage_object",
]

DONE = b"data: [DONE]\n\n"
REPLACEMENT = "\ufffd"


class Teller(Protocol):
    """How a token reads: its text, for log-probabilities."""

    @property
    def vocab_size(self) -> int: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(slots=True)
class Answer:
    """Names one answer and knows its shapes. `created` is in whole seconds since 1970."""

    id: str
    model: str
    created: int
    chat: bool
    teller: Teller
    include_usage: bool = False
    _offsets: dict[int, int] = field(default_factory=dict)  # of each choice's text, where log-probabilities are told

    def whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return self._named(kind, choices) | {"usage": usage_object(usage)}

    def choice(self, index: int, text: str, finish_reason: str, tokens: list[Token] | None) -> dict[str, Any]:
        """One choice of a whole answer. `tokens`: to tell about; None when no log-probabilities were asked for."""
        choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(index, tokens)}
        choice["finish_reason"] = finish_reason
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return choice

    def opening(self, index: int) -> bytes:
        """A chat stream names its role first; a completion stream starts with its text."""
        return event(self._chunk(index, {"role": "assistant", "content": ""}, None)) if self.chat else b""

    def piece(self, index: int, text: str, tokens: list[Token] | None = None) -> bytes:
        return event(self._chunk(index, {"content": text} if self.chat else text, None, tokens))

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        """The last chunk of one choice."""
        return self._chunk(index, {} if self.chat else "", finish_reason)

    def usage(self, usage: Usage) -> bytes:
        return event(self._named(self._kind, []) | {"usage": usage_object(usage)})

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self, index: int, delta: dict[str, str] | str, finish_reason: str | None, tokens: list[Token] | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(index, tokens)}
        choice["finish_reason"] = finish_reason
        choice |= {"delta": delta} if self.chat else {"text": delta}
        chunk = self._named(self._kind, [choice])
        return chunk | {"usage": None} if self.include_usage else chunk

    def _named(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }

    def _logprobs(self, index: int, tokens: list[Token] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        if self.chat:
            return {"content": [self._told(token) for token in tokens], "refusal": None}
        texts = [self._text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{self._text(other): _finite(value) for other, value in t.top} for t in tokens],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        """A token that the tokenizer does not know has no text: a model may have more ids than its tokenizer learnt."""
        return self.teller.decode([token]) if 0 <= token < self.teller.vocab_size else ""

    def _told(self, token: Token) -> dict[str, Any]:
        top = [self._entry(other, value) for other, value in token.top]
        return self._entry(token.id, token.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        whole = REPLACEMENT not in text  # a part of a character is no text, and only the tokenizer knows its bytes
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}


def usage_object(usage: Usage) -> dict[str, int]:
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def embedding(index: int, vector: list[float], as_base64: bool) -> dict[str, Any]:
    """One input's vector, as numbers or as little-endian float32 in base64."""
    value: Any = vector
    if as_base64:
        value = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return {"object": "embedding", "index": index, "embedding": value}


def unit_length(vector: Sequence[float]) -> list[float]:
    """`vector` over its length, so that a dot product is the cosine. A vector without length stays as it is."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length else list(vector)


def closed(closings: Sequence[dict[str, Any]], paid: Mapping[str, str]) -> bytes:
    """The events that close a stream's choices; `paid` stands in the last, with lower-case names."""
    *others, last = closings
    if paid:
        last = last | {"payment": {name.lower(): text for name, text in paid.items()}}
    return b"".join(map(event, [*others, last]))


def json_bytes(data: object) -> bytes:
    """In ASCII: half of a surrogate pair, which an upstream may send in a piece of its own, has no other form.

    Raises: Unavailable for infinity and what is no number, which JSON cannot carry.
    """
    try:
        return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        raise Unavailable("the model answered with a number that is none") from None


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json_bytes(data) + b"\n\n"


def model_card(model: str, created: int, context: int | None) -> dict[str, Any]:
    card = {"id": model, "object": "model", "created": created, "owned_by": "tessera"}
    return card if context is None else card | {"context_length": context}


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity: what can never come has OpenAI's -9999."""
    return logprob if logprob is None else max(logprob, -9999.0)

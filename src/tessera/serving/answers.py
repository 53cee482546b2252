"""The shapes of OpenAI's answers: what a completion, a chat completion and their chunks look like on the wire."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DONE", "Answer", "event", "model_card"]

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """Names one answer and knows its shapes. `created` is in whole seconds since 1970."""

    id: str
    model: str
    created: int
    chat: bool
    include_usage: bool = False

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return self._named("chat.completion" if self.chat else "text_completion", [choice]) | {"usage": usage}

    def opening(self) -> bytes:
        """A chat stream names its role first; a completion stream starts with its text."""
        return event(self._chunk({"role": "assistant", "content": ""}, None)) if self.chat else b""

    def piece(self, text: str) -> bytes:
        return event(self._chunk({"content": text} if self.chat else text, None))

    def closing(self, finish_reason: str, paid: Mapping[str, str]) -> bytes:
        """The last chunk of the text; `paid` are the headers of a payment that was settled after the first byte."""
        chunk = self._chunk({} if self.chat else "", finish_reason)
        return event(chunk | {"payment": {name.lower(): text for name, text in paid.items()}} if paid else chunk)

    def usage(self, usage: dict[str, int]) -> bytes:
        return event(self._named(self._kind, []) | {"usage": usage})

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, delta: dict[str, str] | str, finish_reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
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


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def model_card(model: str, created: int, context: int) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": created, "owned_by": "tessera", "context_length": context}

"""How many tokens an upstream has made: its word where that can be true, else our own count.

We see text pass, in pieces. A piece of text holds a token or more, and a token is a byte or more of text. So a report
is believed when it lies between the pieces that passed and the bytes that passed (with the reasoning it says it hid,
and what a template may add), and within what the request allowed. Without a report, or with one that cannot be true,
and for a stream that its buyer cancelled, we meter what we saw: the tokens of the text where the tokenizer is known,
else its pieces when it was streamed, else a token for every four bytes, rounded down: all of it in the buyer's favour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tessera.serving.paying.charging import Usage
from tessera.serving.upstreams.passing import Passed

__all__ = ["Encoder", "Meter"]

BYTES_PER_TOKEN = 4  # of a tokenizer that we do not know
MARKUP_TOKENS = 64  # for each choice: its end, and the tags around tool calls and reasoning
MAX_REPORT = 2**31


class Encoder(Protocol):
    """A tokenizer, to count with."""

    def encode(self, text: str) -> list[int]: ...


class Meter:
    """Counts one answer as it passes."""

    def __init__(self, asked: Passed, encoder: Encoder | None) -> None:
        self._asked = asked
        self._encoder = encoder
        self._pieces = 0
        self._bytes = 0
        self._texts: dict[int, list[str]] = {}
        self._report: Mapping[str, Any] | None = None

    def see(self, choices: object, *, streamed: bool) -> None:
        """Text that passes: the `choices` of a chunk or of a whole answer."""
        if not isinstance(choices, list):
            return
        for choice in choices:
            if isinstance(choice, dict):
                said = choice.get("delta" if streamed else "message", choice.get("text"))
                texts = list(_texts(said))
                self._pieces += streamed and any(texts)
                self._bytes += sum(len(text.encode(errors="replace")) for text in texts)
                if self._encoder is not None:
                    index = choice.get("index")
                    self._texts.setdefault(index if isinstance(index, int) else 0, []).extend(texts)

    def report(self, usage: object) -> None:
        """What the upstream says; the last word counts."""
        if isinstance(usage, dict):
            self._report = usage

    def usage(self) -> Usage:
        return Usage(self._prompt(), self._completion())

    def _prompt(self) -> int:
        reported = _count(self._report, "prompt_tokens")
        if 0 < reported <= self._asked.prompt_limit:
            return reported
        texts = list(_texts(self._asked.prompt))
        if not texts:  # token ids
            return min(_ids(self._asked.prompt), self._asked.prompt_limit)
        return self._counted(texts)

    def _completion(self) -> int:
        limit = self._asked.token_limit
        if not limit:
            return 0
        reported = _count(self._report, "completion_tokens")
        details = self._report.get("completion_tokens_details") if self._report else None
        hidden = _count(details if isinstance(details, dict) else None, "reasoning_tokens")
        most = self._bytes + max(0, hidden) + MARKUP_TOKENS * self._asked.choices
        least = self._pieces or min(1, self._bytes)
        if least <= reported <= min(limit, most):
            return reported
        if self._encoder is not None:
            return min(limit, sum(self._counted(["".join(texts)]) for texts in self._texts.values()))
        return min(limit, self._pieces or self._bytes // BYTES_PER_TOKEN)

    def _counted(self, texts: Sequence[str]) -> int:
        if self._encoder is not None:
            return sum(len(self._encoder.encode(text)) for text in texts)
        return max(1, sum(len(text.encode(errors="replace")) for text in texts) // BYTES_PER_TOKEN)


def _count(report: Mapping[str, Any] | None, name: str) -> int:
    """The reported number; -1 when there is none, or none that could be."""
    value = None if report is None else report.get(name)
    return value if type(value) is int and 0 <= value <= MAX_REPORT else -1


def _texts(value: object) -> list[str]:
    """Every text in a message, wherever it stands; not the words that only say what it is."""
    found: list[str] = []
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, list):
            todo += reversed(item)
        elif isinstance(item, dict):
            todo += [part for name, part in reversed(item.items()) if name not in ("role", "type", "id", "image_url")]
    return [text for text in found if text]


def _ids(value: object) -> int:
    return sum(map(_ids, value)) if isinstance(value, list) else 1

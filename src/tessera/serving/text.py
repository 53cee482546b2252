"""Between text and tokens: the chat template, incremental decoding, stop strings, and the count of what was made.

Invariants: the pieces joined are a prefix of the decoded completion; no piece ends inside a character; no piece holds
any part of a stop string; `usage` counts every token that the engine yielded, nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Literal, Protocol

from tessera.core.errors import Invalid
from tessera.serving.engine import Engine, Sampling, Token

__all__ = ["CharTokenizer", "Chat", "Generation", "TextTokenizer", "flatten_chat"]

REPLACEMENT = "\ufffd"


class TextTokenizer(Protocol):
    """What the gateway asks of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Chat(Protocol):
    """What makes a prompt of a conversation; `tessera.serving.chat_template.TemplateChat` is one."""

    async def prompt(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """The tokens after which the model writes the next message. Raises: Invalid: not with these messages."""
        ...


class CharTokenizer:
    """A working tokenizer without training: one token for each byte of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def flatten_chat(messages: Sequence[tuple[str, str]]) -> str:
    """The text that a plain language model continues: every message's text in order, a newline between two.

    Roles leave no mark, since such a model has never seen any. The last message is what it continues, so a chat with
    one user message asks exactly for the continuation of that text.

    >>> flatten_chat([("system", "# Python 3"), ("user", "def add(a, b):")])
    '# Python 3\\ndef add(a, b):'
    """
    if not messages:
        raise Invalid("messages must hold at least one message", param="messages")
    return "\n".join(text for _, text in messages)


class Generation:
    """One completion: runs the engine, turns tokens into text, stops at stop strings, counts.

    Iterate over `pieces()` once; call `aclose()` in any case. Each token gives one piece, which may be empty when the
    text that it ends is not certain yet.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        prompt: Sequence[int],
        sampling: Sampling,
        stops: Sequence[str] = (),
    ) -> None:
        self._tokens = engine.generate(prompt, sampling)
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._start = 0  # decoding starts at this token
        self._shown = 0  # characters of that decoding already given out
        self._held = ""  # text that may turn out to begin a stop string
        self._tells = sampling.logprobs is not None
        self._told: list[
            tuple[int, Token]
        ] = []  # tokens to tell about, each with the characters that were there with it
        self._decoded = self._given = 0  # characters that tokens completed, and that pieces gave out
        self._pieces = self._run()
        self.max_tokens = sampling.max_tokens
        self.completion_tokens = 0
        self.finish_reason: Literal["stop", "length"] = "stop"

    def pieces(self) -> AsyncGenerator[str, None]:
        """The text, token by token, to a stop string, a stop token or the token limit. Always the same iterator."""
        return self._pieces

    def shown(self) -> list[Token]:
        """The tokens with log-probabilities whose text was given out since the last call, in order.

        So a token that only a stop string was made of is never told.
        """
        tokens = [token for end, token in self._told if end <= self._given]
        del self._told[: len(tokens)]
        return tokens

    async def aclose(self) -> None:
        """Frees what the engine holds. Safe to call twice."""
        await self._pieces.aclose()
        await self._tokens.aclose()

    async def _run(self) -> AsyncGenerator[str, None]:
        async for token in self._tokens:
            self.completion_tokens += 1
            characters = self._characters(token.id)
            if self._tells:
                self._decoded += len(characters)
                self._told.append((self._decoded, token))
            piece, stopped = self._release(characters)
            self._given += len(piece)
            if stopped:
                self.finish_reason = "stop"
                yield piece
                return
            yield piece
        if self.completion_tokens >= self.max_tokens:
            self.finish_reason = "length"
        rest = self._rest()
        self._given += len(rest)
        if rest:
            yield rest

    def _characters(self, token: int) -> str:
        """The characters that `token` completes.

        Decodes only from the last token that ended a whole character. An incomplete character decodes to one U+FFFD at
        the end, which is held back until the next token shows what it becomes. A token that the tokenizer does not
        know has no text: a model may have more ids than its tokenizer learnt.
        """
        if not 0 <= token < self._tokenizer.vocab_size:
            return ""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._start :])
        whole = not text.endswith(REPLACEMENT)
        piece = text[self._shown : len(text) if whole else -1]
        if whole:  # keep one token of context: some tokenizers treat a first token differently
            self._start = len(self._ids) - 1
            self._shown = len(self._tokenizer.decode(self._ids[self._start :]))
        else:
            self._shown += len(piece)
        return piece

    def _release(self, text: str) -> tuple[str, bool]:
        """What may be shown of the text so far, and whether a stop string ended it."""
        text = self._held + text
        self._held = ""
        if hits := [at for at in (text.find(stop) for stop in self._stops) if at >= 0]:
            return text[: min(hits)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _rest(self) -> str:
        text, stopped = self._release(self._tokenizer.decode(self._ids[self._start :])[self._shown :])
        if stopped:
            self.finish_reason = "stop"
        held, self._held = self._held, ""
        return text + held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper prefix of `stop` that ends `text`."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

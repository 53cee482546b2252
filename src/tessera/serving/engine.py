"""What the gateway asks of a model: tokens in, tokens out, one at a time.

Invariants: an engine yields at most `sampling.max_tokens` tokens; a token in `sampling.stop` ends the generation and is
not yielded; closing the generator frees whatever the engine holds for it, wherever it is.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio

from tessera.core.errors import Invalid

__all__ = ["Engine", "FakeEngine", "Sampling", "Token"]

MAX_LOGPROBS = 20
MAX_TEMPERATURE = 2.0
MAX_STOP_TOKENS = 16
SEED_BITS = 63
FAKE_WIDTH = 8  # of the fake engine's hidden state


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Equal prompts with equal `Sampling` give equal tokens, on every machine that computes equal logits.
    """

    temperature: float = 1.0  # 0 = always the likeliest token
    top_p: float = 1.0  # keep the likeliest tokens until their probabilities reach this sum
    seed: int = 0  # 0 ≤ seed < 2^63
    max_tokens: int = 16
    stop: tuple[int, ...] = ()  # token ids; the first one met ends the generation and is not yielded
    logprobs: int | None = None  # None = none; else each token's own, and those of so many likeliest, 0 to 20

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise Invalid("top_p must be above 0: 0 would keep no token", param="top_p")
        _integer("seed", self.seed, 0, 2**SEED_BITS - 1)
        _integer("max_tokens", self.max_tokens, 1, 2**31)
        if len(self.stop) > MAX_STOP_TOKENS or any(type(token) is not int or token < 0 for token in self.stop):
            raise Invalid(f"stop takes at most {MAX_STOP_TOKENS} token ids", param="stop")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    def to_dict(self) -> dict[str, Any]:
        """What the stage that samples has to know."""
        how = {"temperature": float(self.temperature), "top_p": float(self.top_p), "seed": self.seed}
        return how | {"logprobs": self.logprobs}

    @classmethod
    def from_dict(cls, data: object) -> Sampling:
        """The inverse of `to_dict`, for bytes from a peer. Raises: Invalid."""
        if not isinstance(data, dict) or data.keys() != {"temperature", "top_p", "seed", "logprobs"}:
            raise Invalid(f"sampling has temperature, top_p, seed and logprobs, not {str(data)[:200]}")
        return cls(**data)


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a completion.

    Log-probabilities are natural, and of the model itself: before temperature and top_p. They are there when
    `Sampling.logprobs` asked for them; `top` holds (token id, log-probability) of the likeliest, best first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Engine(Protocol):
    """A model that can be asked."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and completion together."""
        ...

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Token, None]:
        """The tokens that follow `prompt`, as they are made.

        Raises (from the iteration): Invalid for a prompt that cannot fit; Unavailable or Late when a stage is gone.
        """
        ...

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        """The last hidden state at the last token, after the final norm. Raises: as `generate`."""
        ...


class FakeEngine:
    """A working engine without a model: by default it repeats its prompt.

    Args:
        reply: the tokens that follow a prompt.
        delay_s: pause before each token.
        fail_after: raise `error` instead of the token with this index.
    """

    def __init__(
        self,
        reply: Callable[[Sequence[int], Sampling], Sequence[int]] | None = None,
        *,
        context: int = 512,
        delay_s: float = 0.0,
        fail_after: int | None = None,
        error: Exception | None = None,
    ) -> None:
        self._reply = reply or _echo
        self._context = context
        self._delay_s = delay_s
        self.fail_after = fail_after
        self.error = error or Invalid("the fake engine was told to fail")
        self.started = 0  # generations begun
        self.open = 0  # generations whose session is not freed yet
        self.produced = 0  # tokens yielded

    @property
    def context(self) -> int:
        return self._context

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Token, None]:
        self.started += 1
        self.open += 1
        try:
            for index, token in enumerate(self._reply(prompt, sampling)[: sampling.max_tokens]):
                await anyio.sleep(self._delay_s)
                if index == self.fail_after:
                    raise self.error
                if token in sampling.stop:
                    return
                self.produced += 1
                yield _certain(token, sampling)
        finally:
            self.open -= 1

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        """How often each remainder modulo `FAKE_WIDTH` is among the ids, as shares of 1."""
        if not prompt:
            raise Invalid("there is nothing to embed", param="input")
        self.started += 1
        await anyio.sleep(self._delay_s)
        if self.fail_after is not None:
            raise self.error
        return [sum(token % FAKE_WIDTH == place for token in prompt) / len(prompt) for place in range(FAKE_WIDTH)]


def _echo(prompt: Sequence[int], sampling: Sampling) -> Sequence[int]:
    return [prompt[index % len(prompt)] for index in range(sampling.max_tokens)]


def _certain(token: int, sampling: Sampling) -> Token:
    """A token whose probability is 1, so that no other has a log-probability that could be told."""
    if sampling.logprobs is None:
        return Token(token)
    return Token(token, 0.0, ((token, 0.0),) if sampling.logprobs else ())


def _number(name: str, value: object, low: float, high: float) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type, operator]
        raise Invalid(f"{name} must be a number from {low} to {high}, not {value!r}", param=name)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise Invalid(f"{name} must be an integer from {low} to {high}, not {value!r}", param=name)

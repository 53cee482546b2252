"""A model of ours behind the gateway: requests checked to the last field, text in and out, every token counted.

Invariants: `usage` is what the engine yielded, of all choices; choices of one request differ by their seed alone, and
equal requests with equal seeds give equal answers; what an answer holds is freed however it ends.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import anyio

from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Invalid
from tessera.core.hashing import sha256
from tessera.serving.answers import Answer, closed, embedding, json_bytes, unit_length
from tessera.serving.engine import SEED_BITS, Engine, Sampling
from tessera.serving.paying.charging import Usage
from tessera.serving.schemas import MAX_CHOICES, ChatRequest, CompletionRequest, EmbeddingRequest, parse
from tessera.serving.text import Chat, Generation, TextTokenizer, flatten_chat
from tessera.serving.work import Kind, Work

__all__ = ["LocalModel", "seed_of"]


class LocalModel:
    """An engine with its tokenizer, by the id that requests name.

    Args:
        stop_tokens: token ids that end every generation, such as the tokenizer's end of text.
        chat: makes a prompt of a conversation; None: a plain model, which continues the text of the messages.
        default_max_tokens: when the request names none and the context has room.
        is_ready: whether the engine would find all its stages.
    """

    def __init__(
        self,
        model_id: str,
        engine: Engine,
        tokenizer: TextTokenizer,
        *,
        chat: Chat | None = None,
        stop_tokens: tuple[int, ...] = (),
        default_max_tokens: int = 128,
        default_temperature: float = 1.0,
        is_ready: Callable[[], bool] = lambda: True,
        clock: Clock | None = None,
    ) -> None:
        self.id = model_id
        self._is_ready = is_ready
        self._engine = engine
        self._tokenizer = tokenizer
        self._chat = chat
        self._stop_tokens = stop_tokens
        self._default_max_tokens = default_max_tokens
        self._default_temperature = default_temperature
        self._clock = clock or SystemClock()

    @property
    def context(self) -> int:
        return self._engine.context

    @property
    def ready(self) -> bool:
        return self._is_ready()

    async def plan(self, kind: Kind, data: Mapping[str, Any]) -> Work:
        """See `ServedModel.plan`."""
        if kind == "chat":
            chat = parse(ChatRequest, data)
            if chat.top_logprobs and not chat.logprobs:
                raise Invalid("top_logprobs needs logprobs: true", param="top_logprobs", reason="invalid_value")
            messages = [(message.role, message.text) for message in chat.messages]
            return self._completion(chat, [await self._prompt_of(messages)])
        if kind == "completion":
            completion = parse(CompletionRequest, data)
            return self._completion(completion, self._prompts("prompt", completion.prompt))
        asked = parse(EmbeddingRequest, data)
        prompts = self._prompts("input", asked.input)
        for prompt in prompts:
            if len(prompt) > self.context:
                raise self._too_long("input", len(prompt), 0)
        return _Embedding(self.id, self._engine, prompts, as_base64=asked.encoding_format == "base64")

    async def aclose(self) -> None:
        """The engine belongs to who made it."""

    def _completion(self, asked: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> Work:
        if asked.stream_options is not None and not asked.stream:
            raise Invalid("stream_options needs stream: true", param="stream_options", reason="invalid_value")
        count = asked.n or 1
        if count * len(prompts) > MAX_CHOICES:
            raise Invalid(f"at most {MAX_CHOICES} choices in one request", param="n", reason="invalid_value")
        seed = secrets.randbits(SEED_BITS) if asked.seed is None else asked.seed % 2**SEED_BITS
        temperature = self._default_temperature if asked.temperature is None else asked.temperature
        generations = [
            Generation(
                self._engine,
                self._tokenizer,
                prompt,
                Sampling(
                    temperature=temperature,
                    top_p=1.0 if asked.top_p is None else asked.top_p,
                    seed=seed_of(seed, index),
                    max_tokens=self._token_limit(len(prompt), asked.token_limit),
                    stop=self._stop_tokens,
                    logprobs=asked.told,
                ),
                asked.stops,
            )
            for prompt in prompts
            for index in range(count)
        ]
        chat = isinstance(asked, ChatRequest)
        name = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        answer = Answer(name, self.id, int(self._clock.time()), chat, self._tokenizer, asked.include_usage)
        tells = asked.told is not None
        return _Completion(answer, generations, sum(map(len, prompts)), stream=bool(asked.stream), tells=tells)

    async def _prompt_of(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        if self._chat is None:
            return self._encode("messages", flatten_chat(messages))
        _check_text("messages", "".join(text for _, text in messages))
        return self._nonempty("messages", await self._chat.prompt(messages))

    def _prompts(self, name: str, value: str | Sequence[Any]) -> list[list[int]]:
        """Every prompt of a request, which may be one text, one list of token ids, or a list of either."""
        if isinstance(value, str):
            return [self._encode(name, value)]
        if value and not isinstance(value[0], int):
            return [prompt for part in value for prompt in self._prompts(name, part)]
        ids, vocab_size = [int(token) for token in value], self._tokenizer.vocab_size
        if any(not 0 <= token < vocab_size for token in ids):
            raise Invalid(f"token ids run from 0 to {vocab_size - 1}", param=name, reason="invalid_value")
        return [self._nonempty(name, ids)]

    def _encode(self, name: str, text: str) -> list[int]:
        _check_text(name, text)
        return self._nonempty(name, self._tokenizer.encode(text))

    def _nonempty(self, name: str, prompt: list[int]) -> list[int]:
        if not prompt:
            raise Invalid(f"{name} holds no text", param=name, reason="invalid_value")
        return prompt

    def _token_limit(self, prompt: int, asked: int | None) -> int:
        room = self.context - prompt
        wanted = min(self._default_max_tokens, max(room, 1)) if asked is None else asked
        if wanted > room:
            raise self._too_long("max_tokens" if room > 0 else "prompt", prompt, wanted)
        return wanted

    def _too_long(self, param: str, prompt: int, wanted: int) -> Invalid:
        return Invalid(
            f"the model's context is {self.context} tokens; the prompt has {prompt} and {wanted} were asked for",
            param=param,
            reason="context_length_exceeded",
        )


class _Completion:
    """The choices of one request."""

    def __init__(
        self, answer: Answer, generations: list[Generation], prompt_tokens: int, *, stream: bool, tells: bool
    ) -> None:
        self._answer = answer
        self._generations = generations
        self._tells = tells
        self._events = self._run()
        self.prompt_tokens = prompt_tokens
        self.max_tokens = sum(generation.max_tokens for generation in generations)
        self.choices = len(generations)
        self.stream = stream

    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, sum(generation.completion_tokens for generation in self._generations))

    async def whole(self) -> bytes:
        found: list[dict[str, Any]] = [{}] * self.choices

        async def finish(index: int, generation: Generation) -> None:
            text = "".join([piece async for piece in generation.pieces()])
            found[index] = self._answer.choice(index, text, generation.finish_reason, self._shown(generation))

        await _together([(finish, index, generation) for index, generation in enumerate(self._generations)])
        return json_bytes(self._answer.whole(found, self.usage()))

    def events(self) -> AsyncGenerator[bytes, None]:
        return self._events

    def ending(self, paid: Mapping[str, str]) -> bytes:
        answer = self._answer
        closings = [answer.closing(index, made.finish_reason) for index, made in enumerate(self._generations)]
        return closed(closings, paid) + (answer.usage(self.usage()) if answer.include_usage else b"")

    async def aclose(self) -> None:
        await self._events.aclose()
        for generation in self._generations:
            await generation.aclose()

    async def _run(self) -> AsyncGenerator[bytes, None]:
        """Choices advance together, a token each: no task outlives a step, so the iterator may be closed anywhere."""
        opening = b"".join(self._answer.opening(index) for index in range(self.choices))
        running = dict(enumerate(self._generations))
        while running:
            found: dict[int, bytes] = {}
            over: set[int] = set()

            async def step(index: int, generation: Generation) -> None:
                piece = await anext(generation.pieces(), None)
                if piece is None:
                    over.add(index)  # noqa: B023  # every step ends within its turn
                else:
                    found[index] = self._chunk(index, generation, piece)  # noqa: B023

            await _together([(step, index, generation) for index, generation in running.items()])
            yield opening + b"".join(found.get(index, b"") for index in running)
            opening = b""
            for index in over:
                del running[index]

    def _chunk(self, index: int, generation: Generation, piece: str) -> bytes:
        tokens = self._shown(generation)
        return self._answer.piece(index, piece, tokens) if piece or tokens else b""

    def _shown(self, generation: Generation) -> list[Any] | None:
        return generation.shown() if self._tells else None


class _Embedding:
    """The vectors of one request's inputs, of length 1, one after the other."""

    max_tokens = 0
    choices = 1
    stream = False

    def __init__(self, model: str, engine: Engine, prompts: list[list[int]], *, as_base64: bool) -> None:
        self._model, self._engine, self._prompts, self._as_base64 = model, engine, prompts, as_base64
        self.prompt_tokens = sum(map(len, prompts))

    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, 0)

    async def whole(self) -> bytes:
        vectors = [unit_length(await self._engine.embed(prompt)) for prompt in self._prompts]
        data = [embedding(index, vector, self._as_base64) for index, vector in enumerate(vectors)]
        usage = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}
        return json_bytes({"object": "list", "data": data, "model": self._model, "usage": usage})

    async def events(self) -> AsyncGenerator[bytes, None]:
        yield await self.whole()

    def ending(self, paid: Mapping[str, str]) -> bytes:
        return b""

    async def aclose(self) -> None:
        """Nothing is held between two inputs."""


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Invalid(f"{name} holds a lone surrogate: it is not text", param=name, reason="invalid_value") from None


async def _together(steps: list[Any]) -> None:
    """Every (function, index, generation) at once. One alone runs here: a task for it would cost more than it does."""
    if len(steps) == 1:
        function, *arguments = steps[0]
        await function(*arguments)
        return
    try:
        async with anyio.create_task_group() as group:
            for step in steps:
                group.start_soon(*step)
    except BaseExceptionGroup as errors:  # callers want the error itself; of several, one is enough to say why
        raise _first(errors) from None


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def seed_of(seed: int, index: int) -> int:
    """The seed of one choice. The first has the request's own; neighbours of a seed share no other choice."""
    if index == 0:
        return seed
    return int.from_bytes(sha256(seed.to_bytes(8, "big"), index.to_bytes(8, "big"))[:8], "big") >> 1

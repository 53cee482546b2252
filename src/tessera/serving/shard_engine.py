"""The gateway's side of decoding over peers: an `Engine` whose stages are elsewhere.

Invariants: each generation is one session with a name of 128 random bits; it is closed at every stage when the
generator is closed, however that happens; a token counts only from the last stage's holder, at the position asked for.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import anyio

from tessera.core.errors import Invalid, Late, Misbehaviour, TesseraError, Unavailable
from tessera.serving.engine import Sampling, Token
from tessera.serving.links import PROTOCOL, Limits, Link, Roster, Transport

__all__ = ["ShardEngine", "ShardEngineConfig"]


@dataclass(frozen=True, slots=True)
class ShardEngineConfig:
    """What the gateway must know of the model, and how long it waits. Times in seconds."""

    context: int
    vocab_size: int
    open_timeout_s: float = 10.0  # to reach a stage, and for the whole chain to be ready
    step_timeout_s: float = 30.0  # for one token through all stages; the prompt is one step


class ShardEngine:
    """Decodes over the peers of `roster`. Any number of generations at once; the stages bound theirs."""

    def __init__(self, transport: Transport, roster: Roster, config: ShardEngineConfig) -> None:
        self._transport = transport
        self._roster = roster
        self._config = config

    @property
    def context(self) -> int:
        return self._config.context

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Token, None]:
        """See `Engine.generate`. Cost: one hop for each boundary and two for the gateway, for each token."""
        if sampling.logprobs is not None:
            raise Invalid("this model's stages tell no log-probabilities", param="logprobs")
        ids = self._check_prompt(prompt, sampling)
        session = _Session(self._transport, self._roster, self._config)
        position = 0
        try:
            await session.open(sampling)
            for _ in range(sampling.max_tokens):
                position += len(ids)
                token = await session.step(position - len(ids), ids)
                if token in sampling.stop:
                    return
                yield Token(token)
                ids = [token]
        finally:
            await session.close()

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        raise Invalid("this model's stages tell no hidden states", param="model")

    def _check_prompt(self, prompt: Sequence[int], sampling: Sampling) -> list[int]:
        ids = list(prompt)
        if not ids or any(type(token) is not int or not 0 <= token < self._config.vocab_size for token in ids):
            raise Invalid(f"a prompt is one or more token ids below {self._config.vocab_size}", param="prompt")
        if len(ids) + sampling.max_tokens > self._config.context:
            raise Invalid(
                f"{len(ids)} + {sampling.max_tokens} tokens do not fit a context of {self._config.context}",
                param="max_tokens",
            )
        return ids


class _Session:
    """The two streams of one generation: one into stage 0, one out of the last stage."""

    def __init__(self, transport: Transport, roster: Roster, config: ShardEngineConfig) -> None:
        self._transport = transport
        self._roster = roster
        self._config = config
        self._name = secrets.token_hex(16)
        self._links: list[Link] = []

    async def open(self, sampling: Sampling) -> None:
        """Listens at the last stage, then opens the chain. Raises: Unavailable, Late, or what a stage refused."""
        timeout_s = self._config.open_timeout_s
        listening = await self._link(self._roster.stages - 1)
        await listening.send({"op": "listen", "session": self._name}, timeout_s=timeout_s)
        await listening.await_ready(timeout_s)
        chain = await self._link(0)
        how = {"last": listening.peer, "sampling": sampling.to_dict()}
        await chain.send({"op": "open", "session": self._name, "stage": 0, **how}, timeout_s=timeout_s)
        await chain.await_ready(timeout_s)

    async def step(self, start: int, ids: list[int]) -> int:
        """Feeds `ids` at position `start` and returns the token that the last stage chose after them."""
        listening, chain = self._links
        await chain.send({"op": "step", "start": start}, ids, timeout_s=self._config.open_timeout_s)
        frame = await listening.receive(self._config.step_timeout_s)
        if frame is None:
            raise Unavailable("the last stage ended the session")
        if frame.op != "token" or frame.header.get("position") != start + len(ids) or len(frame.ids) != 1:
            raise Misbehaviour(f"expected the token at {start + len(ids)}", evidence=str(frame.header)[:200])
        return frame.ids[0]

    async def close(self) -> None:
        """Tells stage 0 goodbye, which travels down the chain; hangs up on the last stage. Never raises."""
        with anyio.CancelScope(shield=True):
            for link in reversed(self._links):
                await link.close()

    async def _link(self, stage: int) -> Link:
        """To the first worker of `stage` who answers. Raises what the last of them said."""
        holders = self._roster.holders(stage)
        failure: TesseraError = Unavailable(f"nobody holds stage {stage}")
        for record in holders:
            try:
                share_s = self._config.open_timeout_s / len(holders)
                stream = await self._transport.open(record, PROTOCOL, timeout_s=share_s)
            except (Unavailable, Late) as error:
                failure = error
                continue
            link = Link(stream, Limits(tokens=1, vocab_size=self._config.vocab_size))
            self._links.append(link)
            return link
        raise failure

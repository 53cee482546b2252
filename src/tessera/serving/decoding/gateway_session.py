"""The gateway's end of one session: a stream into stage 0, one out of the last stage, and what goes over them.

Invariants: a session has a name of 128 random bits; it is closed at every stage when it is closed here; a token counts
only from the last stage's holder, at the position asked for, and a guess only when the last stage chose it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio

from tessera.core.errors import Conflict, Late, Misbehaviour, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.serving.decoding.dialling import Dialler
from tessera.serving.decoding.frames import Frame, unpack_hidden, unpack_logprobs
from tessera.serving.decoding.links import Link, Roster
from tessera.serving.decoding.shards import check_kept
from tessera.serving.decoding.speculation import Drafter, Pace
from tessera.serving.engine import Sampling, Token

__all__ = ["GatewaySession", "ShardEngineConfig"]


@dataclass(frozen=True, slots=True)
class ShardEngineConfig:
    """What the gateway must know of the model, and how long it waits. Times in seconds."""

    context: int
    vocab_size: int
    open_timeout_s: float = 10.0  # to reach a stage, and for the whole chain to be ready
    step_timeout_s: float = 30.0  # for a step through all stages; a prompt is as many as it has pieces
    piece_tokens: int = 64  # of a prompt, sent one after the other; the stages allow 128
    run_tokens: int = 16  # that the stages make by themselves before they ask for more
    recoveries: int = 3  # times that a session is opened anew without a token in between
    recovery_pause_s: float = 0.1  # before it is opened anew, doubled each time


class GatewaySession:
    """Use `open` once, then `tokens` or `hidden`, then `close` in any case."""

    def __init__(
        self,
        dialler: Dialler,
        roster: Roster,
        config: ShardEngineConfig,
        sampling: Sampling | None,
        voucher: list[Any] | None = None,
    ) -> None:
        self._dialler = dialler
        self._roster = roster
        self._config = config
        self._sampling = sampling
        self._voucher = voucher
        self._name = secrets.token_hex(16)
        self._chain: Link | None = None
        self._listening: Link | None = None
        self._fed = 0  # tokens that the stages have, guesses that turned out wrong not counted
        self._running = 0  # tokens that they still make by themselves

    @property
    def last(self) -> PeerId:
        """The last stage's worker, once it is open."""
        if self._listening is None:
            raise RuntimeError("the session is not open")
        return self._listening.peer

    async def open(self, text: Sequence[int]) -> None:
        """Listens at the last stage, then opens the chain for `text`. Raises: Unavailable, Late, Misbehaviour."""
        timeout_s, last = self._config.open_timeout_s, self._roster.stages - 1
        self._listening, _ = await self._dialler.reach(self._roster.holders(last), self._listen, timeout_s=timeout_s)
        whom = self._listening.peer
        firsts = [holder for holder in self._roster.holders(0) if last > 0 or holder.id == whom]
        try:
            greet = partial(self._open, list(text), whom)
            self._chain, self._fed = await self._dialler.reach(firsts, greet, timeout_s=timeout_s)
        except (Unavailable, Late):
            self._dialler.blame(whom)  # perhaps it is the one whom the others do not reach
            raise

    async def tokens(self, text: Sequence[int], most: int, drafter: Drafter | None, pace: Pace) -> list[Token]:
        """The next one to `most` tokens after `text`, which is all so far.

        Raises: Unavailable, Late: a stage is gone; open another session with the text.  Misbehaviour.
        """
        guesses = list[int]()
        if self._running:
            self._running -= 1
            timeout_s = self._config.step_timeout_s
        else:
            count = min(pace.count(), most - 1) if drafter is not None else 0
            guesses = list(await drafter.propose(text, count))[:count] if drafter is not None and count else []
            self._running = 0 if guesses else min(most, self._config.run_tokens if drafter is None else 4) - 1
            timeout_s = await self._feed(list(text[self._fed :]), guesses)
        frame = await self._receive(timeout_s)
        tokens = self._read(frame, len(text), guesses)
        if guesses:
            pace.note(len(guesses), len(tokens) - 1)
        self._fed = len(text) + len(tokens) - 1
        return tokens

    async def hidden(self, text: Sequence[int]) -> list[float]:
        """The last hidden state at the last token of `text`. Raises: as `tokens`."""
        frame = await self._receive(await self._feed(list(text[self._fed :]), []))
        if frame.op != "hidden" or frame.header.get("position") != len(text):
            raise Misbehaviour(f"expected the hidden state at {len(text)}", evidence=str(frame.header)[:200])
        return unpack_hidden(frame.payload)

    async def close(self) -> None:
        """Tells stage 0 goodbye, which travels down the chain; hangs up on the last stage. Never raises."""
        with anyio.CancelScope(shield=True):
            for link in (self._chain, self._listening):
                if link is not None:
                    await link.close()

    def blame(self, error: TesseraError) -> None:
        """Whoever failed us is to be asked last from now on."""
        if self._listening is None or self._chain is None or error.fields.get("peer_code") == Conflict.code:
            return
        at = error.fields.get("stage")
        if at == 0 or error.fields.get("link") == "chain":
            self._dialler.blame(self._chain.peer)
        elif at == self._roster.stages - 1 or error.fields.get("link") == "listening":
            self._dialler.blame(self._listening.peer)

    async def _listen(self, link: Link) -> None:
        timeout_s = self._config.open_timeout_s
        await link.send({"op": "listen", "session": self._name, "ring": False}, timeout_s=timeout_s)
        await link.await_ready(timeout_s)

    async def _open(self, text: list[int], last: str, link: Link) -> int:
        timeout_s = self._config.open_timeout_s
        sampling = None if self._sampling is None else self._sampling.to_dict()
        header = {"op": "open", "session": self._name, "stage": 0, "last": last, "sampling": sampling}
        header |= {} if self._voucher is None else {"voucher": self._voucher}
        await link.send(header, text, timeout_s=timeout_s)
        return check_kept(await link.await_ready(timeout_s), len(text))

    async def _feed(self, ids: list[int], guesses: list[int]) -> float:
        """Sends what the stages have not seen, in pieces, and the guesses with the last. Returns how long to wait."""
        size, start = self._config.piece_tokens, self._fed
        pieces = [ids[at : at + size] for at in range(0, len(ids), size)]
        for piece in pieces[:-1]:
            await self._send({"op": "step", "start": start, "want": 0, "more": 0}, piece)
            start += len(piece)
        header = {"op": "step", "start": start, "want": 1 + len(guesses), "more": self._running}
        await self._send(header, pieces[-1] + guesses)
        return self._config.step_timeout_s * len(pieces)

    async def _send(self, header: dict[str, object], ids: list[int]) -> None:
        if self._chain is None:
            raise RuntimeError("the session is not open")
        try:
            await self._chain.send(header, ids, timeout_s=self._config.step_timeout_s)
        except (Unavailable, Late) as error:
            error.fields["link"] = "chain"
            raise

    async def _receive(self, timeout_s: float) -> Frame:
        if self._listening is None:
            raise RuntimeError("the session is not open")
        try:
            frame = await self._listening.receive(timeout_s)
        except (Unavailable, Late) as error:
            if "peer_code" not in error.fields:
                error.fields["link"] = "listening"
            raise
        if frame is None:
            raise Unavailable("the last stage ended the session")
        return frame

    def _read(self, frame: Frame, position: int, guesses: list[int]) -> list[Token]:
        ids, sampling = frame.ids, self._sampling
        if frame.op != "token" or frame.header.get("position") != position or not 1 <= len(ids) <= 1 + len(guesses):
            raise Misbehaviour(f"expected the token at {position}", evidence=str(frame.header)[:200])
        if ids[:-1] != guesses[: len(ids) - 1]:
            raise Misbehaviour("a token that was not guessed came as one that was", evidence=str(frame.header)[:200])
        return unpack_logprobs(ids, frame.payload, sampling.logprobs if sampling is not None else None)

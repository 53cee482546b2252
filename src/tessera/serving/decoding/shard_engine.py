"""The gateway's side of decoding over peers: an `Engine` whose stages are elsewhere.

Invariants: whatever a generation holds is freed at every stage when its generator is closed, however that happens; a
stage that is gone is replaced, and the text goes on with the tokens that it would have had; guesses change no text.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence

import anyio
import structlog

from tessera.core.errors import Invalid, Late, PaymentRequired, Refused, Unavailable
from tessera.core.ids import PeerId
from tessera.serving.decoding.dialling import Dialler
from tessera.serving.decoding.frames import LOGPROB_BYTES
from tessera.serving.decoding.gateway_session import GatewaySession, ShardEngineConfig
from tessera.serving.decoding.links import Limits, Roster, Transport
from tessera.serving.decoding.speculation import Draft, Pace
from tessera.serving.decoding.stage_session import MAX_GUESSES
from tessera.serving.engine import Sampling, Token
from tessera.serving.income.dues import Dues, NoDues

__all__ = ["ShardEngine", "ShardEngineConfig"]

HIDDEN_BYTES = 4 * 65_536  # of the widest hidden state
FINAL = frozenset({Refused.code, PaymentRequired.code, Invalid.code})  # of a stage: asking again changes nothing
log = structlog.get_logger()


class ShardEngine:
    """Decodes over the peers of `roster`. Any number of generations at once; the stages bound theirs.

    Args:
        draft: guesses what comes next; None = nothing is guessed.
        dues: what workers are shown and owed; None = they serve for nothing.
    """

    def __init__(
        self,
        transport: Transport,
        roster: Roster,
        config: ShardEngineConfig,
        *,
        draft: Draft | None = None,
        dues: Dues | None = None,
    ) -> None:
        self._roster = roster
        self._config = config
        self._draft = draft
        self._dues = dues or NoDues()
        payload = max(HIDDEN_BYTES, (MAX_GUESSES + 1) * LOGPROB_BYTES)
        self._dialler = Dialler(transport, Limits(MAX_GUESSES + 1, config.vocab_size, payload))
        self.guessed = self.right = 0  # tokens guessed by the draft, and those of them that came
        self.recoveries = 0  # sessions opened anew because a stage was gone

    @property
    def context(self) -> int:
        return self._config.context

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Token, None]:
        """See `Engine.generate`. Cost: one hop for each boundary and one back to stage 0, for each round of tokens."""
        text = self._check(prompt, sampling.max_tokens)
        end = len(text) + sampling.max_tokens
        drafter = None if self._draft is None else self._draft.begin()
        pace, failures = Pace(), 0
        answer, got = secrets.token_hex(16), _Got(len(text))
        voucher = self._dues.voucher(answer, end)
        try:
            while len(text) < end:
                session = GatewaySession(self._dialler, self._roster, self._config, sampling, voucher)
                try:
                    await session.open(text)
                    while len(text) < end:
                        tokens = await session.tokens(text, end - len(text), drafter, pace)
                        got.note(session.last, len(tokens))
                        for token in tokens:
                            if token.id in sampling.stop:
                                return
                            text.append(token.id)
                            failures = 0
                            yield token
                except (Unavailable, Late) as error:
                    session.blame(error)
                    failures = await self._again(error, failures)
                finally:
                    await session.close()
        finally:
            if got.by_worker:
                self._dues.delivered(answer, got.by_worker)
            self.guessed += pace.guessed
            self.right += pace.right

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        """See `Engine.embed`."""
        text, failures = self._check(prompt, 0), 0
        answer = secrets.token_hex(16)
        voucher = self._dues.voucher(answer, len(text))
        while True:
            session = GatewaySession(self._dialler, self._roster, self._config, None, voucher)
            try:
                await session.open(text)
                hidden = await session.hidden(text)
                self._dues.delivered(answer, {session.last: len(text)})
                return hidden
            except (Unavailable, Late) as error:
                session.blame(error)
                failures = await self._again(error, failures)
            finally:
                await session.close()

    async def _again(self, error: Unavailable | Late, failures: int) -> int:
        """Returns when it is time for another try, and how many there were. Raises: `error` when there is no use."""
        if failures >= self._config.recoveries or error.fields.get("peer_code") in FINAL:
            raise error
        self.recoveries += 1
        log.info("session_opened_anew", error=error.code, at=error.fields.get("stage"), failures=failures + 1)
        if failures:  # the first time somebody else is there, most likely
            await anyio.sleep(self._config.recovery_pause_s * 2 ** (failures - 1))
        return failures + 1

    def _check(self, prompt: Sequence[int], more: int) -> list[int]:
        ids = list(prompt)
        if not ids or any(type(token) is not int or not 0 <= token < self._config.vocab_size for token in ids):
            raise Invalid(f"a prompt is one or more token ids below {self._config.vocab_size}", param="prompt")
        if len(ids) + more > self._config.context:
            raise Invalid(
                f"{len(ids)} + {more} tokens do not fit a context of {self._config.context}", param="max_tokens"
            )
        return ids


class _Got:
    """How many tokens came from whom of the last stage: the prompt counts with the first that came."""

    def __init__(self, prompt: int) -> None:
        self._prompt = prompt
        self.by_worker: dict[PeerId, int] = {}

    def note(self, worker: PeerId, tokens: int) -> None:
        self.by_worker[worker] = self.by_worker.get(worker, 0) + tokens + self._prompt
        self._prompt = 0

"""Decoding with one stage: a few new tokens of a session at a time, keys and values of the old ones kept.

Token ids go to every stage (the codec's tables need them); the message goes from stage to stage; the last stage
gives logits. Feeding the same ids in one call or one by one gives the same text up to float rounding.

Legend: T new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tessera.core.errors import Conflict, Invalid, Unavailable
from tessera.models.codec import HISTORY
from tessera.models.decoder import LayerCache
from tessera.models.stage import Stage
from tessera.models.trainer import StageTrainer, receive
from tessera.models.wire import Wire

__all__ = ["StageDecoder"]

SESSION_NAME_LIMIT = 128  # characters


@dataclass
class _Session:
    caches: list[LayerCache]
    filled: int = 0
    history: list[int] = field(default_factory=list)  # the last tokens, for the codec's convolution


class StageDecoder:
    """Sessions over one stage. Not safe for use from two threads at once.

    Args:
        max_sessions: kept at most; a new one beyond it is `Unavailable` until another is dropped.
    """

    def __init__(self, source: StageTrainer | Stage, *, max_sessions: int = 64) -> None:
        self.stage = source.whole_stage() if isinstance(source, StageTrainer) else source
        self.spec = self.stage.spec
        self.max_sessions = max_sessions
        self._wire = Wire(self.spec)
        self._sessions: dict[str, _Session] = {}

    @torch.no_grad()
    def step(
        self, session: str, ids: list[int], payload: bytes | None, *, position: int | None = None
    ) -> bytes | Float[Tensor, " V"]:
        """Feeds `ids` after everything that the session has seen; its first call opens it.

        Args:
            payload: the message of the stage before for these ids; None on stage 0.
            position: how many tokens the caller thinks were seen; checked when given, so that a session which was
                dropped in between cannot go on from nothing.

        Returns: the message for the next stage; on the last one the logits [V] after the last of `ids`, float32.

        Raises: Invalid: bad ids or payload, or the context is full.  Conflict: another position.
            Unavailable: too many sessions.  The session is as before then.
        """
        tokens = self._check_ids(ids)
        known = self._sessions.get(session)
        filled = known.filled if known is not None else 0
        if position is not None and position != filled:
            raise Conflict(f"the session is at token {filled}, not {position}", position=filled)
        if filled + len(tokens) > self.spec.model.context:
            raise Invalid(f"{filled} + {len(tokens)} tokens do not fit a context of {self.spec.model.context}")
        message = receive(self.stage, self._wire, payload, 1, len(tokens))
        state = known if known is not None else self._open(session)
        out = self._run(state, tokens, message)
        self._sessions[session] = state
        return self._wire.pack(out) if not self.stage.last else out[0, -1].to("cpu", torch.float32)

    def drop(self, session: str) -> None:
        """Forgets a session and frees its cache. Unknown ones are fine."""
        self._sessions.pop(session, None)

    def position(self, session: str) -> int:
        """Tokens that the session has seen; 0 for an unknown one."""
        state = self._sessions.get(session)
        return state.filled if state is not None else 0

    def __len__(self) -> int:
        return len(self._sessions)

    def payload_limit(self, tokens: int) -> int:
        """Exact bytes of a message for so many new tokens."""
        return self._wire.size(1, tokens)

    def _run(self, state: _Session, tokens: list[int], message: Tensor | None) -> Tensor:
        skip = len(state.history)
        row = torch.tensor([state.history + tokens], device=self.stage.device)
        out = self.stage(row, message, state.caches, state.filled, skip)
        state.filled += len(tokens)
        state.history = (state.history + tokens)[-HISTORY:]
        return out

    def _open(self, session: str) -> _Session:
        if not session or len(session) > SESSION_NAME_LIMIT:
            raise Invalid(f"a session's name has 1 to {SESSION_NAME_LIMIT} characters, not {len(session)}")
        if len(self._sessions) >= self.max_sessions:
            raise Unavailable(f"{self.max_sessions} sessions are open on this stage", retry_after_s=2.0)
        count = len(self.spec.cuts()[self.stage.index])
        return _Session([LayerCache(self.spec.model, self.stage.device) for _ in range(count)])

    def _check_ids(self, ids: list[int]) -> list[int]:
        if not ids:
            raise Invalid("no token ids to decode")
        vocabulary = self.spec.model.vocab_size
        for token in ids:
            if type(token) is not int or not 0 <= token < vocabulary:
                raise Invalid(f"token id {token!r}: expected an integer from 0 to {vocabulary - 1}")
        return list(ids)

"""Decoding with one stage: new tokens of many sessions in one forward, keys and values of the old ones kept.

Token ids go to every stage (the codec's tables need them); the message goes from stage to stage; the last stage gives
logits. On a CPU a session's numbers do not depend, to the last bit, on how its text was cut into steps, nor on what
else is computed (`tessera.models.pages` says why), so whoever computes a text again gets what was there before.

Invariants: memory is bounded by pages and sessions; a session that had to make way is refused at its next step, and
goes on when it is opened again with its text; a refused step leaves its session as it was; params that changed leave
nothing of the old ones.

Legend: N new tokens of all sessions, W message width, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tessera.core.errors import Conflict, Invalid, TesseraError, Unavailable
from tessera.core.hashing import sha256
from tessera.models.codec import HISTORY
from tessera.models.pages import PAGE, ROWS, Batch, Pages, Span, page_bytes, round_up
from tessera.models.prefixes import Prefixes
from tessera.models.stage import Stage
from tessera.models.steps import Step
from tessera.models.trainer import StageTrainer, receive
from tessera.models.wire import Wire

__all__ = ["StageDecoder"]

CACHE_BYTES = 1 << 30
IDLE_BATCHES = 64  # a session that so many forwards went without may have to make way
SESSION_NAME_LIMIT = 128  # characters


@dataclass
class _Session:
    root: bytes  # names where the messages come from, for what is kept of it
    ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    messages: list[bytes] = field(default_factory=list)  # that this stage made, for each token; none on the last one
    keys: list[bytes] = field(default_factory=list)  # of its pages that are kept
    final: int = 0  # tokens that are no guess
    batch: int = 0  # in which it was computed last


@dataclass
class _Work:
    """A step that is in order."""

    step: Step
    session: _Session
    message: Tensor | None

    @property
    def end(self) -> int:
        return len(self.session.ids) + len(self.step.ids)


class StageDecoder:
    """Sessions over one stage. Not safe for use from two threads at once.

    Args:
        max_sessions: kept at most; a new one beyond it is `Unavailable` until another is dropped.
        cache_bytes: most for keys, values and messages; None = what `max_sessions` texts of full length need, 1 GiB at
            most.
    """

    def __init__(self, source: StageTrainer | Stage, *, max_sessions: int = 64, cache_bytes: int | None = None) -> None:
        self._trainer = source if isinstance(source, StageTrainer) else None
        self.stage = source.whole_stage() if isinstance(source, StageTrainer) else source
        self.spec = self.stage.spec
        self.max_sessions = max_sessions
        self.forwards = self.tokens = 0  # computed so far
        self._wire = Wire(self.spec)
        self._layers = len(self.spec.cuts()[self.stage.index])
        self._page_bytes = page_bytes(self.spec.model, self._layers)
        if not self.stage.last:
            self._page_bytes += self._wire.size(1, PAGE)
        most = max_sessions * -(-self.spec.model.context // PAGE)
        limit = CACHE_BYTES if cache_bytes is None else cache_bytes
        if limit < self._page_bytes:
            raise Invalid(f"{limit} bytes hold no page of {self._page_bytes}: raise the limit")
        self._pages = Pages(self.spec.model, self._layers, min(most, limit // self._page_bytes), self.stage.device)
        self._prefixes = Prefixes(self._pages)
        self._sessions: dict[str, _Session] = {}
        self._version = self._params_version()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def held_bytes(self) -> int:
        """Memory of all pages in use, by sessions or kept of earlier ones."""
        return (self._pages.total - self._pages.free) * self._page_bytes

    def open(self, session: str, ids: Sequence[int], *, source: str = "") -> int:
        """A session for the text `ids`, of which it may know a beginning already.

        Args:
            source: whose messages will come. Only what came from the same source is used again, so that nobody's
                wrong messages spoil what others send.

        Returns: the tokens that need not be fed: a multiple of the page, fewer than there are. Its messages are there.

        Raises: Invalid: bad ids or name.  Conflict: it is open.  Unavailable: too many sessions.
        """
        self._forget_old_params()
        tokens = self._check_ids(ids)
        if session in self._sessions:
            raise Conflict("this session is open already")
        if len(tokens) > self.spec.model.context:
            raise Invalid(f"{len(tokens)} tokens do not fit a context of {self.spec.model.context}")
        state = self._new(session, source)
        for prefix in self._prefixes.find(state.root, tokens[:-1]):
            self._pages.hold(prefix.page)
            state.pages.append(prefix.page)
            state.keys.append(prefix.key)
            state.messages += prefix.messages
        state.final = len(state.pages) * PAGE
        state.ids = tokens[: state.final]
        return state.final

    @torch.no_grad()
    def run(self, steps: Sequence[Step]) -> list[bytes | Tensor | TesseraError]:
        """Computes one step of each of several sessions together.

        Returns: for each step the message for the next stage; on the last one logits [want, V] or hidden states
        [want, D] of the last `want` ids, float32; or why it was refused: Invalid, Conflict, or Unavailable for memory.
        """
        self._forget_old_params()
        if len({step.session for step in steps}) < len(steps):
            raise RuntimeError("two steps of one session in one batch")
        self.forwards += 1
        answers: dict[str, bytes | Tensor | TesseraError] = {}
        works = list[_Work]()
        for step in steps:
            try:
                works.append(self._prepare(step))
            except TesseraError as error:
                answers[step.session] = error
        if works:
            answers |= self._compute(works)
        return [answers[step.session] for step in steps]

    def step(
        self, session: str, ids: list[int], payload: bytes | None, *, position: int | None = None
    ) -> bytes | Float[Tensor, " V"]:
        """`run` for one session; a new one is opened. On the last stage the logits [V] after the last of `ids`.

        Raises: what `run` gives.
        """
        (answer,) = self.run([Step(session, ids, payload, position)])
        if isinstance(answer, TesseraError):
            raise answer
        return answer if isinstance(answer, bytes) else answer[-1]

    def messages(self, session: str, start: int, end: int) -> bytes:
        """What this stage sends to the next for tokens `start` to `end` of a session, computed before."""
        state = self._sessions.get(session)
        if state is None or not 0 <= start < end <= len(state.messages):
            raise Conflict(f"tokens {start} to {end} were not computed here")
        return self._wire.join(state.messages[start:end])

    def drop(self, session: str) -> None:
        """Forgets a session. What it has in full pages is kept while there is room. Unknown ones are fine."""
        if (state := self._sessions.pop(session, None)) is not None:
            self._prefixes.used(state.keys)
            for page in state.pages:
                self._pages.release(page)

    def position(self, session: str) -> int:
        """Tokens that the session has seen; 0 for an unknown one."""
        state = self._sessions.get(session)
        return len(state.ids) if state is not None else 0

    def payload_limit(self, tokens: int) -> int:
        """Exact bytes of a message for so many new tokens."""
        return self._wire.size(1, tokens)

    # --- before the forward -----------------------------------------------------------------------------------------

    def _prepare(self, step: Step) -> _Work:
        """Everything that can be refused is refused here, before anything changes."""
        tokens = self._check_ids(step.ids)
        known = self._sessions.get(step.session)
        filled, final = (len(known.ids), known.final) if known is not None else (0, 0)
        start = filled if step.start is None else step.start
        if not final <= start <= filled:
            raise Conflict(f"the session is at token {filled}, not {start}", position=filled)
        if start + len(tokens) > self.spec.model.context:
            raise Invalid(f"{start} + {len(tokens)} tokens do not fit a context of {self.spec.model.context}")
        if not 0 <= step.want <= len(tokens):
            raise Invalid(f"what follows {step.want} of {len(tokens)} tokens cannot be told")
        message = receive(self.stage, self._wire, step.payload, 1, len(tokens))
        state = known if known is not None else self._new(step.session, "")
        try:
            state.batch = self.forwards  # from here on it is not idle
            while len(state.pages) * PAGE < start + len(tokens):
                state.pages.append(self._take_page())
        except Unavailable:
            if known is None:
                self.drop(step.session)
            raise
        del state.ids[start:], state.messages[start:]
        return _Work(step, state, message)

    def _take_page(self) -> int:
        """A free page: at the cost of what is kept of earlier sessions, then of sessions that are idle."""
        while not self._pages.free and not self._prefixes.free_one():
            oldest = min(self._sessions, key=lambda name: self._sessions[name].batch)
            if self._sessions[oldest].batch + IDLE_BATCHES > self.forwards:
                break
            self.drop(oldest)
        return self._pages.take()

    def _new(self, session: str, source: str) -> _Session:
        if not session or len(session) > SESSION_NAME_LIMIT:
            raise Invalid(f"a session's name has 1 to {SESSION_NAME_LIMIT} characters, not {len(session)}")
        if len(self._sessions) >= self.max_sessions:
            raise Unavailable(f"{self.max_sessions} sessions are open on this stage", retry_after_s=2.0)
        state = self._sessions[session] = _Session(sha256(source.encode()), batch=self.forwards)
        return state

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        if not ids:
            raise Invalid("no token ids to decode")
        vocabulary = self.spec.model.vocab_size
        for token in ids:
            if type(token) is not int or not 0 <= token < vocabulary:
                raise Invalid(f"token id {token!r}: expected an integer from 0 to {vocabulary - 1}")
        return list(ids)

    def _params_version(self) -> int:
        return 0 if self._trainer is None else self._trainer.step

    def _forget_old_params(self) -> None:
        """What was computed before a training step is of another model."""
        if (version := self._params_version()) != self._version:
            self._version = version
            self._prefixes.clear()
            for session in list(self._sessions):
                self.drop(session)

    # --- the forward ------------------------------------------------------------------------------------------------

    def _compute(self, works: list[_Work]) -> dict[str, bytes | Tensor | TesseraError]:
        batch = Batch(self._pages, [Span(w.session.pages, len(w.session.ids), len(w.step.ids)) for w in works])
        count = batch.tokens
        self.tokens += count
        pad = round_up(count, ROWS) - count
        windows, messages = self._inputs(works)
        message = None if messages is None else F.pad(messages, (0, 0, 0, pad))[:, None]
        x_N1D, known = self.stage.codec.enter(F.pad(windows, (0, 0, 0, pad)), message, HISTORY)
        rotation = self.stage.rotation(F.pad(batch.positions, (0, pad)))
        attentions = [batch.attention(layer) for layer in range(self._layers)]
        x_N1D = self.stage.through(x_N1D.transpose(0, 1), rotation, attentions).transpose(0, 1)
        if self.stage.last:
            return self._tell(works, x_N1D[:count, 0])
        return self._pass_on(works, self.stage.codec.leave(x_N1D, known)[:count, 0])

    def _inputs(self, works: list[_Work]) -> tuple[Tensor, Tensor | None]:
        """Each new token's id after those of `HISTORY` tokens before it [N, HISTORY + 1]; the messages [N, W]."""
        windows, messages = list[list[int]](), list[Tensor]()
        for work in works:
            before = work.session.ids[-HISTORY:]
            text = [-1] * (HISTORY - len(before)) + before + work.step.ids
            windows += [text[i : i + HISTORY + 1] for i in range(len(work.step.ids))]
            if work.message is not None:
                messages.append(work.message[0])
        table = torch.tensor(windows, device=self.stage.device)
        return table, torch.cat(messages) if messages else None

    def _tell(self, works: list[_Work], x_ND: Tensor) -> dict[str, bytes | Tensor | TesseraError]:
        """The last stage's answers, from what left its layers."""
        rows, end = list[int](), 0
        for work in works:
            end += len(work.step.ids)
            rows += range(end - work.step.want, end)
        pad = round_up(max(1, len(rows)), ROWS) - len(rows)
        hidden = self.stage.hidden(F.pad(x_ND[rows], (0, 0, 0, pad)))
        logits = None
        if any(work.step.want and not work.step.hidden for work in works):
            logits = self.stage.logits(hidden).to("cpu", torch.float32)
        hidden = hidden.to("cpu", torch.float32)
        answers, at = dict[str, bytes | Tensor | TesseraError](), 0
        for work in works:
            told = hidden if work.step.hidden or logits is None else logits
            answers[work.step.session] = told[at : at + work.step.want]
            at += work.step.want
            self._advance(work)
        return answers

    def _pass_on(self, works: list[_Work], out_NW: Tensor) -> dict[str, bytes | Tensor | TesseraError]:
        """The messages for the next stage. One session's overflow is not another's."""
        out_NW = out_NW.to("cpu", torch.float32)
        finite = torch.isfinite(out_NW).all(-1)
        packed = self._wire.pack(torch.where(finite[:, None], out_NW, 0.0)[None])
        each = self._wire.split(packed, [1] * len(out_NW))
        answers, at = dict[str, bytes | Tensor | TesseraError](), 0
        for work in works:
            end = at + len(work.step.ids)
            if bool(finite[at:end].all()):
                work.session.messages += each[at:end]
                answers[work.step.session] = self._wire.join(each[at:end])
                self._advance(work)
            else:
                self.drop(work.step.session)
                answers[work.step.session] = Invalid("the session's numbers are not finite: its messages are damaged")
            at = end
        return answers

    def _advance(self, work: _Work) -> None:
        """Takes the tokens into the session, and keeps the pages that have become full and final."""
        state = work.session
        state.final = len(state.ids) + work.step.final
        state.ids += work.step.ids
        while (len(state.keys) + 1) * PAGE <= state.final:
            place = len(state.keys)
            cut = slice(place * PAGE, (place + 1) * PAGE)
            key = Prefixes.key(state.keys[-1] if state.keys else state.root, state.ids[cut])
            kept = self._prefixes.keep(key, state.pages[place], state.messages[cut])
            if kept.page != state.pages[place]:  # another session was first: its page will do
                self._pages.hold(kept.page)
                self._pages.release(state.pages[place])
                state.pages[place] = kept.page
            state.keys.append(key)

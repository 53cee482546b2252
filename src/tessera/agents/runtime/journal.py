"""One process's reading and writing of a run's steps: first what was recorded, in order, then what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio.to_thread

from tessera.agents.steps import Step, StepLedger, Turn
from tessera.core.errors import Conflict

__all__ = ["Journal", "RecordEnds"]


class RecordEnds(Exception):
    """A replay has come to the end of what was recorded."""


class Journal:
    """Args:
    turn: None only reads: a replay.
    """

    def __init__(self, ledger: StepLedger, steps: Sequence[Step], turn: Turn | None) -> None:
        self._ledger, self._steps, self._turn = ledger, list(steps), turn
        self._next = 0

    def peek(self) -> Step | None:
        """The next step that was recorded; None when what comes now is new."""
        return self._steps[self._next] if self._next < len(self._steps) else None

    def take(self, kind: str) -> Step:
        """Raises: Conflict when the run now goes another way than the recorded one."""
        step = self.peek()
        if step is None or step.kind != kind:
            found = "nothing more" if step is None else f"{step.kind!r} at step {step.number}"
            raise Conflict(f"the run does not go as it was recorded: now {kind!r}, recorded is {found}")
        self._next += 1
        return step

    async def add(self, kind: str, body: dict[str, Any]) -> Step:
        """Write down what is new.

        Raises: RecordEnds in a replay; Conflict when another process has taken the run over.
        """
        if self._turn is None:
            raise RecordEnds(f"the record ends before {kind!r}: a replay makes nothing new")
        turn, step = self._turn, Step(len(self._steps), kind, body)
        await anyio.to_thread.run_sync(lambda: self._ledger.add(turn, step))
        self._steps.append(step)
        self._next = len(self._steps)
        return step

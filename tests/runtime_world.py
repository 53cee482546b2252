"""What the tests of running agents share: a desk with mail and a bank, ledgers that die, a person who answers."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from agents_world import APPROVER, NOW
from tessera.agents.approvals import Approval, Approvals, Request, approve
from tessera.agents.memory import Memory
from tessera.agents.runtime.agent import Agent, Tool
from tessera.agents.runtime.models import scripted
from tessera.agents.runtime.session import Outcome, Runtime
from tessera.agents.steps import Step, StepLedger, Turn
from tessera.agents.tools import Source, ToolSpec, infer
from tessera.core.clock import FakeClock

PAL, THIEF = "pal@example.com", "thief@example.com"
LATE = "Write to pal@example.com that I am late"
OPENED: list[Any] = []


@pytest.fixture(autouse=True)
def close_desks() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


FOLDER = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
NUMBERS = itertools.count()


@cache
def empty_tables() -> Path:
    """A file with the tables: to make them anew takes longer than most of what is tested."""
    file = Path(FOLDER.name, "empty.sqlite")
    StepLedger(file).close()
    return file


def fresh_tables() -> Path:
    return Path(shutil.copy(empty_tables(), Path(FOLDER.name, f"{next(NUMBERS)}.sqlite")))


class Killed(BaseException):
    """The process is gone. No code of ours catches it."""


class DyingLedger(StepLedger):
    """Dies just before or just after the n-th step is on the disk."""

    def __init__(self, where: Any, dies_at: int = -1, *, after: bool = False, clock: Any = None) -> None:
        super().__init__(where, clock=clock)
        self.dies_at, self.after = dies_at, after

    def add(self, turn: Turn, step: Step) -> Step:
        if step.number == self.dies_at and not self.after:
            raise Killed
        added = super().add(turn, step)
        if step.number == self.dies_at:
            raise Killed
        return added


def mail(to: str, body: str = "I am late") -> dict[str, Any]:
    return {"tool": "send_email", "arguments": {"recipients": [to], "body": body}}


@dataclass
class Desk:
    """An agent with a mailbox. What left stands in `sent`; `inbox` is what strangers wrote."""

    where: Any
    lines: list[Any]
    inbox: list[dict[str, str]] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    ask: Callable[[Request], Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    clock: FakeClock = field(default_factory=lambda: FakeClock(NOW))
    dies_in_tool: bool = False
    repeatable: bool = False

    def __post_init__(self) -> None:
        if self.where == ":memory:":
            self.where = fresh_tables()
        self.ledger: StepLedger = StepLedger(self.where, clock=self.clock)
        self.approvals = Approvals(APPROVER.account, self.where, clock=self.clock)
        self.memory = Memory("clerk", self.where, clock=self.clock)
        OPENED.extend([self.ledger, self.approvals, self.memory])

    def agent(self) -> Agent:
        def send_email(recipients: list[str], body: str) -> dict[str, Any]:
            """Send an e-mail."""
            self.sent.append(recipients[0])
            if self.dies_in_tool:
                self.dies_in_tool = False
                raise Killed
            return {"sent": recipients}

        def read_inbox() -> list[dict[str, str]]:
            """What came in."""
            return self.inbox

        sending = infer("send_email", ["recipients", "body"])
        if self.repeatable:
            sending = ToolSpec("send_email", "send", sending.roles, repeatable=True)
        tools = [Tool(send_email, sending), Tool(read_inbox, infer("read_inbox", [], Source(author="sender")))]
        return Agent("clerk", scripted(self.lines), tools=tools, **self.settings)

    def runtime(self, ledger: StepLedger | None = None) -> Runtime:
        return Runtime(
            self.agent(), ledger or self.ledger, approvals=self.approvals, ask=self.ask, memory=self.memory
        )  # fmt: skip

    def yes(self, question: Request | None) -> None:
        """The person allows it."""
        assert question is not None
        self.approvals.grant(approve(question.call, APPROVER, NOW + 600))

    def kinds(self, outcome: Outcome) -> list[str]:
        return [step.kind for step in self.ledger.steps(outcome.run)]


async def says_yes(request: Request) -> Approval | None:
    return approve(request.call, APPROVER, NOW + 600)


async def says_no(request: Request) -> Approval | None:
    return None

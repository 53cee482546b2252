"""Every tool call of a run: judged by the guard, written down before and after, asked for where a person must be.

Invariants: no tool runs that the guard did not admit; none runs before `called` is written down, so a run that was
killed knows what may have happened; a call that may have happened is made again only when it reads, when it is
repeatable, or when a person says so; a person's word is used once, for these very arguments.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
from pydantic_ai.exceptions import ModelRetry, ToolFailed
from pydantic_core import to_json, to_jsonable_python

from tessera.agents.approvals import NO_MANDATE, Approval, Approvals, Call, Request
from tessera.agents.guard import Decision, Guard, Simulated
from tessera.agents.policy import Verdict
from tessera.agents.runtime.agent import Limits, Simulate
from tessera.agents.runtime.journal import Journal
from tessera.agents.steps import Step
from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Refused, TesseraError
from tessera.core.hashing import sha256

__all__ = ["Ask", "GuardedCalls", "Made", "NeedsPerson", "Waiting", "current_calls"]

Ask = Callable[[Request], Awaitable[Approval | None]]
Execute = Callable[[dict[str, Any]], Awaitable[Any]]
_CURRENT: ContextVar[GuardedCalls] = ContextVar("calls")
REQUEST_SHOWN = 500  # characters of the user's request, beside a question


class Waiting(Exception):
    """The run cannot go on before a person has answered. Not an error: it is resumed later."""

    def __init__(self, request: Request) -> None:
        super().__init__(f"{request.call.tool} waits for a person")
        self.request = request


class NeedsPerson(Exception):
    """Raised by a tool that needs a signature of its own, such as a payment above the mandate's `approve_above`.

    The call is made again when the approval is there; a tool that raises this must be repeatable.
    """

    def __init__(self, call: Call, evidence: Mapping[str, Any]) -> None:
        super().__init__(f"{call.tool} needs the approver's signature")
        self.call, self.evidence = call, evidence


@dataclass(frozen=True, slots=True)
class Made:
    """One call of the run, and what came of it. `decision` is what the guard says now, in a replay too."""

    decision: Decision
    kind: str  # returned or refused
    approved: bool
    answer: Any

    @property
    def holds(self) -> bool:
        """Whether the guard says now what was done then."""
        wanted = {"refused": ("deny", "ask"), "returned": ("allow", "ask") if self.approved else ("allow",)}
        return self.decision.answer in wanted[self.kind]


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What a simulation found when the call was made."""

    facts: dict[str, Any]

    @property
    def verdict(self) -> str:
        return str(self.facts["verdict"])

    def to_dict(self) -> dict[str, Any]:
        return self.facts


@dataclass
class GuardedCalls:
    """The calls of one run.

    Args:
        approvals: where questions are kept; None: nobody can be asked, and what needs a question is refused.
        ask: asks in place, and gives the approval or None for no; None ends the run as `Waiting`.
        stopped: the kill switch, looked at once more after a person has answered.
    """

    run: str
    guard: Guard
    journal: Journal
    approvals: Approvals | None = None
    ask: Ask | None = None
    mandate: str = NO_MANDATE
    limits: Limits = field(default_factory=Limits)
    simulations: Mapping[str, Simulate] = field(default_factory=dict)
    stopped: Callable[[], bool] = lambda: False
    made: list[Made] = field(default_factory=list)
    _begun: int = 0
    _asked: list[Step] = field(default_factory=list)  # about the present call

    async def call(self, tool: str, arguments: Mapping[str, Any], execute: Execute) -> Any:
        """What the model is told: the tool's result, or why there is none.

        Raises: Waiting; Conflict when the recorded run goes another way.
        """
        self._begun += 1
        self._asked = []
        try:
            return await self._go_on(tool, arguments, execute)
        finally:
            self.guard.questions += len(self._asked)

    async def _go_on(self, tool: str, arguments: Mapping[str, Any], execute: Execute) -> Any:
        called, open_question = None, False
        while (step := self.journal.peek()) is not None and step.kind in ("asked", "called"):
            self._check_same(self.journal.take(step.kind), tool, arguments)
            open_question = step.kind == "asked"
            if open_question:
                self._asked.append(step)
            else:
                called = step
        if step is None:
            if called is None:
                return await self._first(tool, arguments, execute, open_question)
            return await self._doubt(tool, arguments, execute, called, open_question)
        if called is None:
            self._check_same(self.journal.take("refused"), tool, arguments)
            self._keep(self._judge(tool, arguments), "refused", False, step)
        else:
            self.journal.take("returned")
            decision, approved, _ = self._recall(tool, arguments, called)
            self._keep(decision, "returned", approved, step)
        return step.body["answer"]

    def _recall(self, tool: str, arguments: Mapping[str, Any], called: Step) -> tuple[Decision, bool, Simulated | None]:
        """A call that was admitted before: what the guard says of it now, and what it knew of it then."""
        facts, approved = called.body.get("simulated"), called.body["approved"]
        simulated = None if facts is None else _Recorded(facts)
        decision = self._judge(tool, arguments, simulated)
        if approved:
            self.guard.endorse(decision)
        return decision, approved, simulated

    def _judge(self, tool: str, arguments: Mapping[str, Any], simulated: Simulated | None = None) -> Decision:
        """What the guard says now; arguments that it cannot even read are denied."""
        try:
            return self.guard.decide(tool, arguments, simulated)
        except (Refused, Invalid) as error:
            return Decision(Verdict("deny", (error.code,)), tool, dict(arguments), "", "", {"to": {}})

    # --- a call that is new -----------------------------------------------------------------------------------------

    async def _first(self, tool: str, arguments: Mapping[str, Any], execute: Execute, open_question: bool) -> Any:
        simulated = None
        try:
            if simulate := self.simulations.get(tool):
                simulated = await simulate(arguments)
            decision = self.guard.decide(tool, arguments, simulated)
            if decision.answer == "deny":
                rules = decision.verdict.rules
                raise Refused(f"{tool} is refused: {', '.join(rules)}", rule=rules[0])
            if approved := decision.answer == "ask":
                await self._allow(decision, decision.evidence, open_question)
        except (Refused, Invalid) as error:
            refused = {"refused": error.message, "rule": error.fields.get("rule", error.code)}
            step = await self.journal.add("refused", _named(tool, arguments) | {"answer": refused})
            self._keep(self._judge(tool, arguments), "refused", False, step)
            return refused
        return await self._make(decision, execute, approved, simulated)

    async def _make(
        self, decision: Decision, execute: Execute, approved: bool, simulated: Simulated | None = None
    ) -> Any:
        tool, arguments = decision.tool, decision.arguments
        body = _named(tool, arguments) | {"approved": approved}
        if simulated is not None:
            body["simulated"] = simulated.to_dict()
        called = await self.journal.add("called", body)
        failed = True
        try:
            answer = self._bounded(to_jsonable_python(await self._execute(execute, dict(arguments))))
            failed = False
        except TimeoutError:
            if not self._is_harmless(decision):
                return await self._doubt(tool, arguments, execute, called, False)
            answer = {"error": f"{tool} did not answer in {self.limits.tool_timeout_s:g} s"}
        except TesseraError as error:
            answer = {"error": error.message, "code": error.code}
        except (ModelRetry, ToolFailed) as error:
            answer = {"error": str(error)}
        return await self._returned(decision, approved, answer, failed)

    async def _execute(self, execute: Execute, arguments: dict[str, Any]) -> Any:
        """A tool's answer, after whatever it needs a person for."""
        holder = _CURRENT.set(self)
        try:
            while True:
                try:
                    with anyio.fail_after(self.limits.tool_timeout_s):
                        return await execute(dict(arguments))
                except NeedsPerson as needed:
                    await self._sign(needed)
        finally:
            _CURRENT.reset(holder)

    async def _sign(self, needed: NeedsPerson) -> None:
        approvals, call = self.approvals, needed.call
        if approvals is None:
            raise Refused(f"{call.tool} needs the approver, and nobody can be asked", rule="nobody")
        evidence = {**needed.evidence, "request": self.guard.knowledge.request[:REQUEST_SHOWN], "run": self.run}
        await anyio.to_thread.run_sync(approvals.request, call, evidence)
        state = await anyio.to_thread.run_sync(approvals.answer, call.digest)
        answer = await self._ask_person(approvals, call) if state == "waiting" else state
        if not isinstance(answer, Approval):
            raise Refused(f"{call.tool} was not approved: {answer}", rule="denied")
        if answer is not state:
            await anyio.to_thread.run_sync(approvals.grant, answer)

    async def _returned(self, decision: Decision, approved: bool, answer: Any, failed: bool) -> Any:
        step = await self.journal.add("returned", {"answer": answer, "failed": failed})
        self._keep(decision, "returned", approved, step)
        return answer

    def _keep(self, decision: Decision, kind: str, approved: bool, step: Step) -> None:
        answer = step.body["answer"]
        self.made.append(Made(decision, kind, approved, answer))
        if kind == "returned" and not step.body["failed"]:  # the text of an error is nobody's record
            self.guard.learn(decision, answer)

    def _bounded(self, answer: Any) -> Any:
        size = len(to_json(answer))
        if size > self.limits.result_bytes:
            raise Invalid(f"the result has {size} bytes, at most {self.limits.result_bytes} are taken: ask for less")
        return answer

    # --- a call that may have been made -----------------------------------------------------------------------------

    async def _doubt(
        self, tool: str, arguments: Mapping[str, Any], execute: Execute, called: Step, open_question: bool
    ) -> Any:
        decision, approved, simulated = self._recall(tool, arguments, called)
        if self._is_harmless(decision):
            return await self._make(decision, execute, approved, simulated)
        why = "this call was interrupted: it may have been made. Look first; yes makes it again, no goes on without"
        try:
            await self._allow(decision, {**decision.evidence, "in_doubt": why}, open_question)
        except Refused:
            answer = {"unknown": f"{tool} was interrupted; it may or may not have been made, and is not made again"}
            return await self._returned(decision, approved, answer, True)
        return await self._make(decision, execute, True, simulated)

    def _is_harmless(self, decision: Decision) -> bool:
        spec = self.guard.spec(decision.tool, decision.arguments)
        return spec.repeatable or spec.effect in ("read", "fetch")

    # --- asking -----------------------------------------------------------------------------------------------------

    async def _allow(self, decision: Decision, why: Mapping[str, Any], open_question: bool) -> None:
        """Ask, and use the answer up. Raises: Waiting; Refused when it is no, or nobody can be asked, or "stopped"."""
        approvals = self.approvals
        if approvals is None:
            rules = ", ".join(decision.verdict.rules)
            raise Refused(f"{decision.tool} needs a person, and nobody can be asked: {rules}", rule="nobody")
        call = self._question(decision, len(self._asked) - 1)
        answer: Approval | str = "expired"
        if open_question:
            answer = await anyio.to_thread.run_sync(approvals.answer, call.digest)
        if answer in ("expired", "used"):  # used, and killed before the call was written down: ask anew
            call = self._question(decision, len(self._asked))
            evidence = self._evidence(decision, why)
            await anyio.to_thread.run_sync(approvals.request, call, evidence)
            body = _named(decision.tool, decision.arguments) | {"call": call.digest}
            self._asked.append(await self.journal.add("asked", body))
            answer = "waiting"
        if answer == "waiting":
            answer = await self._ask_person(approvals, call)
        if not isinstance(answer, Approval):
            raise Refused(f"{decision.tool} was denied by a person", rule="denied")
        await anyio.to_thread.run_sync(approvals.use, answer, call)
        if self.stopped():
            raise Refused("the agent was stopped", rule="stopped")
        self.guard.endorse(decision)

    async def _ask_person(self, approvals: Approvals, call: Call) -> Approval | str:
        request = await anyio.to_thread.run_sync(approvals.find, call.digest)
        if self.ask is None:
            raise Waiting(request)
        approval = await self.ask(request)
        if approval is None:
            await anyio.to_thread.run_sync(approvals.deny, call.digest)
            return "denied"
        return approval

    def _question(self, decision: Decision, attempt: int) -> Call:
        """The same in every process that comes to this point of the run: its nonce names run, call and attempt."""
        name = encoding.encode([self.run, self._begun, attempt])
        nonce = sha256(b"tessera/question\0", name).hex()
        return Call(decision.tool, decision.arguments, self.mandate, nonce)

    def _evidence(self, decision: Decision, why: Mapping[str, Any]) -> dict[str, Any]:
        effect = self.guard.spec(decision.tool, decision.arguments).effect
        request = self.guard.knowledge.request[:REQUEST_SHOWN]
        return {**why, "rules": list(decision.verdict.rules), "effect": effect, "request": request, "run": self.run}

    def _check_same(self, step: Step, tool: str, arguments: Mapping[str, Any]) -> None:
        if _named(tool, arguments) != {name: step.body[name] for name in ("tool", "arguments")}:
            raise Conflict(
                f"the run does not go as it was recorded: now {tool}, at step {step.number} {step.body['tool']}: "
                "were its tools changed since?"
            )


def current_calls() -> GuardedCalls:
    """Of the run that a tool is called in. Raises: Invalid outside of one."""
    try:
        return _CURRENT.get()
    except LookupError:
        raise Invalid("this tool is called outside of a run") from None


def _named(tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Without the arguments that are None: the guard leaves them out, too."""
    return {"tool": tool, "arguments": {name: value for name, value in arguments.items() if value is not None}}

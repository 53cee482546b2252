"""Running an agent: from a request to an outcome, through however many processes it takes.

    runtime = Runtime(agent, StepLedger("agents.sqlite"), approvals=…, mandate=…)
    outcome = await runtime.start("Write to pal@example.com that I am late")
    outcome = await runtime.resume(outcome.run)      # after a person has answered, or after a crash

A run is the same from its first step in every process: what was recorded is said again, by the model and by the tools,
and only what is new is done. So a run needs no frozen state, and a replay is the same code with nobody to ask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
import structlog
from pydantic_ai import Agent as ModelAgent
from pydantic_ai import UsageLimits
from pydantic_ai.exceptions import UnexpectedModelBehavior, UsageLimitExceeded
from pydantic_ai.toolsets import CombinedToolset

from tessera.agents.approvals import NO_MANDATE, Approvals, Request
from tessera.agents.guard import Guard, GuardConfig
from tessera.agents.memory import RECALL, REMEMBER, USER_NOTE, Memory, note_origin
from tessera.agents.plan import plan_from
from tessera.agents.policy import Policy
from tessera.agents.runtime.agent import Agent, Tool
from tessera.agents.runtime.calls import Ask, GuardedCalls, Made, Waiting, current_calls
from tessera.agents.runtime.journal import Journal, RecordEnds
from tessera.agents.runtime.models import RecordedModel, nobody
from tessera.agents.runtime.toolset import Guarded, Recorded, Seen, function_toolset, server_toolset
from tessera.agents.steps import Run, Step, StepLedger
from tessera.agents.tools import ToolSpec
from tessera.core.errors import Conflict, Refused

__all__ = ["Outcome", "Runtime"]

log = structlog.get_logger()
CheckPayment = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a run has come. `waiting`: `question` says for what; resume it when a person has answered."""

    run: str
    state: str  # done, waiting or failed; open for a replay of a record that does not reach an end
    output: str = ""
    question: Request | None = None
    calls: tuple[Made, ...] = ()


class Runtime:
    """Runs one agent.

    Args:
        approvals: where questions to a person are kept; None: what needs one is refused.
        ask: asks in place, as a terminal does; None: the run ends as waiting.
        mandate: the id of what it may pay under, for the questions.
        check_payment: raises Refused for a payment that the mandate refuses.
        stopped: a further kill switch, beside the one of the steps' ledger.
        memory: needed by an agent that has one.
    """

    def __init__(
        self,
        agent: Agent,
        ledger: StepLedger,
        *,
        approvals: Approvals | None = None,
        ask: Ask | None = None,
        mandate: str = NO_MANDATE,
        check_payment: CheckPayment | None = None,
        stopped: Callable[[], bool] = lambda: False,
        memory: Memory | None = None,
    ) -> None:
        self.agent, self.ledger = agent, ledger
        self.approvals, self.ask, self.mandate = approvals, ask, mandate
        self.check_payment, self.memory, self._more_stops = check_payment, memory, stopped
        if agent.memory and memory is None:
            raise Conflict(f"the agent {agent.name} has a memory: say where it lies")

    async def start(self, request: str) -> Outcome:
        """A new run.

        Raises: Refused when the agent is stopped or a tool was redefined; Unavailable when its model or a server
            cannot be reached: the run can go on later.
        """
        self.check_running()
        run = await anyio.to_thread.run_sync(lambda: self.ledger.begin(self.agent.name, request))
        return await self._go(run)

    async def resume(self, run: str) -> Outcome:
        """Go on where it stopped. A run that is over says again how it ended. Raises: Missing; as `start`."""
        self.check_running()
        return await self._go(await self._find(run))

    async def replay(self, run: str) -> Outcome:
        """Go through a recorded run again: no model, no tool, no server, nothing written.

        Returns: its calls, each with what the guard says of it now; see `Made.holds`.

        Raises: Conflict when the recorded answers lead to other calls than the recorded ones.
        """
        found = await self._find(run)
        steps = await anyio.to_thread.run_sync(self.ledger.steps, found.id)
        return await _Session(self, found, Journal(self.ledger, steps, None), _tools_of(steps)).go()

    async def _go(self, run: Run) -> Outcome:
        turn = await anyio.to_thread.run_sync(self.ledger.open, run.id)
        steps = await anyio.to_thread.run_sync(self.ledger.steps, run.id)
        return await _Session(self, run, Journal(self.ledger, steps, turn)).go()

    async def _find(self, run: str) -> Run:
        found = await anyio.to_thread.run_sync(self.ledger.find, run)
        if found.agent != self.agent.name:
            raise Conflict(f"run {found.id} is one of {found.agent}, not of {self.agent.name}")
        return found

    def is_stopped(self) -> bool:
        return self.ledger.is_stopped(self.agent.name) or self._more_stops()

    def check_running(self) -> None:
        """Raises: Refused."""
        if self.is_stopped():
            raise Refused(f"the agent {self.agent.name} was stopped", rule="stopped")


class _Session:
    """One process's way through one run.

    Args:
        replayed: of a replay: what the tools were.
    """

    def __init__(self, runtime: Runtime, run: Run, journal: Journal, replayed: Seen | None = None) -> None:
        self._runtime, self._run, self._journal, self._replayed = runtime, run, journal, replayed
        self._agent = runtime.agent
        self._calls: GuardedCalls | None = None
        self._functions = [*self._agent.functions(), *(self._memory_tools() if self._agent.memory else ())]

    async def go(self) -> Outcome:
        agent, limits = self._agent, self._agent.limits
        model = nobody() if self._replayed is not None else agent.model
        recorded = RecordedModel(
            model, self._run.id, self._journal, self._runtime.check_running, limits.model_timeout_s
        )
        runner: ModelAgent[None, str] = ModelAgent(
            recorded, instructions=agent.instructions or None, toolsets=[self._toolset()], name=agent.name
        )
        try:
            result = await runner.run(self._run.request, usage_limits=UsageLimits(request_limit=limits.requests))
        except Waiting as waiting:
            return self._outcome("waiting", question=waiting.request)
        except RecordEnds:
            return self._outcome("open")
        except (UsageLimitExceeded, UnexpectedModelBehavior) as error:
            return await self._end("failed", str(error))
        return await self._end("done", result.output)

    # --- the run's parts --------------------------------------------------------------------------------------------

    def _toolset(self) -> Guarded:
        specs = {tool.name: tool.known() for tool in self._functions}
        sets = [function_toolset(self._functions)]
        if self._replayed is None:
            sets += [server_toolset(server) for server in self._agent.servers]
        else:
            sets.append(Recorded({name: facts for name, facts in self._replayed.items() if name not in specs}))
        pins = {} if self._replayed is not None else self._runtime.ledger.pins(self._agent.name)
        return Guarded(CombinedToolset(sets), self._agent, specs, pins, self._begin)

    async def _begin(self, specs: list[ToolSpec], seen: Seen) -> GuardedCalls:
        """The guard of this run, made before anything from outside is read."""
        runtime, agent = self._runtime, self._agent
        if self._journal.peek() is None:
            await self._journal.add("tools", {"tools": seen})
        else:
            self._journal.take("tools")
        if self._replayed is None:
            await anyio.to_thread.run_sync(self._pin, seen)
        plan = None if agent.plan == "none" else plan_from(self._run.request, specs) | {REMEMBER.name, RECALL.name}
        stopped = runtime.is_stopped if self._replayed is None else lambda: False
        guard = Guard(
            specs, self._run.request, me=[*agent.me, USER_NOTE], plan=plan, policy=Policy(agent.forbid),
            config=GuardConfig(max_questions=agent.limits.questions), stopped=stopped, mandate=runtime.check_payment,
        )  # fmt: skip
        self._calls = GuardedCalls(
            self._run.id, guard, self._journal, runtime.approvals, runtime.ask, runtime.mandate, agent.limits,
            {tool.name: tool.simulate for tool in self._functions if tool.simulate is not None}, stopped,
        )  # fmt: skip
        return self._calls

    def _pin(self, seen: Seen) -> None:
        """Take the tools of a server that was never seen before for what they are now."""
        agent, ledger = self._agent, self._runtime.ledger
        pins = ledger.pins(agent.name)
        for name, facts in seen.items():
            if name not in pins and any(name.startswith(f"{server.name}_") for server in agent.servers):
                ledger.pin(agent.name, name, facts["digest"])

    def _memory_tools(self) -> list[Tool]:
        memory = self._runtime.memory

        def remember(note: str) -> str:
            """Keep a short note for later runs."""
            assert memory is not None, "an agent with a memory has one"
            memory.remember(note, note_origin(current_calls().guard.knowledge, note))
            return "remembered"

        def recall(query: str) -> list[dict[str, str]]:
            """Find notes of earlier runs by their words."""
            assert memory is not None, "an agent with a memory has one"
            return memory.recall(query)

        return [Tool(remember, REMEMBER), Tool(recall, RECALL)]

    # --- how it ends ------------------------------------------------------------------------------------------------

    async def _end(self, state: str, output: str) -> Outcome:
        if self._journal.peek() is None:
            await self._journal.add("ended", {"state": state, "output": output})
            log.info("run_ended", run=self._run.id, agent=self._agent.name, state=state)
            return self._outcome(state, output)
        body = self._journal.take("ended").body
        return self._outcome(body["state"], body["output"])

    def _outcome(self, state: str, output: str = "", question: Request | None = None) -> Outcome:
        return Outcome(self._run.id, state, output, question, () if self._calls is None else tuple(self._calls.made))


def _tools_of(steps: Sequence[Step]) -> Seen:
    return dict(steps[0].body["tools"]) if steps and steps[0].kind == "tools" else {}

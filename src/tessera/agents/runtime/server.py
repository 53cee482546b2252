"""An agent's tools as an MCP server for any other agent, through the same guard, mandate and person.

Each call is a run of its own in the steps' ledger. One that waits for a person says so, and the same call made again
after the answer goes on with it: it is made once.

Invariants: whoever calls is nobody: what it writes is outside, unless the operator's own `request` says it; nothing
runs that the guard did not admit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
from mcp.server import MCPServer

from tessera import __version__
from tessera.agents.guard import Guard, GuardConfig
from tessera.agents.policy import Policy
from tessera.agents.runtime.agent import Tool
from tessera.agents.runtime.calls import GuardedCalls, Waiting
from tessera.agents.runtime.journal import Journal
from tessera.agents.runtime.session import Runtime
from tessera.core import encoding

__all__ = ["make_server"]

ABOUT = "Tools of a Tessera agent, behind its guard and under its mandate. A call may be refused, or wait for a person."


def make_server(runtime: Runtime, request: str = "") -> MCPServer:
    """The server; `await server.run_stdio_async()` serves one client.

    Args:
        request: what the operator allows to be done, in the words of a request; "" asks for everything but reading.
    """
    desk = _Desk(runtime, request)
    server = MCPServer(f"tessera-{runtime.agent.name}", instructions=ABOUT, version=__version__, log_level="WARNING")
    for tool in runtime.agent.functions():
        server.add_tool(desk.guarded(tool), name=tool.name, description=inspect.getdoc(tool.function) or "")
    return server


class _Desk:
    """One guard for all that a client calls while it is connected."""

    def __init__(self, runtime: Runtime, request: str) -> None:
        self._runtime, self._request = runtime, request
        agent = runtime.agent
        tools = agent.functions()
        self._guard = Guard(
            [tool.known() for tool in tools], request, me=agent.me, policy=Policy(agent.forbid),
            config=GuardConfig(max_questions=agent.limits.questions), stopped=runtime.is_stopped,
            mandate=runtime.check_payment,
        )  # fmt: skip
        self._simulations = {tool.name: tool.simulate for tool in tools if tool.simulate is not None}
        self._open: dict[bytes, str] = {}  # runs that wait, by their call
        self._turn = anyio.Lock()

    def guarded(self, tool: Tool) -> Callable[..., Any]:
        """The tool's function with the same face, behind the guard."""
        function, name = tool.function, tool.name

        async def execute(arguments: dict[str, Any]) -> Any:
            if inspect.iscoroutinefunction(function):
                return await function(**arguments)
            return await anyio.to_thread.run_sync(lambda: function(**arguments))

        @functools.wraps(function)
        async def call(**arguments: Any) -> Any:
            async with self._turn:  # one after the other, as in a run: what a result teaches holds for the next call
                return await self._call(name, arguments, execute)

        call.__annotations__ = {**inspect.get_annotations(function, eval_str=True), "return": Any}
        call.__signature__ = inspect.signature(function, eval_str=True).replace(return_annotation=Any)  # type: ignore[attr-defined]
        return call

    async def _call(self, tool: str, arguments: dict[str, Any], execute: Callable[..., Any]) -> Any:
        ledger, runtime = self._runtime.ledger, self._runtime
        runtime.check_running()
        key = encoding.encode([tool, arguments])
        run = self._open.get(key)
        if run is None:
            text = self._request or "(served over MCP, without a request)"
            run = (await anyio.to_thread.run_sync(ledger.begin, runtime.agent.name, text)).id
        turn = await anyio.to_thread.run_sync(ledger.open, run)
        journal = Journal(ledger, await anyio.to_thread.run_sync(ledger.steps, run), turn)
        calls = GuardedCalls(
            run, self._guard, journal, runtime.approvals, runtime.ask, runtime.mandate, runtime.agent.limits,
            self._simulations, runtime.is_stopped,
        )  # fmt: skip
        try:
            answer = await calls.call(tool, arguments, execute)
        except Waiting as waiting:
            self._open[key] = run
            return {"waiting": waiting.request.call.digest, "why": waiting.request.evidence.get("rules", []),
                    "hint": f"tessera agent approve {runtime.agent.name}, then make the same call again"}  # fmt: skip
        self._open.pop(key, None)
        await journal.add("ended", {"state": "done", "output": ""})
        return answer

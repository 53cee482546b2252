"""The one choke point: pydantic-ai's toolset around every function and MCP server of an agent.

Invariants: no call passes by `GuardedCalls`; tools run one after the other, in the model's order; a server's tool is
what it was when it was first seen, or the run is refused; one that is new since then is not offered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic_ai import FunctionToolset, RunContext
from pydantic_ai.tools import Tool as ModelTool
from pydantic_ai.tools import ToolDefinition
from pydantic_ai.toolsets import AbstractToolset, PrefixedToolset, WrapperToolset
from pydantic_ai.toolsets.abstract import ToolsetTool
from pydantic_ai.usage import RunUsage
from pydantic_core import SchemaValidator, core_schema

from tessera.agents.runtime.agent import Agent, Server, Tool
from tessera.agents.runtime.calls import GuardedCalls
from tessera.agents.tools import ToolSpec, infer
from tessera.core import encoding
from tessera.core.errors import Invalid, Refused
from tessera.core.hashing import sha256

__all__ = [
    "Begin",
    "Guarded",
    "Look",
    "Recorded",
    "Seen",
    "function_toolset",
    "look_at_tools",
    "server_toolset",
    "spec_of",
    "tool_digest",
]

SERVER_TIMEOUT_S = 30.0
Seen = dict[str, dict[str, Any]]  # tool -> what the model is told of it
Begin = Callable[[list[ToolSpec], Seen], Awaitable[GuardedCalls]]
_ANY_ARGUMENTS = SchemaValidator(core_schema.dict_schema(core_schema.str_schema(), core_schema.any_schema()))


def function_toolset(tools: list[Tool]) -> AbstractToolset[Any]:
    return FunctionToolset([ModelTool(tool.function, name=tool.name, takes_ctx=False) for tool in tools])


def server_toolset(server: Server) -> AbstractToolset[Any]:
    """A connection to an MCP server, which is opened when the run begins."""
    from fastmcp.client.transports import StdioTransport  # these two take two seconds to import
    from pydantic_ai.mcp import MCPToolset

    at: Any = server.at
    if isinstance(at, (list, tuple)):
        command, *arguments = at
        at = StdioTransport(command, arguments, env=dict(server.environment), keep_alive=False)
    elif isinstance(at, str) and not at.startswith(("http://", "https://")):
        raise Invalid(f"a server is a command or an http(s) URL, not {at[:80]!r}")
    elif isinstance(at, Path):
        raise Invalid("say the whole command of a server, such as ['python', 'server.py']")
    toolset = MCPToolset(
        at, id=server.name, include_instructions=False, cache_tools=False, tool_error_behavior="failed",
        init_timeout=SERVER_TIMEOUT_S,
    )  # fmt: skip
    return PrefixedToolset(toolset, server.name)


def tool_digest(tool: ToolDefinition) -> str:
    """Name, description and parameters: all that a model is told of a tool."""
    parameters = tool.parameters_json_schema
    return sha256(b"tessera/tool\0", encoding.encode([tool.name, tool.description or "", parameters])).hex()


class Guarded(WrapperToolset[Any]):  # type: ignore[misc]  # the library is not followed by the type checker
    """All tools of one run.

    Args:
        begin: makes the guarded calls, once the tools are known.
        pins: the digests of servers' tools as they were accepted.
    """

    def __init__(
        self, wrapped: AbstractToolset[Any], agent: Agent, specs: Mapping[str, ToolSpec], pins: Mapping[str, str],
        begin: Begin,
    ) -> None:  # fmt: skip
        super().__init__(wrapped)
        self._agent, self._specs, self._pins, self._begin = agent, specs, dict(pins), begin
        self._pinned_servers = {server.name for server in agent.servers if any(_of(server, tool) for tool in pins)}
        self._calls: GuardedCalls | None = None

    async def for_run(self, ctx: RunContext[Any]) -> AbstractToolset[Any]:
        return self

    async def for_run_step(self, ctx: RunContext[Any]) -> AbstractToolset[Any]:
        return self

    async def get_tools(self, ctx: RunContext[Any]) -> dict[str, ToolsetTool[Any]]:
        found = {name: tool for name, tool in (await self.wrapped.get_tools(ctx)).items() if self._is_accepted(tool)}
        if self._calls is None:
            self._calls = await self._begin([self._spec(tool) for tool in found.values()], _seen(found))
            await self._preload(ctx, found)
        return {
            name: replace(tool, toolset=self, tool_def=replace(tool.tool_def, sequential=True))
            for name, tool in found.items()
        }

    async def call_tool(
        self, name: str, tool_args: dict[str, Any], ctx: RunContext[Any], tool: ToolsetTool[Any]
    ) -> Any:
        if self._calls is None:
            raise Invalid(f"{name} is called before the run has begun")

        async def execute(arguments: dict[str, Any]) -> Any:
            return await self.wrapped.call_tool(name, arguments, ctx, self._inner[name])

        return await self._calls.call(name, tool_args, execute)

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _preload(self, ctx: RunContext[Any], found: dict[str, ToolsetTool[Any]]) -> None:
        """The user's own records, before the model says anything; as calls of the run like any other."""
        self._inner = found
        for name, tool in found.items():
            for arguments in self._spec(tool).preload:
                await self.call_tool(name, dict(arguments), ctx, tool)

    def _is_accepted(self, tool: ToolsetTool[Any]) -> bool:
        name = tool.tool_def.name
        server = next((server for server in self._agent.servers if _of(server, name)), None)
        if server is None:
            return True
        pin = self._pins.get(name)
        if pin is None:
            return server.name not in self._pinned_servers
        if pin != tool_digest(tool.tool_def):
            raise Refused(
                f"the tool {name} is not what it was when it was accepted: look at it, and accept it anew or not",
                rule="redefined_tool",
            )
        return True

    def _spec(self, tool: ToolsetTool[Any]) -> ToolSpec:
        return spec_of(self._agent, self._specs, tool.tool_def)


def spec_of(agent: Agent, specs: Mapping[str, ToolSpec], tool: ToolDefinition) -> ToolSpec:
    """What the guard takes a tool for: as it was described, else as its own name says."""
    name, parameters = tool.name, tool.parameters_json_schema.get("properties", {})
    if name in specs:
        return specs[name]
    server = next((server for server in agent.servers if _of(server, name)), None)
    own = name if server is None else name.removeprefix(f"{server.name}_")
    known = None if server is None else server.tools.get(own)
    inferred = infer(own, parameters)
    roles = {**inferred.roles, **known.roles} if known is not None else inferred.roles
    return replace(known or inferred, name=name, roles=roles)


@dataclass(frozen=True, slots=True)
class Look:
    """A tool as it is now. `server` is "" for a function."""

    spec: ToolSpec
    server: str
    digest: str
    description: str


async def look_at_tools(agent: Agent) -> list[Look]:
    """Every tool of an agent, whether it was accepted or not. Connects to its servers."""
    looks = []
    functions = agent.functions()
    specs = {tool.name: tool.known() for tool in functions}
    sets: list[tuple[str, AbstractToolset[Any]]] = [("", function_toolset(functions))]
    sets += [(server.name, server_toolset(server)) for server in agent.servers]
    context: RunContext[Any] = RunContext(deps=None, model=agent.model, usage=RunUsage())
    for server, toolset in sets:
        async with toolset:
            tools = await toolset.get_tools(context)
        for _, tool in sorted(tools.items()):
            spec = spec_of(agent, specs, tool.tool_def)
            looks.append(Look(spec, server, tool_digest(tool.tool_def), tool.tool_def.description or ""))
    return looks


class Recorded(AbstractToolset[Any]):  # type: ignore[misc]
    """What the tools of a server were when the run was recorded: a replay asks no server."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    @property
    def id(self) -> str | None:
        return "recorded"

    async def get_tools(self, ctx: RunContext[Any]) -> dict[str, ToolsetTool[Any]]:
        return {
            name: ToolsetTool(
                toolset=self, max_retries=1, args_validator=_ANY_ARGUMENTS,
                tool_def=ToolDefinition(
                    name=name, parameters_json_schema=facts["parameters"], description=facts["description"]
                ),
            )
            for name, facts in self._seen.items()
        }  # fmt: skip

    async def call_tool(
        self, name: str, tool_args: dict[str, Any], ctx: RunContext[Any], tool: ToolsetTool[Any]
    ) -> Any:
        raise Invalid(f"a replay calls no tool: {name}")


def _of(server: Server, tool: str) -> bool:
    return tool.startswith(f"{server.name}_")


def _seen(tools: dict[str, ToolsetTool[Any]]) -> Seen:
    return {
        name: {
            "digest": tool_digest(tool.tool_def),
            "description": tool.tool_def.description or "",
            "parameters": tool.tool_def.parameters_json_schema,
        }
        for name, tool in tools.items()
    }

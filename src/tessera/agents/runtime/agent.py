"""What an agent is: a model, instructions, tools and limits. Nothing here runs anything."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tessera.agents.guard import Simulated
from tessera.agents.steps import NAME
from tessera.agents.tools import ToolSpec, infer
from tessera.core.errors import Invalid

__all__ = ["Agent", "Limits", "Server", "Simulate", "Tool"]

Simulate = Callable[[Mapping[str, Any]], Awaitable[Simulated]]
TOOLS_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Tool:
    """A Python function that the model may call. Its type hints and docstring are what the model is told.

    Args:
        spec: what the guard must know of it; None reads it from the names.
        simulate: what the transaction that it would sign does; for a spec with `signs`.
    """

    function: Callable[..., Any]
    spec: ToolSpec | None = None
    simulate: Simulate | None = None

    @property
    def name(self) -> str:
        return self.function.__name__ if self.spec is None else self.spec.name

    def known(self) -> ToolSpec:
        return self.spec or infer(self.name, inspect.signature(self.function).parameters)


@dataclass(frozen=True, slots=True)
class Server:
    """An MCP server. The model sees its tools as `NAME_tool`.

    Args:
        at: a command with its arguments (stdio), a URL (HTTP), or a server object of this process.
        tools: what is known of its tools, by their own names; others are inferred.
        environment: variables of the command's process, beside PATH and the like.
    """

    name: str
    at: Sequence[str] | str | Any
    tools: Mapping[str, ToolSpec] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if NAME.fullmatch(self.name) is None:
            raise Invalid(f"a server is called a-z, 0-9, - and _, not {self.name[:80]!r}")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a run may go on."""

    requests: int = 50  # to the model
    tool_timeout_s: float = 60.0
    model_timeout_s: float = 330.0  # a paid answer may wait for its settlement
    result_bytes: int = 262_144  # of one tool's result; more is refused, and the model told so
    questions: int = 8  # to a person


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent.

    Args:
        model: pydantic-ai's, such as `models.compatible(...)` or `models.scripted(...)`.
        me: the user's own names, addresses and accounts.
        plan: "request": tools that the words of the request do not need are asked for; "none": no plan.
        forbid: Cedar text that forbids more.
        memory: whether it has `remember` and `recall`.
    """

    name: str
    model: Any
    instructions: str = ""
    tools: Sequence[Tool | Callable[..., Any]] = ()
    servers: Sequence[Server] = ()
    me: tuple[str, ...] = ()
    plan: Literal["request", "none"] = "request"
    forbid: str = ""
    memory: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if NAME.fullmatch(self.name) is None:
            raise Invalid(f"an agent is called a-z, 0-9, - and _, at most 64 of them, not {self.name[:80]!r}")
        names = [tool.name for tool in self.functions()] + [server.name for server in self.servers]
        if len(names) != len(set(names)) or len(names) > TOOLS_LIMIT:
            raise Invalid(f"at most {TOOLS_LIMIT} tools and servers, each with a name of its own")

    def functions(self) -> list[Tool]:
        return [tool if isinstance(tool, Tool) else Tool(tool) for tool in self.tools]

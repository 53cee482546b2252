"""An agent from its definition: imports its functions, reads its files, finds its model."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tessera.agents.runtime.agent import Agent, Limits, Server, Tool
from tessera.agents.runtime.definition import Definition, KnownPart, ModelPart, ServerPart, ToolPart
from tessera.agents.runtime.models import compatible, read_script, scripted
from tessera.agents.tools import Source, ToolSpec, infer
from tessera.core.errors import Invalid

__all__ = ["build"]


def build(
    definition: Definition, folder: Path, *, wallet: list[Tool] | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Agent:  # fmt: skip
    """The agent of a definition.

    Args:
        folder: where the file lies.
        wallet: the tools of its purse.
        transport: how its model is reached, when that must be paid for.

    Raises: Invalid for tools that cannot be imported, files that are not there, variables that are not set.
    """
    guard = definition.guard
    limits = Limits(**definition.limits.model_dump(), questions=guard.questions)
    return Agent(
        definition.name,
        _model(definition.model, folder, transport, limits.model_timeout_s),
        definition.instructions,
        [*(_tool(part, folder) for part in definition.tools), *(wallet or ())],
        [_server(part) for part in definition.servers],
        tuple(guard.me),
        guard.plan,
        _text(folder / guard.forbid) if guard.forbid else "",
        definition.memory,
        limits,
    )


def _model(part: ModelPart, folder: Path, transport: httpx.AsyncBaseTransport | None, timeout_s: float) -> Any:
    if part.script and not part.url:
        return scripted(read_script(_text(folder / part.script).encode()))
    if part.script or not part.url.startswith(("http://", "https://")) or not part.name:
        raise Invalid("a model is a script, or an http(s) url with a name")
    api_key = "unused"
    if part.api_key_env:
        api_key = os.environ.get(part.api_key_env, "")
        if not api_key:
            raise Invalid(f"the variable {part.api_key_env} is not set: it holds the key for {part.url}")
    return compatible(part.url, part.name, api_key=api_key, transport=transport, timeout_s=timeout_s)


def _tool(part: ToolPart, folder: Path) -> Tool:
    function = _function(part.python, folder)
    return Tool(function, _spec(part, Tool(function).known()))


def _server(part: ServerPart) -> Server:
    if bool(part.command) == bool(part.url):
        raise Invalid(f"the server {part.name} has a command or a url")
    missing = [name for name in part.environment if name not in os.environ]
    if missing:
        raise Invalid(f"the server {part.name} wants variables that are not set: {', '.join(missing)}")
    tools = {name: _spec(known, infer(name, known.roles)) for name, known in part.tools.items()}
    environment = {name: os.environ[name] for name in part.environment}
    return Server(part.name, part.url or tuple(part.command), tools, environment)


def _spec(part: KnownPart, inferred: ToolSpec) -> ToolSpec:
    source = Source(
        part.author, tuple(part.text), part.directory, part.kind, False, part.identity, part.balance, tuple(part.paid)
    )
    preload: tuple[dict[str, object], ...] = ({},) if part.preload else ()
    effect = part.effect or inferred.effect
    if preload and effect != "read":
        raise Invalid(f"{inferred.name} does not only read: it cannot be preloaded")
    return ToolSpec(
        inferred.name, effect, {**inferred.roles, **part.roles}, source, preload=preload, repeatable=part.repeatable
    )


def _function(where: str, folder: Path) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    try:
        found = _file_module(folder / module) if module.endswith(".py") else importlib.import_module(module)
        function = getattr(found, name)
    except (ImportError, AttributeError, OSError, SyntaxError, ValueError) as error:
        raise Invalid(f"the tool {where!r} cannot be imported: {error}") from error
    if not callable(function):
        raise Invalid(f"the tool {where!r} is no function")
    return function


def _file_module(file: Path) -> Any:
    name = f"tessera_agent_{file.stem}_{abs(hash(file.resolve()))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"cannot read {file}: {error}") from error

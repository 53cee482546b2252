"""Renders one chat template, alone in a process: a template is a program that came with a checkpoint.

Jinja's sandbox keeps it from files and from Python's insides, but a few lines can ask for years of work or terabytes
of text. So this process has little memory and no way to write or to start anything; who started it ends it when it is
late.

Run as `python -m tessera.serving.chat_template_child`. Each line of standard input is a JSON object and is answered by
one: {"source", "named"} first, then {"messages", "now"} again and again; {"text"} or {"error"} comes back.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import UTC, datetime
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["Renderer"]

MEMORY_LIMIT = 512 << 20  # bytes of address space
REASON_LIMIT = 300  # characters


class Refusal(Exception):
    """What a template says with `raise_exception`."""


class Renderer:
    """A template with what transformers gives it: raise_exception, strftime_now, tojson, generation, loop controls."""

    def __init__(self, source: str, named: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": self._today}
        self._now, self._named = 0.0, named
        self._template = environment.from_string(source)

    def render(self, messages: list[dict[str, str]], now: float) -> str:
        self._now = now
        return self._template.render(
            **self._named, messages=messages, add_generation_prompt=True, tools=None, documents=None
        )

    def _today(self, form: str) -> str:
        return datetime.fromtimestamp(self._now, UTC).strftime(form)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks what a model writes, for training: here, what it encloses."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own form

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: object) -> None:
    raise Refusal(str(message))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    for what in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        resource.setrlimit(what, (0, 0))
    renderer: Renderer | None = None
    for line in sys.stdin.buffer:
        answer: dict[str, str] = {"text": ""}
        try:
            asked = json.loads(line)
            if renderer is None:
                renderer = Renderer(asked["source"], asked["named"])
            else:
                answer = {"text": renderer.render(asked["messages"], asked["now"])}
        except Refusal as error:
            answer = {"error": f"the chat template refuses: {str(error)[:REASON_LIMIT]}"}
        except Exception as error:  # noqa: BLE001  somebody else's program: whatever it raised, it did not render
            answer = {"error": f"the chat template fails: {type(error).__name__}: {str(error)[:REASON_LIMIT]}"}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

"""`tessera config`: what is in force, and where each value comes from."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.options import AsJson
from tessera.cli.tree import Configured, Setting, find_command, inspect_command, known_variables

__all__ = ["hides_secret", "show_config"]

HIDDEN = "(not shown)"
SECRET_WORDS = {"token", "secret", "database"}  # in a setting's name: its value may hold a password


def show_config(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(help="A command, with options of its own if you like.", metavar="[COMMAND]…")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="The defaults too.")] = False,
    as_json: AsJson = False,
) -> None:
    """What is in force and where it comes from: of one command as you would type it, else of all.

    Later wins: default, config.toml in the configuration folder, config.toml in the state directory, variable, flag.
    """
    root: Configured = ctx.find_root().command  # type: ignore[assignment]
    path, rest = find_command(ctx, words) if words else ((), [])
    inspected = {
        command: inspect_command(ctx, command, rest) for command in ([path] if path else filter(None, root.known))
    }
    everything = show_all or bool(path)
    found = {
        (command, setting.key, setting.source): setting
        for path, one in inspected.items()
        for command, settings in (("", one.common), (" ".join(path), one.own))
        for setting in settings
        if everything or setting.kind != "default"
    }
    rows = sorted(((command, setting) for (command, *_), setting in found.items()), key=lambda row: bool(row[0]))
    known = known_variables(root)
    unread = sorted(name for name in os.environ if name.startswith("TESSERA_") and name not in known)
    files = [str(file) for file in dict.fromkeys(file for one in inspected.values() for file in one.files)]
    if as_json:
        settings = [
            {"command": command, "setting": s.key, "value": _shown(s), "kind": s.kind, "source": s.source}
            for command, s in rows
        ]
        typer.echo(json.dumps({"files": files, "settings": settings, "unread_variables": unread}, default=str))
        return
    _print(files, rows, {name: _near(name, known) for name in unread})


def _print(files: list[str], rows: list[tuple[str, Setting]], unread: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for file in files:
        console.print(Text(f"{file}{'' if Path(file).exists() else '  (not there)'}"), soft_wrap=True)
    table = Table("command", "setting", "value", "from", box=None)
    for command, setting in rows:
        origin = " ".join(filter(None, (setting.kind, setting.source)))
        table.add_row(*(Text(cell) for cell in (command or "all", setting.key, str(_shown(setting)), origin)))
    if rows:
        console.print(table)
    else:
        console.print("Nothing is set: every command works with its defaults. `tessera config --all` shows them.")
    for name, hint in unread.items():
        console.print(Text(f"{name} is set, but no command reads it{hint}"), style="yellow")


def _near(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]}?" if near else ""


def hides_secret(setting: Setting) -> bool:
    """Whether the value must not be shown as it is."""
    return _shown(setting) != _as_text(setting.value)


def _shown(setting: Setting) -> Any:
    """The value without what may be a secret: a token behind a relay's URL, a password in a database's."""
    value = setting.value
    if value and SECRET_WORDS & set(setting.key.split("_")):
        return HIDDEN
    text = _as_text(value)
    if isinstance(text, list):
        return [_open_part(one) for one in text]
    return _open_part(text) if isinstance(text, str) else text


def _as_text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [str(one) for one in value]
    return value if isinstance(value, bool | int | float | None) else str(value)


def _open_part(text: str) -> str:
    url, mark, _ = text.partition("#")
    return f"{url}#{HIDDEN}" if mark and "://" in url else text

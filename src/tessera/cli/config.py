"""`tessera config`: what is in force, and where each value comes from."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.options import AsJson
from tessera.cli.settings import CommandPath
from tessera.cli.tree import Configured, Setting, inspect_command, known_variables
from tessera.core.errors import Invalid

__all__ = ["show_config"]

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
    path, rest = _command(root, words or [])
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


def _shown(setting: Setting) -> Any:
    """The value without what may be a secret: a token behind a relay's URL, a password in a database's."""
    value = setting.value
    if value and SECRET_WORDS & set(setting.key.split("_")):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [_open_part(str(one)) for one in value]
    return value if isinstance(value, bool | int | float | None) else _open_part(str(value))


def _open_part(text: str) -> str:
    url, mark, _ = text.partition("#")
    return f"{url}#{HIDDEN}" if mark and "://" in url else text


def _command(root: Configured, words: list[str]) -> tuple[CommandPath, list[str]]:
    """The command that the first of `words` name, and the rest."""
    for count in range(len(words), 0, -1):
        if tuple(words[:count]) in root.commands_below:
            return tuple(words[:count]), words[count:]
    if words:
        near = difflib.get_close_matches(words[0], [path[0] for path in root.commands_below if path], n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise Invalid(f"there is no command {' '.join(words)!r}{hint}")
    return (), []

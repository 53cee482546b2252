"""The tree of commands, and what is done once for all of them: settings are layered, failures become one line.

`Configured` is the root of the tree. It gives every option its variables, reads the files of settings before a command
looks for its own, and turns a `TesseraError` of any command into a message and an exit status: 2 when the input has to
be mended, 1 otherwise, 130 after Ctrl-C.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from tessera.cli.options import choice, parse_size
from tessera.cli.settings import FILE, CommandPath, Known, Layers, Settings, set_settings, user_file
from tessera.core.errors import Invalid, TesseraError

__all__ = ["Configured", "Inspected", "Setting", "fail", "find_command", "inspect_command", "known_variables"]

PREFIX = "TESSERA"
OTHER_VARIABLES = {"TESSERA_CONFIG_DIR"}
_LAYERS = "tessera.layers"  # in a context's meta, which its children share
_HELP = "--help"
_SHOWING = {"help", "version"}


class Configured(TyperGroup):
    """The root of the commands."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands_below: dict[CommandPath, TyperCommand | TyperGroup] = {(): self, **dict(_leaves(self, ()))}
        self.known: Known = {
            path: {_key(option): option.type_descriptor.is_path for option in _options(command)}
            for path, command in self.commands_below.items()
        }
        for path, command in self.commands_below.items():
            for option in _options(command):
                option.envvar = _variables(path, option)
                option.show_envvar = False
                if _key(option) == "state_dir":
                    option.is_eager = True  # the other options' defaults may lie in that directory
                    option.callback = _add_state_file

    def invoke(self, ctx: Any) -> Any:
        try:
            if _HELP not in ctx.args:
                _start(ctx, self)
            return super().invoke(ctx)
        except TesseraError as error:
            fail(error)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def fail(error: TesseraError) -> NoReturn:
    """Say what went wrong in one line, and as an object where one was asked for; end with its status."""
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": error.to_dict()}, default=str))
    typer.echo(f"tessera: {error.message}", err=True)
    raise typer.Exit(2 if isinstance(error, Invalid) else 1)


def find_command(ctx: Any, words: Sequence[str]) -> tuple[CommandPath, list[str]]:
    """The command that the first of `words` name, and the rest. Raises `Invalid` when there is none."""
    commands = ctx.find_root().command.commands_below
    for count in range(len(words), 0, -1):
        if tuple(words[:count]) in commands:
            return tuple(words[:count]), list(words[count:])
    near = difflib.get_close_matches("".join(words[:1]), [path[0] for path in commands if path], n=1)
    raise Invalid(f"there is no command {' '.join(words)!r}" + (f": did you mean {near[0]}?" if near else ""))


@dataclass(frozen=True)
class Setting:
    """One setting of one command: its value, and where that comes from."""

    key: str
    value: Any
    kind: str  # default, file, environment or flag
    source: str  # which file, variable or flag


@dataclass(frozen=True)
class Inspected:
    """What one command would work with."""

    files: list[Path]  # of settings, weakest first; not all of them exist
    common: list[Setting]  # what holds for every command
    own: list[Setting]


def inspect_command(ctx: Any, path: CommandPath, words: list[str]) -> Inspected:
    """What `tessera <path> <words>` would work with; nothing is run. Raises `Invalid`, `typer.BadParameter`."""
    root = ctx.find_root()
    command = root.command.commands_below[path]
    kept = root.meta[_LAYERS]
    layers = root.meta[_LAYERS] = Layers(root.command.known)  # those of this command's own state directory
    layers.add(user_file())
    try:
        own = _inspect(root, command, path, words)
        return Inspected(layers.looked_at, _inspect_root(root), own)
    finally:
        root.meta[_LAYERS] = kept


def _inspect_root(root: Any) -> list[Setting]:
    return [_setting(root, option, *_root_value(root, option)) for option in _options(root.command)]


def _inspect(root: Any, command: Any, path: CommandPath, words: list[str]) -> list[Setting]:
    inner = command.context_class(command, info_name=path[-1], parent=root, resilient_parsing=True)
    inner.default_map = _defaults(root.meta[_LAYERS], command, path)
    inner.resilient_parsing = False  # an unknown option is an error here too
    opts, _, _ = command.make_parser(inner).parse_args(args=list(words))
    inner.resilient_parsing = True  # but nothing is asked or demanded
    found = []
    for option in sorted(_options(command), key=lambda option: not option.is_eager):
        value, source = option.consume_value(inner, opts)
        inner.set_parameter_source(option.name, source)
        if value is not None:
            value = option.process_value(inner, value)
        found.append(_setting(inner, option, value, source.name))
    return found


def known_variables(root: Configured) -> set[str]:
    """Every variable that any command reads."""
    return OTHER_VARIABLES | {
        name for path, command in root.commands_below.items() for option in _options(command) for name in option.envvar
    }


# --- walking ----------------------------------------------------------------------------------------------------------


def _leaves(group: TyperGroup, path: CommandPath) -> Iterator[tuple[CommandPath, TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _leaves(command, (*path, name))
        elif isinstance(command, TyperCommand):
            yield (*path, name), command


def _options(command: Any) -> list[Any]:
    """The options that are settings: all but those that only show something and end."""
    options = (param for param in command.params if isinstance(param, TyperOption) and param.expose_value)
    return [option for option in options if option.name not in _SHOWING]


def _key(option: Any) -> str:
    """The option's long name, as in a file of settings: `--claim-above` is `claim_above`."""
    long = next((word for word in option.opts if word.startswith("--")), f"--{option.name}")
    return str(long[2:].replace("-", "_"))


def _variables(path: CommandPath, option: Any) -> list[str]:
    key = _key(option).upper()
    own = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
    words = [word.upper().replace("-", "_") for word in path]
    return list(dict.fromkeys(("_".join([PREFIX, *words, key]), *own, f"{PREFIX}_{key}")))


# --- layering ---------------------------------------------------------------------------------------------------------


def _start(ctx: Any, root: Configured) -> None:
    layers = ctx.meta[_LAYERS] = Layers(root.known)
    layers.add(user_file())
    _settle(ctx)
    ctx.default_map = {}
    for path, command in root.commands_below.items():
        if path:
            table = ctx.default_map
            for word in path[:-1]:
                table = table.setdefault(word, {})
            table[path[-1]] = {**table.get(path[-1], {}), **_defaults(layers, command, path)}
            _check(ctx, layers, command, path)


def _add_state_file(ctx: Any, option: Any, value: Path) -> Path:
    """A command has learned its state directory: what is set there holds for its other options."""
    layers = ctx.meta.get(_LAYERS)
    if layers is not None and value is not None:
        layers.add(Path(value) / FILE, in_state_dir=True)
        path = _path_of(ctx)
        ctx.default_map = _defaults(layers, ctx.command, path)
        _settle(ctx.find_root())
        _check(ctx, layers, ctx.command, path)
    return value


def _path_of(ctx: Any) -> CommandPath:
    root = ctx.find_root().command
    return next(path for path, command in root.commands_below.items() if command is ctx.command)


def _defaults(layers: Layers, command: Any, path: CommandPath) -> dict[str, Any]:
    said = layers.of(path)
    return {option.name: said[key][0] for option in _options(command) if (key := _key(option)) in said}


def _check(ctx: Any, layers: Layers, command: Any, path: CommandPath) -> None:
    """Raises `Invalid` that names the file for a value of the wrong type; else the message would name a flag."""
    said = layers.of(path)
    for option in _options(command):
        if (key := _key(option)) in said:
            value, file = said[key]
            try:
                option.get_runtime_param().coerce(value, param=option, ctx=ctx)
            except typer.BadParameter as error:
                raise Invalid(f"{file}: {key} = {value!r} does not fit: {error.message}") from error


def _settle(root: Any) -> None:
    """Resolve what holds for all commands, from the root's flags, its variables and the files."""
    values = {}
    for option in _options(root.command):
        values[_key(option)], _ = _root_value(root, option)
    quota, level = values.get("disk_quota"), values.get("log")
    set_settings(
        Settings(
            log=None if level is None else choice("log", str(level).lower(), ("debug", "info", "warning", "error")),
            log_format=choice("log_format", str(values.get("log_format") or "auto"), ("auto", "console", "json")),
            log_stderr=bool(values.get("log_stderr", True)),
            passphrase_file=None if values.get("passphrase_file") is None else Path(values["passphrase_file"]),
            disk_quota_bytes=None if quota is None else parse_size("disk_quota", str(quota)),
        )
    )
    from tessera.cli.logs import configure_logs
    from tessera.cli.passphrases import Passphrases
    from tessera.training.passphrase import use_passphrases

    configure_logs("warning")
    use_passphrases(Passphrases())


def _root_value(root: Any, option: Any) -> tuple[Any, str]:
    source = root.get_parameter_source(option.name).name
    said = root.meta[_LAYERS].of(())
    if source == "DEFAULT" and _key(option) in said:
        value, file = said[_key(option)]
        try:
            return option.get_runtime_param().coerce(value, param=option, ctx=root), "DEFAULT_MAP"
        except typer.BadParameter as error:
            raise Invalid(f"{file}: {_key(option)} = {value!r} does not fit: {error.message}") from error
    return root.params[option.name], source


def _setting(ctx: Any, option: Any, value: Any, source: str) -> Setting:
    key = _key(option)
    if source == "ENVIRONMENT":
        variable = next(name for name in option.envvar if os.environ.get(name))
        return Setting(key, value, "environment", variable)
    if source == "DEFAULT_MAP":
        path = _path_of(ctx)
        return Setting(key, value, "file", str(ctx.meta[_LAYERS].of(path)[key][1]))
    if source == "COMMANDLINE":
        return Setting(key, value, "flag", option.opts[0])
    return Setting(key, value, "default", "")

"""Where a setting comes from, for every command alike.

The order, later wins: the default in the code; `config.toml` in the configuration folder; `config.toml` in the state
directory; a variable `TESSERA_…`; a flag. In a file, a key at the top holds for every command that has that option, and
a table such as `[join]` or `[run.create]` for one command:

    disk_quota = "50 GB"
    [join]
    device = "cuda"

Of variables, `TESSERA_DEVICE` and `TESSERA_JOIN_DEVICE` relate in the same way. Within one layer the command's own
wins. A key that no command knows is an error.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessera.core.errors import Invalid

__all__ = ["FILE", "Known", "Layers", "Settings", "SettingsFile", "current_settings", "set_settings", "user_file"]

FILE = "config.toml"
FILE_LIMIT = 1 << 20  # bytes

CommandPath = tuple[str, ...]  # ("run", "create"); () = what holds for all commands
Known = Mapping[CommandPath, Mapping[str, bool]]  # each command's settings; true = a path, relative to its file


@dataclass(frozen=True)
class Settings:
    """What holds for every command, resolved."""

    log: str | None = None  # debug, info, warning or error; None = the command's own choice
    log_format: str = "auto"  # auto, console or json
    log_stderr: bool = True  # off: long-running commands log to their file alone
    passphrase_file: Path | None = None  # opens protected keys; None = a credential or a prompt
    disk_quota_bytes: int | None = None  # for everything in the state directory; None = no limit


_current: ContextVar[Settings] = ContextVar("settings")


def current_settings() -> Settings:
    """The settings of the command that runs; the defaults outside of one."""
    return _current.get(Settings())


def set_settings(settings: Settings) -> None:
    _current.set(settings)


@dataclass(frozen=True)
class SettingsFile:
    """One file, read and checked. `values` has what it says for each command, () for all that know the key."""

    path: Path
    values: Mapping[CommandPath, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path, known: Known, *, in_state_dir: bool = False) -> SettingsFile | None:
        """None when there is no such file. Raises `Invalid` for one that cannot be read, or says unknown things."""
        try:
            with path.open("rb") as file:
                data = file.read(FILE_LIMIT + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Invalid(f"cannot read {path}: {error.strerror}") from error
        if len(data) > FILE_LIMIT:
            raise Invalid(f"{path} is longer than {FILE_LIMIT} bytes: it is no file of settings")
        try:
            table = tomllib.loads(data.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise Invalid(f"{path} is not TOML: {error}") from error
        values: dict[CommandPath, dict[str, Any]] = {}
        _collect(path, table, (), known, values)
        if in_state_dir and any("state_dir" in keys for keys in values.values()):
            raise Invalid(f"{path} cannot say where the state directory is: it lies in it")
        return cls(path, values)


@dataclass
class Layers:
    """The files that are in force, weakest first."""

    known: Known
    files: list[SettingsFile] = field(default_factory=list)
    looked_at: list[Path] = field(default_factory=list)

    def add(self, path: Path, *, in_state_dir: bool = False) -> None:
        """Put the file at `path`, if there is one, above those that are here. Raises `Invalid`."""
        if path not in self.looked_at:
            self.looked_at.append(path)
            if (file := SettingsFile.read(path, self.known, in_state_dir=in_state_dir)) is not None:
                self.files.append(file)

    def of(self, command: CommandPath) -> dict[str, tuple[Any, Path]]:
        """What the files say of one command's settings, each with the file that it comes from."""
        found: dict[str, tuple[Any, Path]] = {}
        for file in self.files:
            for path in dict.fromkeys(((), command)):
                for key, value in file.values.get(path, {}).items():
                    if key in self.known[command]:
                        is_path = self.known[command][key]
                        found[key] = (_beside(file.path, value) if is_path else value, file.path)
        return found


def user_file() -> Path:
    """The settings of this user's commands: `TESSERA_CONFIG_DIR`, else the XDG configuration folder."""
    if chosen := os.environ.get("TESSERA_CONFIG_DIR"):
        return Path(chosen) / FILE
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "tessera" / FILE


def _collect(
    file: Path, table: Mapping[str, Any], path: CommandPath, known: Known, values: dict[CommandPath, dict[str, Any]]
) -> None:
    for written, value in table.items():
        key = written.replace("-", "_")
        if isinstance(value, dict):
            below = (*path, written)
            if not any(command[: len(below)] == below for command in known):
                raise Invalid(
                    f"{file}: there is no command [{'.'.join(below)}]{_nearest(written, _tables(path, known))}"
                )
            _collect(file, value, below, known, values)
            continue
        keys = known.get(path, {}) if path else {key for names in known.values() for key in names}
        if key not in keys:
            where = f"[{'.'.join(path)}]" if path else "at the top"
            raise Invalid(f"{file}: there is no setting {written!r} {where}{_nearest(key, keys)}")
        values.setdefault(path, {})[key] = value


def _tables(path: CommandPath, known: Known) -> list[str]:
    return [command[len(path)] for command in known if command[: len(path)] == path and len(command) > len(path)]


def _nearest(word: str, words: Iterable[str]) -> str:
    """
    >>> _nearest("steeps", ["steps", "stages"])
    ': did you mean steps?'
    """
    near = difflib.get_close_matches(word, sorted(set(words)), n=1)
    return f": did you mean {near[0]}?" if near else ": `tessera config --all` lists them"


def _beside(file: Path, value: Any) -> Any:
    """A path in a file is relative to the file, so that it means the same wherever a command is typed."""
    if isinstance(value, str) and value:
        return str(file.parent / Path(value).expanduser())
    return [_beside(file, one) for one in value] if isinstance(value, list) else value

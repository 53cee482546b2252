"""What several commands' options share: their types, their words, their defaults. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.core.errors import Invalid

__all__ = ["AsJson", "StateDir", "choice", "default_state_dir", "parse_size"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

StateDir = Annotated[
    Path, typer.Option("--state-dir", envvar="TESSERA_STATE_DIR", help="Keys, chain, model: everything that must last.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]


def default_state_dir(name: str) -> Path:
    """Where a command keeps its state when nobody says otherwise."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "tessera" / name


def choice(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    """`value`, when it is one of `allowed`. Raises `Invalid` otherwise."""
    if value not in allowed:
        raise Invalid(f"{option} is one of {', '.join(allowed)}, not {value!r}")
    return value


def parse_size(option: str, text: str) -> int:
    """A size in bytes as people write it. Raises `Invalid`.

    >>> parse_size("--disk-quota", "1.5 GB"), parse_size("--disk-quota", "2GiB")
    (1500000000, 2147483648)
    """
    words = text.strip().lower().removesuffix("b").rstrip()
    number = words.rstrip("kmgti")
    unit = words[len(number) :]
    try:
        size = int(float(number) * _UNITS[unit]) if number.strip().isascii() else -1
    except (ValueError, KeyError, OverflowError):
        size = -1
    if size <= 0:
        raise Invalid(f"{option} is a size such as 50GB or 2GiB, not {text!r}")
    return size

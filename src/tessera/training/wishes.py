"""What a person wants of a run, kept in the run's folder: whatever process works there follows it, now or later.

A wish outlives whoever was told of it: `tessera leave` in one terminal reaches the worker in another, and a worker who
was asked to leave and then crashed still leaves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from tessera.core.errors import Invalid
from tessera.training.home import write_atomic

__all__ = ["Wish", "make_wish", "read_wish"]

Wish = Literal["work", "pause", "leave", "close"]

FILE = "wish"


def make_wish(folder: Path, wish: Wish) -> None:
    """Raises `OSError` when the disk does not take it."""
    write_atomic(folder / FILE, wish.encode())


def read_wish(folder: Path) -> Wish:
    """`work` when nobody wished anything. Raises `Invalid` for a damaged file."""
    try:
        text = (folder / FILE).read_bytes()[:32].decode(errors="replace").strip()
    except FileNotFoundError:
        return "work"
    if text not in get_args(Wish):
        raise Invalid(f"{folder / FILE} says {text!r}, expected one of {', '.join(get_args(Wish))}")
    return text  # type: ignore[return-value]

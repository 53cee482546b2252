"""What a check of `tessera doctor` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SIGNS", "Finding", "Verdict"]

Verdict = Literal["ok", "warning", "problem"]
SIGNS: dict[Verdict, tuple[str, str]] = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


@dataclass(frozen=True)
class Finding:
    """One line. A problem keeps a node from working; a warning may cost its owner something."""

    what: str
    verdict: Verdict
    detail: str
    fix: str = ""

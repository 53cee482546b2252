"""Who is in the studio, what each asks for its work, and whose money each may spend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tessera.core.errors import Invalid

__all__ = ["ASSET", "DECIMALS", "PRICES", "ROLES", "Fault", "StudioConfig"]

Fault = Literal["none", "silent", "absent", "dead"]
DECIMALS, ASSET = 6, "tUSD"
_UNIT = 10**DECIMALS

ROLES = ("buyer", "editor", "analyst", "chart maker", "narrator", "second narrator", "referee")
PRICES = {  # of the studio's own list, in units
    "recap": 12 * _UNIT, "analysis": 2 * _UNIT, "charts": 3 * _UNIT, "voice": 2 * _UNIT, "check": _UNIT * 3 // 10,
}  # fmt: skip
MAKERS = {
    "recap": ("editor",), "analysis": ("analyst",), "charts": ("chart maker",),
    "voice": ("narrator", "second narrator"), "check": ("analyst",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StudioConfig:
    """One evening in the studio.

    Args:
        fault: of the first narrator: delivers silence, never answers, or dies once its job is funded.
        compare: also buy from the same agents one by one, for the report of value.
        seed: of the generated prices.
        cpu_units_per_s: what a second of processor time is taken to cost, in units.
    """

    state_dir: Path
    fault: Fault = "none"
    compare: bool = False
    seed: int = 7
    cpu_units_per_s: int = _UNIT // 50
    deadline_s: int = 900
    patience_s: int = 30  # for a narrator with a fault

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31 or self.cpu_units_per_s < 0 or self.deadline_s < 60 or self.patience_s < 5:
            raise Invalid("a seed is below 2^31, a deadline at least a minute away, patience at least 5 s")

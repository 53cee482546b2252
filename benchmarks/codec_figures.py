"""What the runs of the boundary codec's study say: steps for the same loss, bytes, time; as figures and as tables.

Every length is its own run, whose rates decay to zero at its end. A mode's *steps ratio* at N steps is

    N / n,   n = the steps after which the reference has the loss that the mode has after N

with n read off the reference's separately annealed runs of the same seed: loss is linear in log(steps) between
neighbouring lengths, and beyond the longest (or shortest) on the line through the last (or first) two; that is marked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from codec_runs import MODES, Record, Run, Size

__all__ = ["Ratio", "Study", "figures", "report", "step_seconds", "steps_for"]

WIDE = 1024  # the width that bytes and times are stated for: that of the public record
# A line through the two steps of the public ProtocolNanoGPT record: 2,048 bytes 100.5 s, 322 bytes 19.9 s.
FIXED_S, S_PER_BYTE = 4.855, 0.04669

GROWTH = 4  # the ratio's growth is stated from a quarter of the longest run to the whole

Curve = Mapping[int, float]  # steps of a run → its validation loss, nats per token


@dataclass(frozen=True)
class Ratio:
    """Steps of a mode for each step of the reference, at the same loss; one for each seed."""

    steps: int
    seeds: Mapping[int, float]
    extrapolated: bool

    @property
    def mean(self) -> float:
        return mean(self.seeds.values())

    def __str__(self) -> str:
        values = ", ".join(f"{value:.3f}" for value in self.seeds.values())
        return f"{self.mean:.3f} ({values})" + (" e" if self.extrapolated else "")


def steps_for(curve: Curve, loss: float) -> tuple[float, bool]:
    """The steps that `curve` needs for `loss`, and whether that lies outside its runs. At least two lengths needed."""
    points = sorted(curve.items())
    pairs = list(itertools.pairwise(points))
    (n, high), (m, low) = next((pair for pair in pairs if loss >= pair[1][1]), pairs[-1])
    steps = n * math.exp(math.log(m / n) * (high - loss) / (high - low))
    return steps, not points[0][0] <= steps <= points[-1][0]


def step_seconds(bytes_per_token: float) -> float:
    """Seconds of one step of the public record's set-up, with that many bytes per token and direction."""
    return FIXED_S + S_PER_BYTE * bytes_per_token


class Study:
    """The records of one size, by mode and seed; those with other rates than the mode's own are left aside."""

    def __init__(self, records: Iterable[Record], size: Size) -> None:
        self.size = size
        self.records = [record for record in records if all(record.get(n) == v for n, v in vars(size).items())]
        self.curves: dict[str, dict[int, dict[int, float]]] = {mode: {} for mode in MODES}
        for record in self.records:
            if self.is_own(record):
                curve = self.curves[record["mode"]].setdefault(record["seed"], {})
                curve[record["steps"]] = record["loss"]

    def is_own(self, record: Record) -> bool:
        """Whether a record has the rates that its mode has now."""
        if record["mode"] not in MODES:
            return False
        own = Run(record["mode"], self.size, record["steps"], record["seed"]).settings()
        return all(record.get(name) == value for name, value in own.items())

    def lengths(self, mode: str) -> list[int]:
        return sorted({steps for curve in self.curves[mode].values() for steps in curve})

    def ratio(self, mode: str, reference: str, steps: int) -> Ratio | None:
        """None when no seed has both the run and a reference of two lengths."""
        found, outside = dict[int, float](), False
        for seed, curve in sorted(self.curves[mode].items()):
            against = self.curves[reference].get(seed, {})
            if steps in curve and len(against) > 1:
                needed, extrapolated = steps_for(against, curve[steps])
                found[seed], outside = steps / needed, outside or extrapolated
        return Ratio(steps, found, outside) if found else None


def figures(study: Study, overhead_bytes: float) -> dict[str, Any]:
    """The flat object of figures.

    Args:
        overhead_bytes: of envelope for each token and direction, metered on a real stream.
    """
    lengths = study.lengths("codec")
    longest = lengths[-1]
    sent, sent_reparam = (_wide_bytes(mode, study.size) + overhead_bytes for mode in ("codec", "reparam"))
    dense_s = step_seconds(2.0 * WIDE)
    matched, first = study.ratio("codec", "control", longest), study.ratio("codec", "control", longest // GROWTH)
    plain = study.ratio("codec", "dense", longest)
    lengths_reparam = study.lengths("reparam")
    reparam = study.ratio("reparam", "dense", lengths_reparam[-1]) if lengths_reparam else None
    return {
        "steps_ratio": _rounded(plain.mean) if plain else None,
        "steps_ratio_matched": _rounded(matched.mean) if matched else None,
        "steps_ratio_growth": _growth(first, matched),
        "bytes_per_token": round(sent, 2),
        "dense_bytes_per_token": 2 * WIDE,
        "speedup_vs_dense": _rounded(dense_s / (matched.mean * step_seconds(sent))) if matched else None,
        "reparam_speedup_vs_dense": _rounded(dense_s / (reparam.mean * step_seconds(sent_reparam)))
        if reparam
        else None,
        "d": study.size.width,
        "k": Run("codec", study.size, longest, 0).spec().codec.k,
        "steps": longest,
        "seeds": len(matched.seeds) if matched else 0,
    }


def _growth(first: Ratio | None, last: Ratio | None) -> float | None:
    """How much larger the last ratio is, over the seeds that have both."""
    if first is None or last is None:
        return None
    seeds = first.seeds.keys() & last.seeds.keys()
    return _rounded(mean(last.seeds[s] for s in seeds) / mean(first.seeds[s] for s in seeds)) if seeds else None


def _wide_bytes(mode: str, size: Size) -> int:
    """Bytes of a token's message at the public record's width, the code scaled with it."""
    return Run(mode, replace(size, width=WIDE), 1, 0).spec().message_bytes_per_token()


def report(study: Study) -> str:
    """Losses, ratios and rates, as Markdown."""
    lengths = sorted({steps for mode in MODES for steps in study.lengths(mode)})
    return "\n\n".join((_losses(study, lengths), _ratios(study, lengths), _rates(study)))


def _losses(study: Study, lengths: Sequence[int]) -> str:
    rows = []
    for mode, curves in study.curves.items():
        if curves:
            cells = [", ".join(f"{c[n]:.4f}" for _, c in sorted(curves.items()) if n in c) for n in lengths]
            params = next(r["params"] for r in study.records if r["mode"] == mode)
            rows.append([mode, f"{params:,}", *cells])
    return "Validation loss, nats per token, one number for each seed:\n\n" + _table(
        ["mode", "params", *(f"{n:,} steps" for n in lengths)], rows
    )


def _ratios(study: Study, lengths: Sequence[int]) -> str:
    rows = [
        [f"{mode} ÷ {reference}", *(str(study.ratio(mode, reference, n) or "") for n in lengths)]
        for mode in MODES
        for reference in ("control", "dense")
        if mode != reference and any(study.ratio(mode, reference, n) for n in lengths)
    ]
    return "Steps for the same loss (mean and each seed; e: outside the reference's runs):\n\n" + _table(
        ["steps", *(f"{n:,}" for n in lengths)], rows
    )


def _rates(study: Study) -> str:
    shown = ("muon_rate", "table_rate", "head_rate", "code_rate", "table_std")
    rows = []
    for r in sorted(study.records, key=lambda r: (r["mode"], r["steps"], r["seed"], r["loss"])):
        name, chosen = [r["mode"], f"{r['steps']:,}", str(r["seed"])], "yes" if study.is_own(r) else ""
        rows.append([*name, *(f"{r[rate]:g}" for rate in shown), f"{r['loss']:.4f}", chosen])
    return "All runs:\n\n" + _table(["mode", "steps", "seed", *shown, "loss", "chosen"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _rounded(value: float) -> float:
    return round(value, 3)

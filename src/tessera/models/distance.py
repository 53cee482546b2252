r"""How far a message is from what a replay of its work gives, in steps of its own code.

Two honest machines never compute the same float: threads and kernels sum in another order. So bytes are not compared;
the number of code steps between them is. With δ the difference of the two computations in steps and a fractional part
that is spread evenly over [0, 1),

    E |round(x + δ) − round(x)| = |δ|        and the same for floor(x + u) with one u on both sides,

so the mean count of steps estimates the mean error of the computation, however coarse the codes: a message of N numbers
sees an error of 1 / N steps. (TOPLOC compares exponents and mantissas of the largest activations for the same reason:
arXiv 2501.16007, §4. We have the whole code, and so no need to choose.)

The replayed numbers are rounded with the *claimed* scale, so that a scale that rounds the other way by a hair counts
for nothing; a scale that is off by more than `SCALE_SLACK` counts as the whole range. Legend as in `wire`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.wire import Wire

__all__ = ["SCALE_SLACK", "Distance", "Tolerance", "compare", "relative_error", "tolerance"]

SCALE_SLACK = 1 / 16  # honest bfloat16 runs differ by one or two units in the last place of a scale: 1/128 each
LEVELS = 127


@dataclass(frozen=True, slots=True)
class Distance:
    """Between a message and its replay, in code steps."""

    mean: float  # over all numbers
    worst: float  # the mean over the numbers of the worst token
    numbers: int  # how many were compared


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What honest machines may differ by when both compute what the manifest says."""

    mean: float  # steps, in the limit of a long message
    worst: float  # steps, for one token
    relative: float  # of a sum of gradients or a loss: ‖difference‖ / ‖replayed‖

    def used(self, distance: Distance) -> float:
        """How much of the tolerance a message needs; above 1 it is refused.

        A short message gets what counting adds: three standard deviations of a Poisson count, and one step.
        """
        expected = self.mean * distance.numbers
        allowed = expected + 3 * math.sqrt(expected) + 1
        return max(distance.mean * distance.numbers / allowed, distance.worst / self.worst)


def tolerance(compute: str, layers: int) -> Tolerance:
    """For a stage of `layers` layers whose manifest declares `compute`.

    Each layer adds its own rounding, so errors grow about as √layers, honest ones and those of a lower precision alike.
    The figures are for two layers and lie between both, see benchmarks/results/audit: measured up to 12 layers.
    """
    base, growth = _TWO_LAYERS[compute], math.sqrt(max(layers, 2) / 2)
    return Tolerance(base.mean * growth, base.worst * growth, base.relative * growth)


_TWO_LAYERS = {
    "float32": Tolerance(mean=0.004, worst=1.0, relative=1e-4),
    "bfloat16": Tolerance(mean=0.06, worst=2.0, relative=2e-2),
}


def compare(
    wire: Wire, claimed: bytes, replayed_BTW: Float[Tensor, "B T W"], noise: tuple[object, ...] | None = None
) -> Distance:
    """How far `claimed` is from `replayed_BTW`.

    Args:
        noise: the name that `Wire.pack` rounded with, for gradients.

    Raises: Invalid: `claimed` is no message of that shape.
    """
    x_BTW = replayed_BTW.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(x_BTW).all()):
        raise Invalid("the replay holds numbers that are not finite")
    batch, length, _ = x_BTW.shape
    said_BTW = wire.unpack(claimed, batch, length)
    own_BT1 = wire.step_sizes(x_BTW)
    if wire.coded:
        step_BT1 = wire.scales(claimed, batch, length)
        code_BTW = torch.where(step_BT1 > 0, said_BTW / step_BT1, 0.0).round_()
        steps_BTW = (code_BTW - wire.quantise(x_BTW, step_BT1, noise)).abs_()
        off_BT1 = (step_BT1 - own_BT1).abs() > SCALE_SLACK * own_BT1
        steps_BTW = torch.where(off_BT1, float(LEVELS), steps_BTW)
    else:
        rounded = wire.unpack(wire.pack(x_BTW), batch, length)
        steps_BTW = torch.where(own_BT1 > 0, (said_BTW - rounded).abs() / own_BT1, 0.0)
        steps_BTW = torch.where((own_BT1 == 0) & (said_BTW != rounded), float(LEVELS), steps_BTW)
    steps_BTW = steps_BTW.clamp_(max=float(LEVELS))
    return Distance(float(steps_BTW.mean()), float(steps_BTW.mean(-1).max()), steps_BTW.numel())


def relative_error(claimed: Tensor, replayed: Tensor) -> float:
    """‖claimed − replayed‖ / ‖replayed‖, 0 for two zeros, infinite for a claim of something where nothing is."""
    claimed, replayed = claimed.to("cpu", torch.float64), replayed.detach().to("cpu", torch.float64)
    error, size = float((claimed - replayed).norm()), float(replayed.norm())
    if not math.isfinite(error):
        return math.inf
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)

r"""What cheating on audited work is worth. Units: the credit of one microbatch.

A worker of `work` microbatches in an epoch cheats on k of them. Each saves him what computing it would have cost,
0 ≤ saved ≤ 1 of its credit (nobody works at a loss), and is audited and recognised with probability p·d. One that is
recognised costs him the epoch's credit and his stake:

    gain(k) = k · saved − (1 − (1 − p·d)^k) · at_stake          at_stake = work + stake

The second term is concave in k, so gain is convex and largest at k = 1 or at k = work: two numbers decide. At k = 1
audits deter as soon as p·d · at_stake > saved, the familiar "penalty ≥ gain / p"; a worker who cheats always is
certain to be found after a few 1 / (p·d) microbatches, and then has saved less than he loses.
"""

from __future__ import annotations

from tessera.core.errors import Invalid

__all__ = ["expected_gain", "least_rate", "worst_gain"]


def expected_gain(cheated: int, *, rate: float, recognised: float, saved: float, at_stake: float) -> float:
    """gain(k) for k = `cheated`.

    Args:
        rate: p, of microbatches that are audited.
        recognised: d, of audited cheats that fail.
        saved: cost of an honest microbatch.
        at_stake: what one recognised cheat costs.

    Raises: Invalid: a probability outside [0, 1], or a negative number.

    >>> round(expected_gain(1, rate=0.05, recognised=1.0, saved=1.0, at_stake=100), 9)
    -4.0
    """
    if not (0 <= rate <= 1 and 0 <= recognised <= 1):
        raise Invalid(f"rate and recognised lie in [0, 1], not {rate} and {recognised}")
    if cheated < 0 or saved < 0 or at_stake < 0:
        raise Invalid("what is cheated, saved and at stake is not negative")
    return cheated * saved - (1 - (1 - rate * recognised) ** cheated) * at_stake


def worst_gain(work: int, *, rate: float, recognised: float, saved: float, stake: float = 0.0) -> float:
    """The most that cheating on any number of an epoch's `work` microbatches is worth. Raises: Invalid as above."""
    if work < 1:
        raise Invalid(f"an epoch has at least one microbatch, not {work}")
    facts = {"rate": rate, "recognised": recognised, "saved": saved, "at_stake": work + stake}
    return max(expected_gain(1, **facts), expected_gain(work, **facts))


def least_rate(work: int, *, recognised: float, saved: float, stake: float = 0.0) -> float:
    """The smallest audit rate at which cheating never gains, to 10^-6, rounded up; infinite when none deters.

    Gain falls with the rate, so bisection finds it. Cost: 20 evaluations.
    """

    def gains(rate: float) -> bool:
        return worst_gain(work, rate=rate, recognised=recognised, saved=saved, stake=stake) >= 0

    if gains(1.0):
        return float("inf")
    low, high = 0, 10**6
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if gains(middle / 10**6) else (low, middle)
    return high / 10**6

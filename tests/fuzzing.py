"""How long the long random walks are: `make fuzz` makes them many times as long, and every time others."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

FUZZ = int(os.environ.get("TESSERA_FUZZ", "1"))


def explore(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    """Walk at random through `machine`. Without the phase that explains: it takes longer than the timeout."""
    limits = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    run_state_machine_as_test(machine, settings=limits)

"""A week in a minute: fifty strangers on bad links, some of them hostile, and no share is lost.

What is asserted while it runs stands in `week_world`: at the end of each epoch all honest members that are up hold the
same receipts, compute the same leaves and root, and pay every worker what was signed, to the last unit; a receipt that
is not known then is on a machine that was off. A deadlock ends `run_virtual` with an error.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import pytest
import structlog

from tessera.core.signing import verify_peer
from tessera.p2p import flood_item
from tessera.p2p.memory import run_virtual
from week_world import CONFIG, Tally, Week

MALICIOUS = 3


@pytest.fixture(autouse=True)
def _share_the_work_of_fifty_machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """They check the same signatures, which is a pure function: each is checked once. And no log, it would take longer
    than the week."""
    monkeypatch.setattr(flood_item, "verify_peer", functools.lru_cache(4096)(verify_peer))
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


def simulate(seed: int, *, rows: int, days: int) -> Tally:
    week = Week(seed, rows=rows, days=days, hostile=MALICIOUS)
    tally = run_virtual(week.run)
    members = len(week.nodes)
    assert (tally.epochs, tally.rounds, tally.partitions) == (days, days * week.rounds, days)
    assert tally.starts > members  # they came back
    assert tally.crashes > 0
    assert tally.framed == []  # no honest member was ever taken for a liar
    assert tally.voided > 0  # and those who equivocate were
    assert tally.barred > 0
    assert tally.items_peak <= members * 20 + MALICIOUS * CONFIG.state.origin_items  # honest ones: two days of work
    assert tally.bytes_peak <= members * 20 * 2048 + MALICIOUS * CONFIG.state.origin_bytes
    assert tally.queue_peak <= members * 64
    assert tally.tasks_peak <= members * 20
    assert tally.late <= tally.starts / 10
    steps = tally.rounds * rows
    assert tally.steps_lost < steps / 2
    assert tally.microbatches > 0
    return tally


@pytest.mark.slow
def test_a_day_of_twenty_strangers_loses_no_share() -> None:
    simulate(1, rows=4, days=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [2, 3])
def test_a_week_of_fifty_strangers_loses_no_share(seed: int) -> None:
    simulate(seed, rows=10, days=7)

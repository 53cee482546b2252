"""Clocks: the fake stands still until told; the real one runs."""

from __future__ import annotations

import time

from tessera.core.clock import Clock, FakeClock, SystemClock


def test_a_fake_clock_stands_still_until_it_is_told_to_advance() -> None:
    clock: Clock = FakeClock(100.0)
    assert clock.time() == clock.time() == 100.0
    assert isinstance(clock, FakeClock)
    clock.advance(2.5)
    assert clock.time() == 102.5


def test_the_system_clock_tells_the_machines_time() -> None:
    before = time.time()
    assert before <= SystemClock().time() <= time.time()

"""How fast a run will be, before anybody joins it: the session's own schedule, played with the stages' measured paces.

Every stage computes one thing at a time, gradients first; stage 0 keeps at most stages + 1 microbatches in flight and
waits for the last gradient before its next step (1F1B with flush). Stages on one machine share its cores; a message
takes its sender's uplink, its receiver's downlink, and half a round trip. No torch, no clock, no randomness.

What it does not know: a machine that slows down, packet loss, and more than one program on a core.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tessera.core.errors import Invalid

__all__ = ["Forecast", "StagePace", "Workload", "forecast"]

# What a message costs its sender and its receiver each, in processor time: framing, hashing, encryption and two changes
# of thread. Measured with benchmarks/bench_pipeline.py at 2 and 4 stages (the profile's link seconds by messages); the
# rate is that of the encrypted link. It takes part in the forecast as work of the stage.
MESSAGE_S = 0.0007
MESSAGE_BYTES_S = 130e6
# A core that several stages take turns on finds its caches cold after each turn: the same work took 13 % more processor
# time with 4 stages on 2 cores than alone (same benchmark), and none more with 2 stages.
CROWDED = 1 / 1.13
STEPS = 3  # played; the first fills the pipeline, the rest repeat

Limit = Literal["stage", "cores", "links"]


@dataclass(frozen=True, slots=True)
class StagePace:
    """What one stage's worker measured of himself, alone on his machine. Seconds are of one token unless said."""

    forward_s: float  # on the last stage the backward belongs to it
    backward_s: float
    step_s: float = 0.0  # of one optimiser step
    evaluate_s: float = 0.0
    machine: str = ""  # stages with the same name share its cores; a GPU is a machine of its own; empty = alone
    cores: int = 1  # of the machine
    threads: int = 1  # cores that the stage takes while it computes
    up_bytes_s: float = math.inf  # the worker's links, bytes per second
    down_bytes_s: float = math.inf

    def __post_init__(self) -> None:
        for name in ("forward_s", "backward_s", "step_s", "evaluate_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise Invalid(f"{name} must be a number of seconds ≥ 0, not {getattr(self, name)}")
        if self.forward_s + self.backward_s <= 0:
            raise Invalid("a stage takes more than 0 s for a token, forward and backward together")
        if not (self.up_bytes_s > 0 and self.down_bytes_s > 0):
            raise Invalid(f"links carry more than 0 bytes/s, not {self.up_bytes_s} up and {self.down_bytes_s} down")
        if self.cores < 1 or self.threads < 1:
            raise Invalid(f"{self.threads} threads on {self.cores} cores: expected 1 or more of each")

    @classmethod
    def of_total(cls, seconds_per_token: float, *, machine: str = "", cores: int = 1) -> StagePace:
        """From forward and backward together, when nothing else is known: a backward is twice a forward."""
        third = seconds_per_token / 3
        return cls(third, 2 * third, evaluate_s=third, machine=machine, cores=cores)


@dataclass(frozen=True, slots=True)
class Workload:
    """What a step consists of."""

    microbatches: int
    tokens: int  # of one microbatch
    bytes_per_token: float  # of a message, in either direction
    evaluate_every: int = 0  # steps; 0 = never
    evaluate_batches: int = 0  # of a microbatch's size

    def __post_init__(self) -> None:
        if self.microbatches < 1 or self.tokens < 1 or not 0 <= self.bytes_per_token < math.inf:
            raise Invalid(f"a step needs microbatches, tokens and bytes that are counted, not {self}")


@dataclass(frozen=True, slots=True)
class Forecast:
    """What to expect of a run."""

    tokens_per_s: float  # evaluation included
    step_s: float  # without evaluation
    busy: tuple[float, ...]  # part of the time that each stage computes, or waits for a core to do so
    limit: Limit  # what would help most: a faster slowest stage, more cores, or faster links

    @property
    def slowest(self) -> int:
        """The stage that the others wait for."""
        return max(range(len(self.busy)), key=self.busy.__getitem__)


def forecast(stages: Sequence[StagePace], work: Workload, *, rtt_s: float | Sequence[float] = 0.0) -> Forecast:
    """Tokens per second of `stages` in line.

    Args:
        rtt_s: round trip over each boundary, one for all or one for each.

    Raises: Invalid: no stages, or not one round trip for each boundary.

    Cost: about 10 µs for each stage and microbatch, ten times over.

    >>> one = StagePace(forward_s=1e-4, backward_s=2e-4)
    >>> round(forecast([one, one], Workload(microbatches=8, tokens=100, bytes_per_token=0)).tokens_per_s)
    2831
    """
    rtts = [float(rtt_s)] * (len(stages) - 1) if isinstance(rtt_s, int | float) else list(rtt_s)
    if not stages or len(rtts) != len(stages) - 1 or not all(0 <= rtt < math.inf for rtt in rtts):
        raise Invalid(f"{len(stages)} stages with round trips {rtts[:8]}: expected one ≥ 0 for each boundary")
    step_s, busy = _per_step(stages, work, rtts)
    pause_s = _evaluation_s(stages, work, rtts)
    tokens = work.microbatches * work.tokens
    return Forecast(tokens / (step_s + pause_s), step_s, busy, _limit(stages, work, step_s))


def _per_step(stages: Sequence[StagePace], work: Workload, rtts: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    play = _Play(stages, work, rtts)
    ends = play.run(STEPS)
    spent = (ends[-1] - ends[0]) / (STEPS - 1)
    return spent, tuple(min(1.0, busy / ends[-1]) for busy in play.busy_s)


def _evaluation_s(stages: Sequence[StagePace], work: Workload, rtts: Sequence[float]) -> float:
    """Seconds that one step takes longer, on average, because some are followed by an evaluation."""
    if not work.evaluate_every or not work.evaluate_batches:
        return 0.0
    plain = _Play(stages, work, rtts).run(STEPS)[-1]
    return max(0.0, _Play(stages, work, rtts, evaluate_at=1).run(STEPS)[-1] - plain) / work.evaluate_every


def _limit(stages: Sequence[StagePace], work: Workload, step_s: float) -> Limit:
    """Played again with the best links, then with a core for everybody: what gains a tenth is what holds back."""
    free = [replace(stage, up_bytes_s=math.inf, down_bytes_s=math.inf) for stage in stages]
    without_links, _ = _per_step(free, replace(work, bytes_per_token=0.0), [0.0] * (len(stages) - 1))
    if step_s > 1.1 * without_links:
        return "links"
    alone, _ = _per_step([replace(stage, machine="") for stage in free], work, [0.0] * (len(stages) - 1))
    return "cores" if without_links > 1.1 * alone else "stage"


class _Machine:
    """Cores shared evenly: n threads on c < n cores compute at c / n of their pace each, less what `CROWDED` says.

    Kept in the machine's own time, in which every task runs at full pace, so that a change of n moves no task.
    """

    def __init__(self, cores: int) -> None:
        self._cores, self._own_s, self._seen_s = cores, 0.0, 0.0
        self._threads = 0
        self._tasks: list[tuple[float, int, int, int]] = []  # (own time at its end, serial, stage, threads)
        self.version = 0  # of the next end: an event that was made for an older one is void

    def add(self, now: float, serial: int, stage: int, work_s: float, threads: int) -> None:
        self._go_on(now)
        heapq.heappush(self._tasks, (self._own_s + work_s, serial, stage, threads))
        self._threads += threads
        self.version += 1

    def next_end(self) -> float | None:
        if not self._tasks:
            return None
        return self._seen_s + (self._tasks[0][0] - self._own_s) / self._rate()

    def finish(self, now: float) -> int:
        """The stage whose task ends now."""
        self._go_on(now)
        _, _, stage, threads = heapq.heappop(self._tasks)
        self._threads -= threads
        self.version += 1
        return stage

    def _rate(self) -> float:
        return 1.0 if self._threads <= self._cores else CROWDED * self._cores / self._threads

    def _go_on(self, now: float) -> None:
        self._own_s += (now - self._seen_s) * self._rate()
        self._seen_s = now


@dataclass(slots=True)
class _Seat:
    """A stage while the schedule is played."""

    gradients: int = 0  # that have arrived
    forwards: deque[str] | None = None  # kinds that have arrived, in order
    started: int = 0  # microbatches that stage 0 has begun in this step
    finished: int = 0  # microbatches whose gradient has passed
    step: int = 0
    task: str = ""  # what it computes now
    since_s: float = 0.0
    up_free_s: float = 0.0  # when its uplink has sent what it was given
    down_free_s: float = 0.0
    to_feed: int = 0  # evaluation batches that stage 0 has still to begin


class _Play:
    """One run of the schedule. Kinds of work: forward, backward, evaluate, step."""

    def __init__(
        self, stages: Sequence[StagePace], work: Workload, rtts: Sequence[float], evaluate_at: int = 0
    ) -> None:
        self._stages, self._work, self._rtts, self._evaluate_at = stages, work, rtts, evaluate_at
        self._last = len(stages) - 1
        self._depth = min(work.microbatches, len(stages) + 1)
        self._seats = [_Seat(forwards=deque()) for _ in stages]
        self._homes = [stage.machine or f" {i}" for i, stage in enumerate(stages)]
        self._machines = {home: _Machine(stage.cores) for home, stage in zip(self._homes, stages, strict=True)}
        self._events: list[tuple[float, int, str, int, str, int]] = []  # (time, serial, what, stage, kind, version)
        self._serial = itertools.count()
        self._ends: list[float] = []
        self._size = work.bytes_per_token * work.tokens
        self.busy_s = [0.0 for _ in stages]

    def run(self, steps: int) -> list[float]:
        """When stage 0 was done with each step."""
        self._begin(0.0, 0)
        while len(self._ends) < steps:
            now, _, what, stage, kind, version = heapq.heappop(self._events)
            if what == "arrive":
                self._arrive(now, stage, kind)
            else:
                machine = self._machines[self._homes[stage]]
                if version == machine.version:
                    self._complete(now, machine.finish(now))
                    self._expect(self._homes[stage], stage)
        return self._ends

    def _arrive(self, now: float, stage: int, kind: str) -> None:
        seat = self._seats[stage]
        if kind == "backward":
            seat.gradients += 1
        elif seat.forwards is not None:
            seat.forwards.append(kind)
        self._begin(now, stage)

    def _begin(self, now: float, stage: int) -> None:
        """What the session would do next, if it is idle and there is something to do."""
        seat = self._seats[stage]
        if not seat.task and (kind := self._choose(stage, seat)):
            seat.task, seat.since_s = kind, now
            machine, pace = self._machines[self._homes[stage]], self._stages[stage]
            machine.add(now, next(self._serial), stage, self._seconds(stage, kind), pace.threads)
            self._expect(self._homes[stage], stage)

    def _choose(self, stage: int, seat: _Seat) -> str:
        if seat.finished == self._work.microbatches:
            return "step"
        if seat.gradients:
            seat.gradients -= 1
            return "backward"
        if stage > 0:
            return seat.forwards.popleft() if seat.forwards else ""
        if seat.to_feed:
            seat.to_feed -= 1
            return "evaluate"
        if seat.started < self._work.microbatches and seat.started - seat.finished < self._depth:
            seat.started += 1
            return "forward"
        return ""

    def _seconds(self, stage: int, kind: str) -> float:
        """Processor seconds of a task, its messages included."""
        pace, tokens = self._stages[stage], self._work.tokens
        if kind == "step":
            return pace.step_s
        messages = (stage > 0) + (stage < self._last)
        if kind == "evaluate":
            compute = pace.evaluate_s
        elif stage == self._last:
            compute, messages = pace.forward_s + pace.backward_s, 2 * messages
        else:
            compute = pace.forward_s if kind == "forward" else pace.backward_s
        return tokens * compute + messages * (MESSAGE_S + self._size / MESSAGE_BYTES_S)

    def _complete(self, now: float, stage: int) -> None:
        seat = self._seats[stage]
        kind, seat.task = seat.task, ""
        self.busy_s[stage] += now - seat.since_s
        if kind == "step":
            self._next_step(now, stage, seat)
        elif kind == "backward" or (kind == "forward" and stage == self._last):
            seat.finished += 1
            if stage > 0:
                self._send(now, stage, stage - 1, "backward")
        elif stage < self._last:
            self._send(now, stage, stage + 1, kind)
        self._begin(now, stage)

    def _next_step(self, now: float, stage: int, seat: _Seat) -> None:
        seat.started, seat.finished, seat.step = 0, 0, seat.step + 1
        if stage == 0:
            self._ends.append(now)
            if seat.step == self._evaluate_at:
                seat.to_feed = self._work.evaluate_batches

    def _send(self, now: float, stage: int, to: int, kind: str) -> None:
        """Bytes leave one after another, and arrive one after another; a link passes on what it has of a message."""
        sender, receiver = self._seats[stage], self._seats[to]
        start = max(now, sender.up_free_s)
        sender.up_free_s = start + self._size / self._stages[stage].up_bytes_s
        start = max(start, receiver.down_free_s)
        receiver.down_free_s = max(sender.up_free_s, start + self._size / self._stages[to].down_bytes_s)
        arrival = receiver.down_free_s + self._rtts[min(stage, to)] / 2
        heapq.heappush(self._events, (arrival, next(self._serial), "arrive", to, kind, 0))

    def _expect(self, home: str, stage: int) -> None:
        machine = self._machines[home]
        end = machine.next_end()
        if end is not None:
            heapq.heappush(self._events, (end, next(self._serial), "end", stage, "", machine.version))

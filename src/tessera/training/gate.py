"""May this worker work now? The owner's machine comes first, and a full disk or a pause stops work cleanly.

    watch ─▶ Sensors.read ─▶ one rule for each condition ─▶ reason, empty while the gate is open

Shut while: the owner or the run paused; it is not the hour; with `only_when_idle`, others use the processor, somebody
is at the keyboard, or the machine runs on battery; the disk or the memory is nearly full; or nobody has looked yet.

Invariants: what is sensed shuts the gate beyond one value and opens it again only at a lower one, held for a while, so
that it does not flap; a pause acts at once; a reading that fails shuts the gate and says why. `watch` must run: the
gate does not open by itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Literal

import anyio
import structlog
from anyio import to_thread

from tessera.core.clock import Clock
from tessera.core.errors import Invalid
from tessera.training.sensors import Reading, Sensors

__all__ = ["AlwaysOpen", "Gate", "GateConfig", "Hours", "check_clock", "parse_hours"]

log = structlog.get_logger()

SLEEP_S = 30.0  # a wall clock that gains this much on the monotonic one in a poll was asleep, not adjusted
UNSEEN = "the machine has not been looked at yet"
ROOM = 1.25  # times a floor: what must be free again before the gate opens
MEBIBYTE = 2**20

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")

Pauser = Literal["owner", "run"]


@dataclass(frozen=True, slots=True)
class Hours:
    """From `start` up to, but not including, `end`: minutes of the day; over midnight when `end` is smaller."""

    start: int
    end: int

    def __contains__(self, minute: object) -> bool:
        if not isinstance(minute, int):
            return False
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


def parse_hours(text: str) -> tuple[Hours, ...]:
    """`22:00-07:00`, or several parted by commas; empty text means always.

    Raises: Invalid for anything else, and for hours that start when they end.

    >>> parse_hours("22:00-07:00")
    (Hours(start=1320, end=420),)
    """
    hours = []
    for part in text.replace(" ", "").split(",") if text.strip() else ():
        match = _HOURS.fullmatch(part)
        if match is None:
            raise Invalid(f"hours look like 22:00-07:00, not {part[:40]!r}")
        a, b, c, d = (int(digits) for digits in match.groups())
        if (a, b) == (c, d):
            raise Invalid(f"hours {part} start when they end: leave them out to work at any hour")
        hours.append(Hours(60 * a + b, 60 * c + d))
    return tuple(hours)


@dataclass(frozen=True)
class GateConfig:
    """When the owner lends the machine. Raises `Invalid` naming the field that is out of range."""

    only_when_idle: bool = False  # give way to other programs, to people at the keyboard, and on battery
    busy_cpu: float = 0.25  # of all cores, used by others: busy beyond it, idle again under half of it
    user_idle_s: float = 300.0  # without a key pressed: then nobody is there; 0 = do not ask
    hours: str = ""  # local time, as 22:00-07:00; empty = always
    disk_floor_bytes: int = 512 * MEBIBYTE  # free space under it shuts
    memory_floor_bytes: int = 128 * MEBIBYTE  # available memory under it shuts
    poll_s: float = 5.0  # between two looks
    busy_after_s: float = 10.0  # others must be busy this long: a moment's load is not worth a pause
    calm_s: float = 60.0  # everything must be calm this long before work goes on

    def __post_init__(self) -> None:
        parse_hours(self.hours)
        if not 0.01 <= self.busy_cpu <= 1:
            raise Invalid(f"busy_cpu is a part of all cores from 0.01 to 1, not {self.busy_cpu}")
        for name in ("user_idle_s", "disk_floor_bytes", "memory_floor_bytes", "busy_after_s", "calm_s"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise Invalid(f"{name} must be a number ≥ 0, not {value}")
        if not 0.1 <= self.poll_s <= 3_600:
            raise Invalid(f"poll_s must be 0.1 to 3600, not {self.poll_s}")


class _Rule:
    """Shuts when a value has been over `high` for `shut_after_s`; opens when under `low` for `open_after_s`."""

    def __init__(self, high: float, low: float, *, shut_after_s: float, open_after_s: float) -> None:
        self._high, self._low, self._shut_after_s, self._open_after_s = high, low, shut_after_s, open_after_s
        self._turning_since: float | None = None  # when it first looked as if the state should change
        self.shut = False

    def look(self, value: float | None, now: float) -> bool:
        """Whether it is shut, after this value at `now`. None is a value that this machine cannot tell: open."""
        known = -math.inf if value is None else value
        turning = known <= self._low if self.shut else known > self._high
        if not turning:
            self._turning_since = None
            return self.shut
        if self._turning_since is None:
            self._turning_since = now
        if now - self._turning_since >= (self._open_after_s if self.shut else self._shut_after_s):
            self.shut, self._turning_since = not self.shut, None
        return self.shut


class Gate:
    """Shut until `watch` has looked once.

    Args:
        clock: the wall clock, for hours and for noticing that the machine slept.
        zone: of `hours`; None = the machine's own.
        resumed: called with the seconds slept, after the machine woke up. Must be quick.
    """

    def __init__(
        self,
        config: GateConfig,
        sensors: Sensors,
        clock: Clock,
        *,
        zone: tzinfo | None = None,
        resumed: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._config, self._sensors, self._clock, self._zone, self._resumed = config, sensors, clock, zone, resumed
        self._hours = parse_hours(config.hours)
        self._paused: set[Pauser] = set()
        self._sensed = UNSEEN
        self._changed = anyio.Event()
        self._said = ""  # the reason that the log knows
        c = config
        calm = {"shut_after_s": c.busy_after_s, "open_after_s": c.calm_s}
        self._cpu = _Rule(c.busy_cpu, c.busy_cpu / 2, **calm)
        self._user = _Rule(-c.user_idle_s, -c.user_idle_s, shut_after_s=0, open_after_s=0)  # the idle time is the calm
        self._battery = _Rule(0.5, 0.5, shut_after_s=0, open_after_s=c.calm_s)
        self._disk = _Rule(-c.disk_floor_bytes, -ROOM * c.disk_floor_bytes, shut_after_s=0, open_after_s=0)
        self._memory = _Rule(-c.memory_floor_bytes, -ROOM * c.memory_floor_bytes, shut_after_s=0, open_after_s=c.calm_s)

    @property
    def open(self) -> bool:
        return not self.reason

    @property
    def reason(self) -> str:
        """Why it is shut, for the owner to read; empty while it is open."""
        if "owner" in self._paused:
            return "paused by its owner"
        if "run" in self._paused:
            return "the run is paused"
        return self._sensed

    def pause(self, who: Pauser) -> None:
        """Shut until the same one calls `go_on`. Acts at once; twice is once."""
        self._paused.add(who)
        self._tell()

    def go_on(self, who: Pauser) -> None:
        """Take that one's pause back. Other reasons stay."""
        self._paused.discard(who)
        self._tell()

    async def wait_open(self) -> None:
        """Return as soon as the gate is open; at once when it is. Needs `watch` to be running somewhere."""
        while self.reason:
            await self._changed.wait()

    async def watch(self) -> None:
        """Look every `poll_s`, until cancelled. One of these for each gate."""
        ahead_s = self._clock.time() - anyio.current_time()
        while True:
            ahead_s = self._notice_sleep(ahead_s)
            try:
                reading = await to_thread.run_sync(self._sensors.read)
            except (OSError, ValueError) as error:  # a path that is gone, a /proc that says something new
                self._sensed = f"this machine cannot be looked at: {error}"
            else:
                self._sensed = next(self._reasons(reading, anyio.current_time()), "")
            self._tell()
            await anyio.sleep(self._config.poll_s)

    def _reasons(self, reading: Reading, now: float) -> Iterator[str]:
        """Every rule looks at every reading, whatever the others say; the first reason is the one that is told."""
        c, idle_s = self._config, reading.user_idle_s
        shut = {
            "cpu": c.only_when_idle and self._cpu.look(reading.others_cpu, now),
            "user": c.only_when_idle and self._user.look(None if idle_s is None else -idle_s, now),
            "battery": c.only_when_idle and self._battery.look(float(reading.on_battery), now),
            "disk": self._disk.look(-reading.disk_free_bytes, now),
            "memory": self._memory.look(-reading.memory_free_bytes, now),
        }
        if shut["disk"]:
            yield _too_little("disk space", reading.disk_free_bytes, c.disk_floor_bytes)
        if shut["memory"]:
            yield _too_little("memory", reading.memory_free_bytes, c.memory_floor_bytes)
        if not self._in_hours():
            yield f"it works from {c.hours} only"
        if shut["user"]:
            yield f"somebody used this machine in the last {c.user_idle_s:.0f} s"
        if shut["cpu"]:
            yield f"other programs use {reading.others_cpu:.0%} of the processor"
        if shut["battery"]:
            yield "the machine runs on battery"

    def _in_hours(self) -> bool:
        now = datetime.fromtimestamp(self._clock.time(), UTC).astimezone(self._zone)
        return not self._hours or any(now.hour * 60 + now.minute in hours for hours in self._hours)

    def _notice_sleep(self, before_s: float) -> float:
        """How far the wall clock is ahead of the monotonic one, which stands still while the machine is suspended."""
        ahead_s = self._clock.time() - anyio.current_time()
        if ahead_s - before_s > SLEEP_S:
            log.info("resumed_after_sleep", seconds=round(ahead_s - before_s, 1))
            self._resumed(ahead_s - before_s)
        return ahead_s

    def _tell(self) -> None:
        """Wake the waiting, and log a change. The figure in a reason may move without being a change."""
        reason = self.reason
        if bool(reason) != bool(self._said):
            log.info("gate_shut" if reason else "gate_opened", reason=reason or self._said)
        self._said = reason
        if not reason:
            self._changed.set()
            self._changed = anyio.Event()


class AlwaysOpen:
    """A gate for machines that have nothing else to do, and for tests."""

    open = True
    reason = ""

    async def wait_open(self) -> None:
        return


def check_clock(theirs: float, ours: float, limit_s: float) -> None:
    """Compares two clocks, seconds since 1970.

    Raises: Invalid, naming both times, when they are more than `limit_s` apart: then receipts and invitations would
    expire at the wrong time.
    """
    if abs(theirs - ours) <= limit_s:
        return
    raise Invalid(
        f"this machine's clock says {_utc(ours)}, the other's says {_utc(theirs)}: {abs(theirs - ours):.0f} s apart, "
        f"at most {limit_s:.0f} s expected. Set this clock by the network (timedatectl set-ntp true), or ask the other"
    )


def _too_little(what: str, free: int, floor: int) -> str:
    return f"too little {what}: {free // MEBIBYTE} MiB free, at least {floor // MEBIBYTE} MiB expected"


def _utc(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):  # not a time that a calendar has
        return f"{seconds!r} s since 1970"

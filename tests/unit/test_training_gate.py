"""When a worker may work, on the virtual clock: hours pass in a millisecond."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import anyio
import pytest

from tessera.core.errors import Invalid
from tessera.p2p.virtual import VirtualClock, run_virtual
from tessera.training.gate import AlwaysOpen, Gate, GateConfig, Hours, check_clock, parse_hours
from tessera.training.sensors import FakeSensors, MachineSensors, Reading, _is_worker

CALM = Reading(others_cpu=0.0, user_idle_s=None, on_battery=False, disk_free_bytes=2**40, memory_free_bytes=2**34)
IDLE = GateConfig(only_when_idle=True)


class Clock(VirtualClock):
    """Runs on while the machine sleeps."""

    slept_s = 0.0

    def time(self) -> float:
        return super().time() + self.slept_s


class Scene:
    """A watched gate, and what it sees."""

    def __init__(self, config: GateConfig, zone: timezone = UTC) -> None:
        self.sensors, self.clock, self.naps = FakeSensors(CALM), Clock(), list[float]()
        self.gate = Gate(config, self.sensors, self.clock, zone=zone, resumed=self.naps.append)

    async def sees(self, wait_s: float = 0.0, **changes: object) -> str:
        """The reason after `wait_s` of seeing that."""
        self.sensors.reading = replace(self.sensors.reading, **changes)  # type: ignore[arg-type]
        await anyio.sleep(wait_s + 2 * IDLE.poll_s)
        return self.gate.reason


def play(act: Callable[[Scene], Awaitable[None]], config: GateConfig = IDLE, zone: timezone = UTC) -> Scene:
    async def main() -> Scene:
        scene = Scene(config, zone)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(scene.gate.watch)
            await anyio.sleep(1)
            await act(scene)
            tasks.cancel_scope.cancel()
        return scene

    return run_virtual(main)


def test_a_gate_that_has_not_looked_is_shut() -> None:
    gate = Gate(GateConfig(), FakeSensors(CALM), Clock())
    assert not gate.open
    assert gate.reason == "the machine has not been looked at yet"


def test_a_calm_machine_opens_the_gate() -> None:
    async def act(scene: Scene) -> None:
        await scene.gate.wait_open()
        assert scene.gate.open

    play(act)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"others_cpu": 0.5}, "other programs use 50% of the processor"),
        ({"user_idle_s": 12.0}, "somebody used this machine in the last 300 s"),
        ({"on_battery": True}, "the machine runs on battery"),
        ({"disk_free_bytes": 100 * 2**20}, "too little disk space: 100 MiB free, at least 512 MiB expected"),
        ({"memory_free_bytes": 2**20}, "too little memory: 1 MiB free, at least 128 MiB expected"),
    ],
)
def test_each_condition_shuts_and_names_itself(change: dict[str, object], reason: str) -> None:
    async def act(scene: Scene) -> None:
        assert await scene.sees(20, **change) == reason
        after = {"user_idle_s": 400.0} if "user_idle_s" in change else {}
        assert await scene.sees(70, **{name: getattr(CALM, name) for name in change} | after) == ""

    play(act)


def test_only_an_idle_worker_cares_for_people_load_and_battery() -> None:
    async def act(scene: Scene) -> None:
        assert await scene.sees(3_600, others_cpu=1.0, user_idle_s=0.0, on_battery=True) == ""

    play(act, GateConfig())


def test_a_moment_of_load_is_not_worth_a_pause() -> None:
    async def act(scene: Scene) -> None:
        for _ in range(100):
            scene.sensors.reading = replace(CALM, others_cpu=1.0)
            await anyio.sleep(5)
            scene.sensors.reading = CALM
            await anyio.sleep(5)
            assert scene.gate.open

    play(act)


def test_a_load_that_wavers_around_the_threshold_does_not_make_the_gate_flap() -> None:
    async def act(scene: Scene) -> None:
        changes, was_open = 0, scene.gate.open
        for tick in range(1_000):
            scene.sensors.reading = replace(CALM, others_cpu=0.24 if tick % 3 else 0.3)
            await anyio.sleep(5)
            changes += was_open != scene.gate.open
            was_open = scene.gate.open
        assert changes == 0
        assert await scene.sees(20, others_cpu=0.3)
        for tick in range(1_000):
            scene.sensors.reading = replace(CALM, others_cpu=0.1 if tick % 3 else 0.2)
            await anyio.sleep(5)
            assert not scene.gate.open

    play(act)


def test_a_disk_opens_the_gate_only_with_room_to_spare() -> None:
    async def act(scene: Scene) -> None:
        assert await scene.sees(disk_free_bytes=511 * 2**20)
        assert await scene.sees(disk_free_bytes=600 * 2**20)
        assert await scene.sees(disk_free_bytes=640 * 2**20) == ""

    play(act)


def test_hours_over_midnight_are_local_time() -> None:
    plus_two = timezone(timedelta(hours=2))

    async def act(scene: Scene) -> None:
        opened = []
        for _ in range(48):
            await anyio.sleep(1_800)
            now = datetime.fromtimestamp(scene.clock.time(), plus_two)
            expected = now.hour >= 22 or now.hour < 7
            assert scene.gate.open == expected, now
            assert expected or scene.gate.reason == "it works from 22:00-07:00 only"
            opened.append(expected)
        assert sum(opened) == 18

    play(act, GateConfig(hours="22:00-07:00", poll_s=60), plus_two)


@pytest.mark.parametrize("text", ["22-7", "24:00-07:00", "22:00-07:60", "22:00", "07:00-07:00", "9:00-10:00", "x" * 99])
def test_hours_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(Invalid, match="hours"):
        GateConfig(hours=text)


def test_several_hours_may_be_given() -> None:
    assert parse_hours("12:00-13:00, 22:00-07:00") == (Hours(720, 780), Hours(1320, 420))
    assert parse_hours(" ") == ()
    assert 720 in Hours(720, 780)
    assert 780 not in Hours(720, 780)
    assert "noon" not in Hours(720, 780)


@pytest.mark.parametrize(
    "wrong",
    [{"busy_cpu": 0.0}, {"busy_cpu": 25.0}, {"poll_s": 0.0}, {"disk_floor_bytes": -1}, {"calm_s": float("nan")}],
)
def test_settings_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(Invalid, match=next(iter(wrong))):
        GateConfig(**wrong)  # type: ignore[arg-type]


def test_a_pause_acts_at_once_and_each_takes_back_his_own() -> None:
    async def act(scene: Scene) -> None:
        gate, woke = scene.gate, list[float]()
        gate.pause("run")
        gate.pause("owner")
        gate.pause("owner")
        assert gate.reason == "paused by its owner"

        async def wait() -> None:
            await gate.wait_open()
            woke.append(anyio.current_time())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.sleep(100)
            gate.go_on("owner")
            assert gate.reason == "the run is paused"
            await anyio.sleep(100)
            assert woke == []
            gate.go_on("run")
            await anyio.sleep(0.001)
            assert len(woke) == 1

    play(act)


def test_a_sleeping_laptop_is_noticed_with_the_seconds_it_slept() -> None:
    async def act(scene: Scene) -> None:
        await anyio.sleep(600)
        assert scene.naps == []
        scene.clock.slept_s += 8 * 3_600
        await anyio.sleep(6)
        assert scene.naps == [pytest.approx(8 * 3_600)]
        scene.clock.slept_s -= 3_600  # set back by hand: nobody slept
        await anyio.sleep(6)
        assert len(scene.naps) == 1

    play(act)


def test_a_machine_that_cannot_be_looked_at_shuts_the_gate_until_it_can() -> None:
    class Broken:
        failing = True

        def read(self) -> Reading:
            if self.failing:
                raise FileNotFoundError("no such folder: /gone")
            return CALM

    async def main() -> None:
        sensors = Broken()
        gate = Gate(GateConfig(), sensors, Clock())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(gate.watch)
            await anyio.sleep(1)
            assert gate.reason == "this machine cannot be looked at: no such folder: /gone"
            sensors.failing = False
            await gate.wait_open()
            tasks.cancel_scope.cancel()

    run_virtual(main)


def test_clocks_far_apart_are_an_error_that_names_both_times() -> None:
    now = datetime(2026, 11, 21, 12, 0, tzinfo=UTC).timestamp()
    check_clock(now, now + 299, 300)
    check_clock(now, now - 300, 300)
    with pytest.raises(
        Invalid, match=r"2026-11-21 12:10:00 UTC, the other's says 2026-11-21 12:00:00 UTC: 600 s apart"
    ):
        check_clock(now, now + 600, 300)
    with pytest.raises(Invalid, match="s since 1970"):
        check_clock(1e30, now, 300)
    with pytest.raises(Invalid):
        check_clock(float("nan"), now, 300)


def test_this_machine_can_be_read(tmp_path: Path) -> None:
    sensors = MachineSensors(tmp_path)
    first, second = sensors.read(), sensors.read()
    assert first.others_cpu is None
    assert second.others_cpu is None or 0 <= second.others_cpu <= 1
    assert min(first.disk_free_bytes, first.memory_free_bytes) > 0
    with pytest.raises(FileNotFoundError):
        MachineSensors(tmp_path / "gone", people=False).read()


@pytest.mark.parametrize(
    ("command", "is_worker"),
    [
        ("/usr/bin/python3 -m tessera join X", True),
        ("python /venv/bin/torchrun --nproc-per-node 2 -m tessera join X", True),
        ("/venv/bin/python /venv/bin/tessera up", True),
        ("tessera join X", True),
        ("vim tessera", False),
        ("python train.py", False),
        ("", False),
    ],
)
def test_workers_know_each_other(command: str, is_worker: bool) -> None:
    assert _is_worker(command.split()) == is_worker


@pytest.mark.anyio
async def test_the_open_gate_never_waits() -> None:
    await AlwaysOpen().wait_open()
    assert AlwaysOpen.open
    assert AlwaysOpen.reason == ""

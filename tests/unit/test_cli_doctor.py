"""`tessera doctor`: each finding says what is, how bad it is, and what mends it."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from tessera.cli import doctor, doctor_machine, doctor_network, doctor_state
from tessera.cli.doctor_machine import kernel_clock, memory_limit
from tessera.cli.findings import Finding
from tessera.core.errors import Unavailable
from tessera.training import sealing
from tessera.training.home import Home


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return Home(tmp_path / "state").path


def test_findings_are_printed_and_a_problem_is_an_exit_status(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> Finding:
        raise Unavailable("no such luck")

    def breaks() -> Finding:
        raise OSError("not on this system")

    checks = [("a", lambda: Finding("a", "ok", "[red]fine[/]", "fix")), ("b", fails), ("c", breaks)]
    monkeypatch.setattr(doctor_machine, "CHECKS", checks)
    monkeypatch.setattr(doctor_network, "CHECKS", [])
    with pytest.raises(typer.Exit) as ended:
        doctor.run_doctor(state, as_json=True)
    assert ended.value.exit_code == 1
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found["b"]["verdict"] == "problem"
    assert found["b"]["detail"] == "no such luck"
    assert found["c"]["verdict"] == "warning"
    assert {"relay", "disk", "disk use", "disk speed", "state", "keys", "backup"} <= found.keys()
    monkeypatch.setattr(doctor_machine, "CHECKS", checks[:1])
    doctor.run_doctor(state, as_json=False)
    assert "✓ a: [red]fine[/]  → fix" in capsys.readouterr().out.splitlines()


def test_keys_that_others_can_read_are_a_problem(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SCRYPT_N", 1 << 10)
    assert "2 of 2 lie open" in doctor_state.check_keys(state).detail
    Home(state).keys.protect("correct horse battery")
    assert "protected" in doctor_state.check_keys(state).detail
    os.chmod(state / "peer.key", 0o644)
    loose = doctor_state.check_keys(state)
    assert (loose.verdict, "chmod 600" in loose.fix) == ("problem", True)
    assert doctor_state.check_keys(state / "nothing").verdict == "ok"


def test_an_old_backup_is_a_warning(state: Path) -> None:
    assert doctor_state.check_backup(state).verdict == "warning"
    (state / "backup.json").write_text(json.dumps({"time": int(time.time()) - 86_400}))
    assert doctor_state.check_backup(state).verdict == "ok"
    assert doctor_state.check_backup(state, now=time.time() + 30 * 86_400).verdict == "warning"


def test_the_quota_is_compared_with_what_lies_there(state: Path) -> None:
    (state / "blobs").mkdir()
    (state / "blobs" / "ab").write_bytes(b"x" * 950_000)

    def use(quota: int | None) -> Any:
        return doctor_state.check_disk(state, quota)[1]

    assert "no quota" in use(None).detail
    assert use(10_000_000).verdict == "ok"
    assert "raise disk_quota soon" in use(1_000_000).fix
    over = use(500_000)
    assert (over.verdict, "of 0.5 MB" in over.detail, "blobs 1 MB" in over.detail) == ("warning", True, True)


def test_a_node_at_work_is_no_problem_and_a_damaged_state_is(state: Path) -> None:
    with Home(state).locked():
        assert "a node is at work" in doctor_state.check_state(state).detail
    (state / "peer.key").write_text("zz")
    damaged = doctor_state.check_state(state)
    assert (damaged.verdict, "is damaged" in damaged.detail) == ("problem", True)


def test_the_tightest_limit_of_the_control_groups_counts(tmp_path: Path) -> None:
    own, group = tmp_path / "own", tmp_path / "root" / "a" / "b"
    group.mkdir(parents=True)
    own.write_text("0::/a/b\n")
    assert memory_limit(tmp_path / "root", own) is None
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("5000\n")
    assert memory_limit(tmp_path / "root", own) == 5000
    (group / "memory.max").write_text("700\n")
    assert memory_limit(tmp_path / "root", own) == 700
    assert memory_limit(tmp_path / "root", tmp_path / "none") is None


def test_the_kernel_says_how_right_its_clock_is(monkeypatch: pytest.MonkeyPatch) -> None:
    state = kernel_clock()
    if state is not None:
        assert isinstance(state[0], bool)
        assert 0 <= state[1] < 10_000
    for answer, verdict in (
        ((True, 0.01), "ok"),
        ((True, 60.0), "warning"),
        ((False, 0.01), "warning"),
        (None, "warning"),
    ):
        monkeypatch.setattr(doctor_machine, "kernel_clock", lambda answer=answer: answer)
        assert doctor_machine.check_clock().verdict == verdict


def test_small_buffers_come_with_the_command_that_mends_them(tmp_path: Path) -> None:
    (tmp_path / "rmem_max").write_text("212992\n")
    (tmp_path / "wmem_max").write_text("7500000\n")
    found = doctor_network.check_buffers(tmp_path)
    assert (found.verdict, found.fix) == ("warning", "sysctl -w net.core.rmem_max=7500000")


def test_a_relay_that_does_not_answer_is_named(state: Path) -> None:
    relay, router = doctor_network.check_links(state, ["http://127.0.0.1:9#5eecre7-5eecre7"])
    assert (relay.what, relay.verdict) == ("relay http://127.0.0.1:9", "problem")
    assert router.verdict == "warning"
    assert "5eecre7-5eecre7" not in relay.detail + relay.fix + router.detail


def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1 << 20))
    found = doctor_machine.check_open_files()
    assert (found.verdict, "ulimit -n 4096" in found.fix) == ("warning", True)

"""Logs: where they go, how large they get, and what never gets into them."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from tessera.cli import logs
from tessera.cli.log_view import show_logs
from tessera.cli.logs import configure_logs, forget_logs
from tessera.cli.settings import Settings, set_settings
from tessera.core.errors import Missing

SECRET = "5eecre7" * 8
INVITATION = "tessera1" + "Qx7" * 30


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    set_settings(Settings())
    forget_logs()
    structlog.reset_defaults()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "version").write_text("1")
    return tmp_path


def _events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_gets_json_lines_and_people_short_ones(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", state / "logs" / "worker.log")
    structlog.get_logger("tessera.test").info("stage_joined", stage=3, run_id="ab")
    structlog.get_logger("tessera.test").debug("too_fine")
    logging.getLogger("somebody.else").warning("a library's %s", "words")
    logging.getLogger("somebody.else").info("not these")
    joined, other = _events(state / "logs" / "worker.log")
    assert (joined["event"], joined["stage"], joined["level"]) == ("stage_joined", 3, "info")
    assert joined["timestamp"].endswith("Z")
    assert other["event"] == "a library's words"
    error = capsys.readouterr().err
    assert "stage_joined" in error
    assert "stage=3" in error
    assert "\x1b" not in error  # no colours where nobody looks
    assert (state / "logs" / "worker.log").stat().st_mode & 0o077 == 0


def test_secrets_do_not_get_into_logs(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("debug", state / "logs" / "worker.log")
    log = structlog.get_logger("tessera.test")
    log.info("asked", prompt=SECRET, messages=[{"role": "user", "content": SECRET}], tokens=12)
    log.info("joined", invitation=SECRET, reason=f"cannot use {INVITATION}: expired")
    log.warning("relay_away", url=f"https://relay.example/#{SECRET}", database=f"postgresql://u:{SECRET}@host/db")
    log.info("sent", headers={"Authorization": SECRET, "note": f"Bearer {SECRET}"}, frame=SECRET.encode())
    log.info("deep", a={"b": {"c": {"d": {"e": {"secret": SECRET}}}}}, path=Path("/x"))
    try:
        passphrase = SECRET  # a local: the pretty traceback would print it
        raise ValueError(f"{INVITATION} is bad, {len(passphrase)}")
    except ValueError:
        log.exception("failed", token=SECRET)
    text = (state / "logs" / "worker.log").read_text()
    shown = capsys.readouterr().err
    for written in (text, shown):
        assert SECRET not in written
        assert "Qx7Qx7" not in written
        assert SECRET[:20] not in written.replace("\n", "")
        assert "ValueError: tessera1(hidden) is bad, 56" in written
    first = _events(state / "logs" / "worker.log")[0]
    assert (first["prompt"], first["tokens"]) == ("(hidden)", 12)


def test_a_log_stays_within_its_size(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 2_000)
    set_settings(Settings(log_stderr=False))
    configure_logs("info", state / "logs" / "worker.log")
    for number in range(300):
        structlog.get_logger("tessera.test").info("step_done", step=number)
    files = sorted((state / "logs").iterdir())
    assert [file.name for file in files] == ["worker.log", *(f"worker.log.{n}" for n in range(1, logs.KEPT + 1))]
    assert all(file.stat().st_size <= 2_000 for file in files)
    assert _events(files[0])[-1]["step"] == 299


def test_no_log_is_put_into_a_folder_that_is_no_state_directory(tmp_path: Path) -> None:
    configure_logs("info", tmp_path / "logs" / "worker.log")
    structlog.get_logger("tessera.test").info("early")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "version").write_text("1")
    structlog.get_logger("tessera.test").info("later")
    assert [event["event"] for event in _events(tmp_path / "logs" / "worker.log")] == ["later"]


def test_a_log_that_cannot_be_written_stops_nothing(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (state / "logs").write_text("a file where the folder should be")
    configure_logs("info", state / "logs" / "worker.log")
    for _ in range(3):
        structlog.get_logger("tessera.test").info("still_at_work")
    error = capsys.readouterr().err
    assert error.count("cannot write") == 1
    assert error.count("still_at_work") == 3


def test_settings_choose_level_and_form(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_settings(Settings(log="warning", log_format="json"))
    configure_logs("debug")
    structlog.get_logger("tessera.test").info("quiet")
    structlog.get_logger("tessera.test").warning("loud")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "loud"


def test_a_file_keeps_more_than_a_terminal_shows(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("warning", state / "logs" / "host.log")
    structlog.get_logger("tessera.test").info("epoch_posted")
    structlog.get_logger("tessera.test").warning("peer_lost")
    assert [event["event"] for event in _events(state / "logs" / "host.log")] == ["epoch_posted", "peer_lost"]
    shown = capsys.readouterr().err
    assert "peer_lost" in shown
    assert "epoch_posted" not in shown


def test_logs_are_shown_in_order_without_control_characters(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_settings(Settings(log_stderr=False))
    for name, words in (("worker", "from_a\x1b[2Jpeer"), ("host", "later")):
        configure_logs("info", state / "logs" / f"{name}.log")
        structlog.get_logger("tessera.test").info("heard", words=words)
    show_logs(state_dir=state)
    first, second = capsys.readouterr().out.splitlines()
    assert "\x1b" not in first
    assert "words=from_a�[2Jpeer" in first
    assert "words=later" in second
    show_logs("host", lines=1, as_json=True, state_dir=state)
    assert json.loads(capsys.readouterr().out)["words"] == "later"
    with pytest.raises(Missing, match="no log relay"):
        show_logs("relay", state_dir=state)

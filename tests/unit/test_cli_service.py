"""`tessera service`: the unit, line by line, and what may not get into it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from tessera.cli import service
from tessera.cli.logs import forget_logs
from tessera.cli.main import app
from tessera.cli.unit_file import UnitFile
from tessera.core.errors import Invalid
from tessera.training.home import Home
from tessera.training.passphrase import use_passphrases


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith(("TESSERA_", "OMP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("TESSERA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("sys.argv", ["tessera"])
    monkeypatch.setattr(service, "_systemctl", lambda system, *words: "inactive")
    yield
    forget_logs()
    structlog.reset_defaults()
    use_passphrases(None)


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """A state directory that has joined a run."""
    home = Home(tmp_path / "state")
    (home.path / "invitation").write_text("tessera1…")
    return home.path


def call(*words: object, env: dict[str, str] | None = None) -> Any:
    return CliRunner().invoke(app, ["service", *map(str, words)], env=env, catch_exceptions=False)


def _unit(**changes: Any) -> UnitFile:
    fields: dict[str, Any] = {
        "description": "Tessera: join",
        "command": ["/opt/tessera/bin/python", "-m", "tessera", "join", "--state-dir", "/srv/my node", "--yes"],
        "writable": [Path("/srv/my node")],
        "system": True,
        "user": "tessera",
        "environment": {"TESSERA_LOG": "info", "TESSERA_JOIN_HOURS": "22:00-07:00"},
        "passphrase_file": Path("/etc/tessera/passphrase"),
        "memory_max": "8G",
    }
    return UnitFile(**fields | changes)


def test_the_units_are_as_recorded(golden: Callable[[str, Any], None]) -> None:
    mine = _unit(system=False, passphrase_file=None, memory_max="", environment={})
    golden("tests/golden/service_units.json", {"system": _unit().text().splitlines(), "user": mine.text().splitlines()})


@pytest.mark.parametrize("system", [True, False])
def test_systemd_understands_the_units(system: bool, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    file = tmp_path / "tessera-join.service"
    file.write_text(_unit(system=system, command=[sys.executable, "-m", "tessera", "join"]).text())
    (tmp_path / "runtime").mkdir(mode=0o700)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "runtime"), "SYSTEMD_LOG_LEVEL": "warning"}
    done = subprocess.run(
        [program, "verify", "--man=no", "--system" if system else "--user", str(file)],
        capture_output=True, text=True, env=environment, timeout=30, check=False,
    )  # fmt: skip
    newer = ("RestartSteps", "RestartMaxDelaySec")  # known from systemd 254 on
    complaints = [
        line for line in done.stderr.splitlines() if file.name in line and not any(key in line for key in newer)
    ]
    assert complaints == []


@pytest.mark.parametrize("text", ["", "two\nlines", "ExecStart=\x00", "a\rb"])
def test_what_would_bend_a_unit_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="cannot stand in a unit"):
        _unit(command=["/bin/tessera", text]).text()
    with pytest.raises(Invalid, match="cannot stand in a unit"):
        _unit(environment={"A": f"x{text or chr(7)}"}).text()
    with pytest.raises(Invalid, match="a size such as 8G"):
        _unit(memory_max="8G\nUser=root")


def test_a_service_runs_what_would_run_now(joined: Path, tmp_path: Path) -> None:
    shown = call("install", "--print", "--user", "join", "--threads", 3, env={"TESSERA_JOIN_DEVICE": "cuda"})
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert f"ExecStart={sys.executable} -m tessera join --state-dir {joined} --yes --threads 3" in lines
    assert "Environment=TESSERA_JOIN_DEVICE=cuda" in lines
    assert f"ReadWritePaths={joined}" in lines
    assert not (tmp_path / "config").exists()  # --print only prints


def test_a_unit_is_written_listed_and_removed(joined: Path, tmp_path: Path) -> None:
    file = tmp_path / "config" / "systemd" / "user" / "tessera-join.service"
    done = call("install", "--user", "join")
    assert done.exit_code == 0, done.output
    assert file.exists()
    assert "systemctl --user enable --now tessera-join" in done.stdout
    assert "enable-linger" in done.stdout
    assert f"tessera-join  user  inactive  {file}" in call("status", "--user").stdout
    assert call("uninstall", "tessera-join", "--user").exit_code == 0
    assert not file.exists()
    assert call("uninstall", "tessera-join", "--user").exit_code == 1


def test_a_unit_of_somebody_else_is_left_alone(joined: Path, tmp_path: Path) -> None:
    folder = tmp_path / "config" / "systemd" / "user"
    folder.mkdir(parents=True)
    (folder / "tessera-join.service").write_text("[Service]\nExecStart=/bin/mine\n")
    for words in (("install", "--user", "join"), ("uninstall", "tessera-join", "--user")):
        result = call(*words)
        assert (result.exit_code, "nothing was changed" in result.stderr) == (1, True)
    assert "mine" in (folder / "tessera-join.service").read_text()


def test_a_running_service_is_not_pulled_away(joined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("install", "--user", "join").exit_code == 0
    monkeypatch.setattr(service, "_systemctl", lambda system, *words: "active")
    result = call("uninstall", "tessera-join", "--user")
    assert (result.exit_code, "disable --now tessera-join" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "env"),
    [
        (("join", "--relay", "https://relay.example#5eecre7"), {}),
        (("join",), {"TESSERA_JOIN_RELAY": "https://relay.example#5eecre7"}),
        (("relay", "--token", "5eecre7"), {}),
        (("relay",), {"TESSERA_RELAY_TOKENS": "5eecre7"}),
    ],
)
def test_no_secret_gets_into_a_unit(words: tuple[str, ...], env: dict[str, str], joined: Path) -> None:
    result = call("install", "--print", "--user", *words, env=env)
    assert result.exit_code == 2
    assert "everybody can read a unit" in result.stderr
    assert "5eecre7" not in result.output


def test_a_passphrase_comes_as_a_credential(joined: Path, tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_text("correct horse battery")
    file.chmod(0o600)
    shown = call("install", "--print", "--user", "join", env={"TESSERA_PASSPHRASE_FILE": str(file)})
    assert f"LoadCredential=tessera-passphrase:{file}" in shown.stdout.splitlines()
    assert "TESSERA_PASSPHRASE_FILE" not in shown.stdout
    assert "correct horse" not in shown.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("chat",), "a service runs join"),
        (("jion",), "did you mean join?"),
        (("join", "--treads", "3"), "No such option"),
        (("join", "--threads", "many"), "valid integer"),
    ],
)
def test_what_cannot_be_a_service_is_refused(words: tuple[str, ...], message: str, joined: Path) -> None:
    result = call("install", "--print", "--user", *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_worker_that_never_joined_cannot_be_a_service(tmp_path: Path) -> None:
    result = call("install", "--user", "join")
    assert (result.exit_code, "has joined no run yet" in result.stderr) == (1, True)

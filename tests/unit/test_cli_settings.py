"""Every command's settings: which layer wins, what is refused, and what `tessera config` says about it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import structlog
import typer
from typer.testing import CliRunner

from tessera.cli.config import show_config
from tessera.cli.logs import forget_logs
from tessera.cli.main import app as tessera
from tessera.cli.options import StateDir, parse_size
from tessera.cli.settings import current_settings
from tessera.cli.tree import Configured
from tessera.core.errors import Invalid, Refused
from tessera.training.passphrase import use_passphrases

seen: dict[str, Any] = {}


def _toy() -> typer.Typer:
    """Two commands, one in a group, that note what they were given."""
    app, group = typer.Typer(cls=Configured), typer.Typer()

    @app.callback()
    def root(log: str | None = None, disk_quota: str | None = None) -> None: ...

    @app.command()
    def join(
        threads: int = 1,
        device: str = "auto",
        data: Path | None = None,
        relay: Annotated[list[str] | None, typer.Option()] = None,
        state_dir: StateDir = Path("/nowhere"),
    ) -> None:
        seen.update(threads=threads, device=device, data=data, relay=relay, settings=current_settings())

    @group.command("create")
    def create(device: str = "auto", claim_above: int = 1, fails: bool = False) -> None:
        seen.update(device=device, claim_above=claim_above)
        if fails:
            raise Refused("no", rule="test")

    app.add_typer(group, name="run")
    app.command("config", context_settings={"allow_extra_args": True, "ignore_unknown_options": True,
                                            "allow_interspersed_args": False})(show_config)  # fmt: skip
    return app


@pytest.fixture(autouse=True)
def config_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "config"
    folder.mkdir()
    monkeypatch.setenv("TESSERA_CONFIG_DIR", str(folder))
    monkeypatch.setattr("sys.argv", ["tessera"])
    seen.clear()
    yield folder
    forget_logs()
    structlog.reset_defaults()
    use_passphrases(None)


def call(*words: object, env: dict[str, str] | None = None, app: typer.Typer | None = None) -> Any:
    return CliRunner().invoke(app or _toy(), [str(word) for word in words], env=env, catch_exceptions=False)


def test_later_layers_win(config_dir: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    arguments: list[object] = ["join", "--state-dir", state]
    env: dict[str, str] = {}
    expected = 1
    assert call(*arguments).exit_code == 0
    assert seen["threads"] == expected
    layers: list[Any] = [
        lambda: (config_dir / "config.toml").write_text("threads = 2"),
        lambda: (config_dir / "config.toml").write_text("threads = 2\n[join]\nthreads = 3"),
        lambda: (state / "config.toml").write_text("threads = 4"),
        lambda: (state / "config.toml").write_text("threads = 4\n[join]\nthreads = 5"),
        lambda: env.update(TESSERA_THREADS="6"),
        lambda: env.update(TESSERA_JOIN_THREADS="7"),
        lambda: arguments.extend(["--threads", 8]),
    ]
    for add in layers:
        add()
        expected += 1
        result = call(*arguments, env=env)
        assert result.exit_code == 0, result.output
        assert seen["threads"] == expected


def test_the_state_directory_itself_may_come_from_any_layer_but_its_own(config_dir: Path, tmp_path: Path) -> None:
    for name, threads in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(f"threads = {threads}")
    (config_dir / "config.toml").write_text(f"state_dir = {str(tmp_path / 'a')!r}")
    assert call("join").exit_code == 0
    assert seen["threads"] == 2
    assert call("join", env={"TESSERA_STATE_DIR": str(tmp_path / "b")}).exit_code == 0
    assert seen["threads"] == 3
    (tmp_path / "a" / "config.toml").write_text("state_dir = 'elsewhere'")
    result = call("join")
    assert result.exit_code == 2
    assert "cannot say where the state directory is" in result.output


def test_a_key_at_the_top_holds_for_every_command_that_knows_it(config_dir: Path) -> None:
    (config_dir / "config.toml").write_text("device = 'cuda'\n[run.create]\nclaim-above = 9")
    assert call("join").exit_code == 0
    assert seen["device"] == "cuda"
    seen.clear()
    assert call("run", "create").exit_code == 0
    assert seen == {"device": "cuda", "claim_above": 9}


def test_a_path_in_a_file_is_relative_to_the_file(config_dir: Path) -> None:
    (config_dir / "config.toml").write_text("[join]\ndata = 'texts'\nrelay = ['https://a', 'https://b']")
    assert call("join").exit_code == 0
    assert (seen["data"], list(seen["relay"])) == (config_dir / "texts", ["https://a", "https://b"])


def test_what_holds_for_all_commands_is_layered_too(config_dir: Path, tmp_path: Path) -> None:
    (config_dir / "config.toml").write_text("disk_quota = '5GB'\nlog = 'warning'")
    (tmp_path / "config.toml").write_text("disk_quota = '2 GiB'")
    assert call("join", "--state-dir", tmp_path).exit_code == 0
    assert (seen["settings"].disk_quota_bytes, seen["settings"].log) == (2 << 30, "warning")
    assert call("--disk-quota", "7kb", "join", "--state-dir", tmp_path, env={"TESSERA_LOG": "DEBUG"}).exit_code == 0
    assert (seen["settings"].disk_quota_bytes, seen["settings"].log) == (7000, "debug")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("thread = 3", "there is no setting 'thread' at the top: did you mean threads?"),
        ("[join]\ndevise = 'cpu'", "there is no setting 'devise' [join]: did you mean device?"),
        ("[jion]\ndevice = 'cpu'", "there is no command [jion]: did you mean join?"),
        ("[run.creat]\ndevice = 'cpu'", "there is no command [run.creat]: did you mean create?"),
        ("[join]\nclaim_above = 1", "there is no setting 'claim_above' [join]"),
        ("threads = 'many'", "threads = 'many' does not fit"),
        ("threads = [1]", "does not fit"),
        ("[join]\nrelay = 'https://a'", "relay = 'https://a' does not fit"),
        ("threads = ", "is not TOML"),
        ("disk_quota = 'much'", "a size such as 50GB"),
        ("log = 'loud'", "log is one of debug, info"),
        ("#" * (2 << 20), "longer than"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_file(config_dir: Path, text: str, message: str) -> None:
    (config_dir / "config.toml").write_text(text)
    result = call("join")
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert call("join", "--help").exit_code == 0  # help is there whatever the files say


def test_a_failure_is_one_line_and_an_object_where_one_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tessera", "run", "create", "--json"])
    result = call("run", "create", "--fails")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["code"] == "refused"
    assert result.stderr == "tessera: no\n"


def test_config_says_what_is_in_force_and_where_it_comes_from(config_dir: Path, tmp_path: Path) -> None:
    (config_dir / "config.toml").write_text("device = 'cuda'\nlog = 'debug'")
    (tmp_path / "config.toml").write_text("[join]\nrelay = ['https://relay.example#letmein']")
    env = {"TESSERA_JOIN_THREADS": "4", "TESSERA_JOIN_TREADS": "5"}
    result = call("config", "--json", "join", "--state-dir", tmp_path, "--data", "/d", env=env)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = {row["setting"]: (row["value"], row["kind"], row["source"]) for row in found["settings"]}
    assert rows["device"] == ("cuda", "file", str(config_dir / "config.toml"))
    assert rows["log"] == ("debug", "file", str(config_dir / "config.toml"))
    assert rows["threads"] == (4, "environment", "TESSERA_JOIN_THREADS")
    assert rows["data"] == ("/d", "flag", "--data")
    assert rows["disk_quota"] == (None, "default", "")
    assert rows["relay"][0] == ["https://relay.example#(not shown)"]
    assert found["files"] == [str(config_dir / "config.toml"), str(tmp_path / "config.toml")]
    tools = {"TESSERA_ANVIL", "TESSERA_AXE"}  # where CI keeps what some tests use
    assert set(found["unread_variables"]) - tools == {"TESSERA_JOIN_TREADS"}
    shown = call("config", env=env)
    assert "did you mean TESSERA_JOIN_THREADS?" in " ".join(shown.output.split())
    assert "letmein" not in shown.output
    assert seen == {}  # nothing was run
    nonsense = call("config", "jion")
    assert (nonsense.exit_code, "did you mean join?" in nonsense.output) == (2, True)


def test_every_command_of_ours_can_be_inspected() -> None:
    result = call("config", "--json", "--all", app=tessera)
    assert result.exit_code == 0, result.output
    commands = {row["command"] for row in json.loads(result.stdout)["settings"]}
    assert {"", "up", "join", "run create", "keys protect", "doctor"} <= commands


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e400GB", "five", "1 XB", "१GB", "nan", "inf"])
def test_nonsense_is_no_size(text: str) -> None:
    with pytest.raises(Invalid, match="50GB or 2GiB"):
        parse_size("--disk-quota", text)

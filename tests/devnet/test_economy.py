"""The economy as a person starts it: real processes, real links, a real chain, on a small text."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from economy_world import PATIENCE_S, TEXT, check_sums, command, last_object, run, started, until, up
from typer.testing import CliRunner

from chain_support import CHAIN_ID, anvil
from tessera.cli.logs import forget_logs
from tessera.cli.main import app
from tessera.core.amount import Amount
from tessera.training.home import Home
from tessera.training.passphrase import use_passphrases

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.timeout(900)
Typed = Callable[[list[str]], subprocess.CompletedProcess[str]]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Typed]:
    """Commands that end soon, in this process: torch and the local chain are imported already."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def enter(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        words = arguments[arguments.index("tessera") + 1 :]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        forget_logs()
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    yield enter
    use_passphrases(None)


@pytest.mark.slow
def test_one_command_trains_sells_and_pays_everybody(tmp_path: Path) -> None:
    stages, steps = 4, 24
    done = run(up(tmp_path / "state", "--stages", stages, steps=steps), tmp_path, 2 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    result = last_object(done.stdout)
    check_sums(result)
    assert result["steps"] == steps
    assert result["stages"] == len(result["workers"]) == stages
    assert result["val_loss_first"] <= math.log(1024) + 0.1
    assert result["val_loss_last"] < result["val_loss_first"] - 0.5
    assert result["wire_bytes_per_token"] <= result["dense_bytes_per_token"] / 20
    assert result["requests_paid"] == 6
    assert {owner["role"] for owner in result["owners"]} == {"data", "creator"}
    assert result["sample"].strip()

    shares = run(command("shares", "--json", "--state-dir", tmp_path / "state"), tmp_path)
    assert shares.returncode == 0, shares.stderr
    facts = last_object(shares.stdout)
    assert facts["run_id"] == result["run_id"]
    assert facts["total_shares"] == result["total_shares"]
    assert facts["revenue"] == result["revenue"]


@pytest.mark.slow
def test_two_strangers_fill_the_open_seats_with_the_invitation_alone(tmp_path: Path) -> None:
    result = _with_strangers(tmp_path)
    check_sums(result)
    assert result["requests_paid"] == 6


@pytest.mark.slow
def test_the_same_on_an_evm_network_by_url(tmp_path: Path) -> None:
    with anvil() as url:
        result = _with_strangers(tmp_path, "--chain", url)
    check_sums(result)
    assert result["chain_id"] == CHAIN_ID


@pytest.mark.slow
def test_a_killed_worker_comes_back_and_earns_what_its_receipts_prove(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with started(up(state, steps=120), tmp_path, tmp_path / "up.log") as process:
        book = state / "workers" / "worker-2.log"
        until(lambda: book.exists() and "session_started" in book.read_text(), "training started")
        until(lambda: _checkpoints(state, 2) >= 20, "twenty steps are done")
        os.kill(_pid_of(state, 2), signal.SIGKILL)
        assert process.wait(PATIENCE_S * 2) == 0, (tmp_path / "up.log").read_text()
    result = last_object((tmp_path / "up.log").read_text())
    check_sums(result)
    assert result["steps"] == 120
    assert book.read_text().count("session_started") >= 2


@pytest.mark.slow
def test_ctrl_c_keeps_chain_keys_and_model_and_training_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with started(up(state, steps=60), tmp_path, tmp_path / "first.log") as process:
        until(lambda: _checkpoints(state, 0) >= 20, "twenty steps are done")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130, (tmp_path / "first.log").read_text()
    reached = _checkpoints(state, 0)
    assert reached >= 20
    done = run(up(state, steps=60), tmp_path, 2 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    result = last_object(done.stdout)
    check_sums(result)
    assert result["steps"] == 60
    log = (state / "workers" / "worker-0.log").read_text()
    resumed = [line for line in log.splitlines() if "session_started" in line]
    assert any(f"step={reached} " in line for line in resumed)
    again = last_object(run(up(state, steps=60), tmp_path, 2 * PATIENCE_S).stdout)
    assert again["total_shares"] == result["total_shares"]
    assert again["revenue"] == 2 * result["revenue"]


@pytest.mark.slow
def test_workers_end_with_whoever_started_them_and_training_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with started(up(state, steps=60), tmp_path, tmp_path / "first.log") as process:
        until(lambda: _checkpoints(state, 0) >= 10, "ten steps are done")
        workers = [_pid_of(state, number) for number in range(4)]
        process.kill()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the workers are gone", 30)
    done = run(up(state, steps=60), tmp_path, 2 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert last_object(done.stdout)["steps"] == 60


@pytest.mark.slow
def test_the_commands_and_the_example_work_while_it_is_up(tmp_path: Path) -> None:
    state = tmp_path / "state"
    arguments = [word for word in up(state, steps=8) if word not in ("--once", "--json")]
    with started(arguments, tmp_path, tmp_path / "up.log") as process:
        until(lambda: "It stays up until Ctrl-C" in (tmp_path / "up.log").read_text(), "the economy is open")
        chat = run(command("chat", "--prompt", "def ", "--max-tokens", 8, "--state-dir", state), tmp_path)
        assert chat.returncode == 0, chat.stderr
        told = re.search(r"([0-9.]+) USD", chat.stderr)  # by its tokens
        assert told is not None, chat.stderr
        cost = Amount.parse(told[1], "USD", 6).units
        assert 0 < cost < 10_000
        bought = run([sys.executable, str(EXAMPLES / "buy_with_openai.py"), str(state)], tmp_path)
        assert bought.returncode == 0, bought.stderr
        assert "paid 10000 units" in bought.stdout
        claim = run(command("claim", "--json", "--state-dir", state / "workers" / "worker-0"), tmp_path)
        assert claim.returncode == 0, claim.stderr
        until(lambda: _all_claimed(state, tmp_path, 7 * 10_000 + cost), "eight payments are spread and claimed")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_what_cannot_work_is_said_in_one_line(tmp_path: Path, typed: Typed) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letters.txt").write_text("mine")
    cases = [
        (up(tmp_path / "a", "--data", tmp_path / "nowhere"), "no such file or folder"),
        (up(foreign), "not a Tessera state directory"),
        (command("join", "tessera1AAAA", "--yes", "--state-dir", tmp_path / "f"), "damaged or cut short"),
    ]
    with Home(tmp_path / "h").locked():
        cases.append((up(tmp_path / "h"), "is in use by process"))
        _each_is_said_in_one_line(cases, typed)


@pytest.mark.slow
def test_more_that_cannot_work_is_said_in_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (up(tmp_path / "a", "--data", empty), "nothing to learn from"),
        (up(tmp_path / "c", "--stages", 1), "at least 2 stages"),
        (up(tmp_path / "d", "--codec", "zip"), "--codec is one of codec, reparam, dense"),
        (up(tmp_path / "e", "--chain", "http://127.0.0.1:9"), "no EVM node answers"),
        (command("join", "tessera1AAAA", "--state-dir", tmp_path / "f"), "add --yes to join without a question"),
        (command("shares", "--state-dir", tmp_path / "g"), "no Tessera state"),
        (command("run", "show", empty), "cannot read"),
    ]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases.append((up(tmp_path / "i", "--port", port), f"port {port} on 127.0.0.1 is in use"))
        _each_is_said_in_one_line(cases, lambda arguments: run(arguments, tmp_path))


def _each_is_said_in_one_line(cases: list[tuple[list[str], str]], enter: Typed) -> None:
    for arguments, message in cases:
        done = enter(arguments)
        assert done.returncode in (1, 2), (arguments, done.stderr)
        assert message in done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr


def test_a_manifest_is_described_before_it_is_run(tmp_path: Path, typed: Typed) -> None:
    file = tmp_path / "run.json"
    made = typed(command("run", "draft", file, "--data", TEXT, "--steps", 50, "--state-dir", tmp_path / "s"))
    assert made.returncode == 0, made.stderr
    shown = last_object(typed(command("run", "show", file, "--json")).stdout)
    assert shown["run_id"] in made.stdout
    assert shown["steps"] == 50
    file.write_text(json.dumps({**json.loads(file.read_text()), "surprise": 1}))
    refused = typed(command("run", "show", file))
    assert refused.returncode == 2
    assert "surprise: unknown field" in refused.stderr


def _with_strangers(tmp_path: Path, *more: object) -> dict[str, object]:
    state = tmp_path / "state"
    with started(up(state, "--seats", 2, *more), tmp_path, tmp_path / "up.log") as process:
        invitation = until(
            lambda: (state / "invitation").exists() and (state / "invitation").read_text(), "an invitation is written"
        )
        joins = []
        for name in ("first", "second"):
            home = tmp_path / name
            home.mkdir()
            joins.append(
                started(command("join", invitation, "--yes", "--state-dir", home / "state"), home, home / "log")
            )
        with joins[0] as first, joins[1] as second:
            assert process.wait(2 * PATIENCE_S) == 0, (tmp_path / "up.log").read_text()
            assert first.wait(20) == 0
            assert second.wait(20) == 0
    return last_object((tmp_path / "up.log").read_text())


def _all_claimed(state: Path, home: Path, revenue: int) -> dict[str, Any] | None:
    facts = last_object(run(command("shares", "--json", "--state-dir", state), home).stdout)
    done = facts["revenue"] == revenue and facts["claimed"] + facts["dust"] == facts["revenue"]
    return facts if done else None


def _checkpoints(state: Path, worker: int) -> int:
    files = (state / "workers" / f"worker-{worker}").glob("runs/*/checkpoints/step-*.ckpt")
    return max((int(file.stem.removeprefix("step-")) for file in files), default=0)


def _pid_of(state: Path, worker: int) -> int:
    return int((state / "workers" / f"worker-{worker}" / "lock").read_text())

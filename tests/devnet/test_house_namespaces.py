"""Strangers' machines, as network namespaces with empty homes: one creates a run, others join by invitation alone.

One worker is killed and rejoins, one leaves and is replaced, and the table adds up to the last unit. Then the same
where each machine reaches a relay's and nothing else, and the relay is recorded whole.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from economy_world import TEXT, command, environment, last_object, until

from netns import RELAY_ADDRESS, Machine, Recorder, machines_behind_a_relay, machines_on_a_lan, need_namespaces

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

STEPS = 400
NAME = "a-name-that-nobody-else-uses"
TOKEN = "only-for-the-invited"
PATIENCE_S = 200.0


@dataclass
class Person:
    """Somebody with a machine: an empty home, a state directory, and commands typed there."""

    machine: Machine
    home: Path
    more: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.home.mkdir()

    @property
    def state(self) -> Path:
        return self.home / "state"

    @property
    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace") if (self.home / "log").exists() else ""

    def type(self, *words: object, timeout_s: float = 60) -> str:
        """A command that ends by itself; its standard output."""
        line = self.machine.command(*command(*words, "--state-dir", self.state))
        done = subprocess.run(line, env=environment(self.home), capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def start(self, *words: object) -> None:
        """A command that stays."""
        line = self.machine.command(*command(*words, "--state-dir", self.state))
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                line, env=environment(self.home), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def join(self, invitation: str = "") -> None:
        self.start("join", *([invitation] if invitation else []), "--yes", "--probe-seconds", "0.2")

    def step(self) -> int:
        try:
            return int(json.loads(self.type("status", "--json"))["step"])
        except AssertionError:
            return 0  # not seated yet

    def ended(self) -> int:
        assert self.process is not None
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """As a power cut would."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def people(machines: list[Machine], folder: Path) -> Iterator[list[Person]]:
    folks = [Person(machine, folder / machine.name) for machine in machines]
    try:
        yield folks
    finally:
        for person in folks:
            if person.process is not None and person.process.poll() is None:
                person.kill()


def draft(creator: Person) -> Path:
    """A small run, as somebody would who edits the draft."""
    file = creator.home / "run.json"
    creator.type("run", "draft", file, "--data", TEXT, "--stages", 2, "--name", NAME, "--steps", STEPS)
    manifest = json.loads(file.read_text())
    manifest["model"]["model"] |= {"width": 64, "ffn": 64, "heads": 2, "kv_heads": 1, "context": 64}
    manifest["schedule"] |= {"length": 64, "microbatches": 4, "evaluate_every": STEPS // 4, "evaluate_batches": 4}
    file.write_text(json.dumps(manifest))
    return file


def create(creator: Person, *more: str) -> str:
    """Open the run; the invitation that it prints."""
    creator.start("run", "create", draft(creator), "--requests", 4, "--once", "--json", *more)
    found = until(lambda: re.search(r"^tessera join (tessera1\S+)$", creator.log, re.M), "an invitation is printed", 90)
    return str(found[1])


def live_together(creator: Person, second: Person, third: Person, fourth: Person, invitation: str) -> dict[str, Any]:
    """The whole story; what the creator's table says at the end."""
    second.join(invitation)
    third.join(invitation)
    until(lambda: second.step() >= STEPS // 8, f"it trains: {second.log[-800:]}", PATIENCE_S)

    second.kill()
    before = third.step()
    second.join()  # with what lies in its directory
    until(lambda: third.step() >= before + 20, "it goes on after a worker came back", PATIENCE_S)

    creator.type("run", "pause")  # however fast the machine, the run does not end before the successor is here
    third.type("leave", "--no-wait")
    printed = creator.type("run", "invite", "--hours", 1)
    fourth.join(re.search(r"tessera1\S+", printed)[0])  # type: ignore[index]
    assert third.ended() == 0, third.log[-2000:]
    until(lambda: fourth.step() > 0, f"the successor has the stage: {fourth.log[-800:]}", PATIENCE_S)
    creator.type("run", "resume")

    assert creator.ended() == 0, creator.log[-2000:]
    assert second.ended() == 0, second.log[-2000:]
    assert fourth.ended() == 0, fourth.log[-2000:]
    return last_object(creator.log)


def check(result: dict[str, Any]) -> None:
    """Every share was earned, every unit is somebody's, to the last one."""
    rows = [*result["workers"], *result["owners"]]
    assert len(result["workers"]) == 3  # two present, one who left
    assert sum(row["shares"] for row in rows) == result["total_shares"] > 0
    claimed = sum(row["claimed"] for row in rows)
    assert claimed + result["unclaimed"] + result["undistributed"] + result["dust"] == result["revenue"] > 0
    assert all(row["shares"] > 0 for row in result["workers"])
    full = [w["verified_tokens"] for w in result["workers"] if w["stage"] is not None]
    assert max(full) == result["tokens"]  # who stayed is paid for every token
    assert result["val_loss_last"] < result["val_loss_first"]


def test_three_machines_and_an_invitation(tmp_path: Path) -> None:
    need_namespaces()
    with ExitStack() as stack:
        machines = stack.enter_context(machines_on_a_lan(["a", "b", "c", "d"]))
        creator, second, third, fourth = stack.enter_context(people(machines, tmp_path))
        check(live_together(creator, second, third, fourth, create(creator)))


def test_the_same_where_only_a_relay_can_be_reached(tmp_path: Path) -> None:
    need_namespaces()
    with ExitStack() as stack:
        place, machines = stack.enter_context(machines_behind_a_relay(["a", "b", "c", "d"]))
        creator, second, third, fourth = stack.enter_context(people(machines, tmp_path))
        (keeper,) = stack.enter_context(people([place], tmp_path))
        recorder = stack.enter_context(Recorder(place))
        line = place.command(*command("relay", "--host", "0.0.0.0", "--port", 3340, "--token", TOKEN))
        with (keeper.home / "log").open("wb") as log:
            keeper.process = subprocess.Popen(
                line, env=environment(keeper.home), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        until(lambda: "3340" in keeper.log, "the relay says where it is", 30)
        reach = machines[1].run("ping", "-c", "1", "-W", "1", machines[0].address, check=False)
        assert "1 received" not in reach

        invitation = create(creator, "--relay", f"http://{RELAY_ADDRESS}:3340#{TOKEN}")
        result = live_together(creator, second, third, fourth, invitation)
        check(result)

        assert recorder.bytes_seen > 1_000_000  # all of it went this way
        secrets = [bytes.fromhex(file.read_text().strip()) for p in (creator, second, third, fourth)
                   for file in p.state.glob("*.key")]  # fmt: skip
        assert len(secrets) >= 8
        assert not any(recorder.holds(secret) for secret in secrets)
        assert not recorder.holds(NAME.encode())
        assert not recorder.holds(result["run_id"].encode())

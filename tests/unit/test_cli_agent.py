"""`tessera agent …` as a person types it: make one, run it, answer, look, stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from agents_world import APPROVER
from tessera.agents.approvals import Approvals, approve
from tessera.agents.runtime.build import build
from tessera.agents.runtime.home import AgentHome
from tessera.cli.main import app
from tessera.core.errors import Invalid, Missing

LATE = "Write to pal@example.com that I am late"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agents")
    assert typed(folder, "new", "clerk", "--demo").exit_code == 0
    return folder


@pytest.fixture
def agents(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "agents"))


def typed(agents: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["agent", *words, "--state-dir", str(agents)])


def facts(agents: Path, *words: str) -> Any:
    result = typed(agents, *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def outbox(agents: Path) -> list[str]:
    file = agents / "clerk/outbox.jsonl"
    return [json.loads(line)["to"][0] for line in file.read_text().splitlines()] if file.exists() else []


def test_a_new_agent_runs_offline_and_its_question_is_answered_once(agents: Path) -> None:
    outcome = facts(agents, "run", "clerk", LATE)
    assert (outcome["state"], outbox(agents)) == ("waiting", ["pal@example.com"])
    (question,) = facts(agents, "approve", "clerk")
    assert ["why", "you have not named this recipient"] in question["facts"]
    assert facts(agents, "list")[0] | {"model": ""} == {
        "agent": "clerk", "model": "", "runs": 1, "waiting": 1, "left": None, "stopped": False,
    }  # fmt: skip
    answer = facts(agents, "approve", "clerk", question["call"][:8], "--yes")
    assert answer == {"call": question["call"], "answer": "allowed", "run": outcome["run"]}
    for _ in range(2):
        assert facts(agents, "run", "clerk", "--resume", outcome["run"])["state"] == "done"
        assert outbox(agents) == ["pal@example.com", "it-desk@examp1e.com"]
    replayed = facts(agents, "run", "clerk", "--replay", outcome["run"][:6])
    assert [(call["tool"], call["kind"], call["holds"]) for call in replayed["calls"]] == [
        ("read_inbox", "returned", True), ("send_email", "returned", True), ("send_email", "returned", True),
    ]  # fmt: skip
    (run,) = facts(agents, "ledger", "clerk")["runs"]
    assert (run["state"], run["request"]) == ("done", LATE)
    assert typed(agents, "approve", "clerk", question["call"][:8], "--yes").exit_code == 1


@pytest.mark.slow
def test_what_is_denied_is_not_sent(agents: Path) -> None:
    run = facts(agents, "run", "clerk", LATE)["run"]
    (question,) = facts(agents, "approve", "clerk")
    assert facts(agents, "approve", "clerk", question["call"], "--deny")["answer"] == "denied"
    assert facts(agents, "run", "clerk", "--resume", run)["calls"][2]["answer"]["rule"] == "denied"
    assert outbox(agents) == ["pal@example.com"]


@pytest.mark.slow
def test_a_stopped_agent_does_nothing_more(agents: Path) -> None:
    run = facts(agents, "run", "clerk", LATE)["run"]
    assert typed(agents, "stop", "clerk", "--reason", "enough").exit_code == 0
    for words in (("run", "clerk", LATE), ("run", "clerk", "--resume", run)):
        result = typed(agents, *words)
        assert result.exit_code == 1
        assert "was stopped" in result.output
    assert facts(agents, "list")[0]["stopped"] is True


@pytest.mark.slow
def test_an_approver_elsewhere_is_the_only_one_who_can_allow(tmp_path: Path) -> None:
    assert typed(tmp_path, "new", "clerk", "--demo", "--approver", APPROVER.account).exit_code == 0
    run = facts(tmp_path, "run", "clerk", LATE)["run"]
    (question,) = facts(tmp_path, "approve", "clerk")
    refused = typed(tmp_path, "approve", "clerk", question["call"], "--yes")
    assert refused.exit_code == 1
    assert "whose key is not here" in refused.output
    approvals: Approvals = AgentHome(tmp_path / "clerk").approvals()
    call = approvals.find(question["call"]).call
    approvals.grant(approve(call, APPROVER, 2**33))
    approvals.close()
    assert facts(tmp_path, "run", "clerk", "--resume", run)["state"] == "done"


def test_tools_are_shown_with_what_the_guard_takes_them_for(agents: Path) -> None:
    assert [(tool["tool"], tool["effect"]) for tool in facts(agents, "tools", "clerk")["tools"]] == [
        ("read_inbox", "read"), ("send_email", "send"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told", "status"),
    [
        pytest.param(("new", "clerk", "--demo"), "nothing was changed", 1, marks=pytest.mark.slow),
        pytest.param(("new", "other"), "--model NAME", 2, marks=pytest.mark.slow),
        pytest.param(("new", "No Name", "--demo"), "an agent is called", 2, marks=pytest.mark.slow),
        (("new", "../x", "--demo"), "an agent is called", 2),
        pytest.param(
            ("new", "rich", "--demo", "--chain", "http://127.0.0.1:1"), "a mandate needs", 2, marks=pytest.mark.slow
        ),
        pytest.param(("run", "clerk"), "say what the agent shall do", 2, marks=pytest.mark.slow),
        (("run", "clerk", "a", "--resume", "b"), "say what the agent shall do", 2),
        pytest.param(("run", "clerk", "--resume", "abc"), "there is no run", 1, marks=pytest.mark.slow),
        pytest.param(("run", "nobody", "x"), "`tessera agent new` makes one", 1, marks=pytest.mark.slow),
        pytest.param(("approve", "clerk", "zz"), "hex digits", 2, marks=pytest.mark.slow),
        pytest.param(("approve", "clerk", "abcd"), "no question that waits", 1, marks=pytest.mark.slow),
        pytest.param(("tools", "clerk", "--accept", "x"), "no server of clerk", 1, marks=pytest.mark.slow),
    ],
)
def test_a_wrong_word_is_told_in_one_line(agents: Path, words: tuple[str, ...], told: str, status: int) -> None:
    result = typed(agents, *words)
    assert told in result.output
    assert result.exit_code == status


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ('colour = "red"', "colour"),
        ("[[tools]]\npython = 'mailbox.py:gone'", "cannot be imported"),
        ("[[tools]]\npython = 'gone.py:f'", "cannot be imported"),
        ("[[tools]]\npython = 'mailbox.py:OUTBOX'", "is no function"),
        ("[limits]\nrequests = 0", "limits.requests"),
        ("[[servers]]\nname = 'a'", "a command or a url"),
        ("[[servers]]\nname = 'a'\nurl = 'http://x'\nenvironment = ['NOT_SET_HERE']", "not set"),
        ("[[tools]]\npython = 'mailbox.py:send_email'\npreload = true", "cannot be preloaded"),
        ("[wallet]\nchain = 'http://x'\ncoin_name = 'a'\ncoin_version = '1'", "cannot be read"),
        ("= =", "not TOML"),
    ],
)
def test_a_definition_that_cannot_be_used_is_named(agents: Path, change: str, told: str) -> None:
    file = agents / "clerk/agent.toml"
    text = file.read_text()
    file.write_text(change + "\n" + text if change.startswith(("colour", "= =")) else text + "\n" + change)
    with pytest.raises((Invalid, Missing), match=told):
        _open(agents / "clerk")


def _open(folder: Path) -> None:
    home = AgentHome(folder)
    home.mandate()
    build(home.definition, folder)

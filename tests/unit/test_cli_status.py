"""`tessera status`: am I earning, and what holds me back? One sentence for each state of a worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.cli.status import Verdict, audited, duration, judge, run_leave, run_pause, run_status
from tessera.core.errors import Invalid, Missing
from tessera.training.home import Home
from tessera.training.status import WorkerStatus, read_status, save_status
from tessera.training.wishes import make_wish, read_wish
from training_world import small_manifest

NOW = 1_700_000_000.0
RUN_ID = small_manifest().run_id


def status(**changes: object) -> WorkerStatus:
    facts: dict[str, object] = {
        "run_id": RUN_ID, "name": "small", "stage": 1, "stages": 4, "account": "0x" + "11" * 20, "time": NOW - 1,
        "step": 40, "steps": 100, "tokens_per_step": 4096, "last_step": (NOW - 2, 2.0), "trouble": "", "pauses": "",
        "leaving": False, "companions": 0, "audits": True, "trained": False, "settled": False, "claimable": 0,
        **changes,
    }  # fmt: skip
    return WorkerStatus.model_validate(facts)


@pytest.mark.parametrize(
    ("changes", "earning", "says"),
    [
        ({}, True, "training, 2,048 tokens/s"),
        ({"time": NOW - 100}, False, "no worker runs here: the last one was seen 1 min 40 s ago"),
        ({"pauses": "it works from 22:00-07:00 only"}, False, "this worker pauses: it works from 22:00"),
        ({"trouble": "stage 2 does not answer"}, False, "no session runs: stage 2 does not answer"),
        ({"last_step": None}, False, "no step is done yet"),
        ({"last_step": (NOW - 90, 2.0)}, False, "the last step ended 1 min 30 s ago"),
        ({"leaving": True}, True, "alone at the stage: work and pay go on"),
        ({"leaving": True, "companions": 2}, True, "leaving as soon as another worker of the stage is in step"),
        ({"trained": True}, True, "the last epochs are being settled"),
        ({"trained": True, "settled": True}, True, "serves; income is claimed"),
    ],
)
def test_each_state_has_its_sentence(changes: dict[str, object], earning: bool, says: str) -> None:
    verdict = judge(status(**changes), NOW)
    assert verdict.earning is earning
    assert says in verdict.what


def test_a_share_that_nobody_audits_is_shown_as_such() -> None:
    assert audited(status()) == "no other worker at this stage"
    assert audited(status(companions=1)) == "yes"
    assert audited(status(companions=1, audits=False)) == "no: this run has no audits"


def test_slow_steps_are_no_standstill() -> None:
    assert judge(status(last_step=(NOW - 60, 30.0)), NOW) == Verdict(True, "training, 137 tokens/s")


def test_it_is_read_from_the_directory_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Home(tmp_path)
    with pytest.raises(Missing, match="knows no run"):
        run_status(tmp_path, as_json=True)
    folder = home.run_folder(RUN_ID)
    with pytest.raises(Missing, match="no worker has run"):
        run_status(tmp_path, as_json=True)
    save_status(folder, status())
    run_status(tmp_path, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["stage"], facts["earning"]) == (1, False)  # it is long past that moment
    (folder / "status.json").write_text("{}")
    with pytest.raises(Invalid, match="damaged"):
        read_status(folder)


def test_wishes_stay_in_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Home(tmp_path).run_folder(RUN_ID)
    assert read_wish(folder) == "work"
    run_pause(tmp_path, "pause")
    assert read_wish(folder) == "pause"
    run_pause(tmp_path, "work")
    run_leave(tmp_path, stay=False, wait=False)
    assert read_wish(folder) == "leave"
    run_leave(tmp_path, stay=True, wait=True)
    assert read_wish(folder) == "work"
    assert "stays" in capsys.readouterr().out
    (folder / "wish").write_text("dance")
    with pytest.raises(Invalid, match="says 'dance'"):
        read_wish(folder)
    make_wish(folder, "work")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (3_661, "1 h 1 min"), (90_000, "1 d 1 h")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text

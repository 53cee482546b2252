"""`tessera cluster studio` as a user runs it: a film to watch, and money that adds up whatever a member does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
STUDIO = [sys.executable, "-m", "tessera", "cluster", "studio", "--port", "0", "--once", "--json", "--fault", "silent"]


def need_programs() -> None:
    for program in ("ffmpeg", "espeak-ng"):
        if shutil.which(program) is None:
            if os.environ.get("CI"):
                pytest.fail(f"{program} is not installed: apt-get install {program}")
            pytest.skip(f"{program} is not installed")


def kill_in_the_middle(state: Path) -> None:
    """Run it until the pictures are paid for or being made, and take the process away."""
    with subprocess.Popen([*STUDIO, "--state-dir", str(state)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("job 3 ") and "transaction" in line:
                break
        process.kill()


def jobs_of(report: dict[str, Any], title: str) -> list[tuple[str, int, int]]:
    found = [job for job in reversed(report["jobs"]) if job["title"].startswith(title)]
    return [(job["phase"], job["paid"], job["refunded"]) for job in found]


def test_a_film_comes_of_a_studio_that_was_killed_and_of_a_narrator_who_delivers_silence(tmp_path: Path) -> None:
    need_programs()
    state, film = tmp_path / "state", tmp_path / "film.mp4"
    kill_in_the_middle(state)
    command = [*STUDIO, "--state-dir", str(state), "--out", str(film)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["phase"], report["adds_up"]) == ("done", True)
    assert jobs_of(report, "Market recap") == [("completed", 12_000_000, 0)]  # one job, paid once
    assert jobs_of(report, "Facts") == [("completed", 2_000_000, 0)]
    assert jobs_of(report, "Pictures") == [("completed", 3_000_000, 0)]
    assert jobs_of(report, "Narration") == [("rejected", 0, 2_000_000), ("completed", 2_000_000, 0)]
    money = {one["role"]: (one["earned"], one["funded"] - one["refunded"]) for one in report["agents"]}
    assert money["editor"] == (12_000_000, 7_000_000)  # over both starts, from the chain
    assert money["narrator"] == (0, 0)
    assert money["second narrator"] == (2_000_000, 300_000)
    assert money["chart maker"] == (3_000_000, 0)
    stars = {one["role"]: (one["votes"], one["stars"]) for one in report["agents"]}
    assert (stars["second narrator"], stars["narrator"]) == ((1, 5.0), (0, 0.0))  # whom the next search prefers
    for job in report["jobs"]:  # each figure has the transaction that proves it
        assert re.fullmatch("0x[0-9a-f]{64}", job["proofs"]["paid" if job["paid"] else "refunded"])
    words = ["ffprobe", "-v", "error", "-show_entries", "stream=codec_name,width,height", "-of", "json", str(film)]
    streams = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)["streams"]
    assert [stream["codec_name"] for stream in streams] == ["h264", "aac"]
    assert (streams[0]["width"], streams[0]["height"]) == (1_280, 720)
    assert 40 < report["film"]["seconds"] < 90
    listed = [sys.executable, "-m", "tessera", "cluster", "list", "--json", "--state-dir", str(state)]
    rows = json.loads(subprocess.run(listed, capture_output=True, check=True).stdout)["productions"]
    assert [(row["number"], row["phase"]) for row in rows] == [(1, "done")]

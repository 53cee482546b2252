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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def studio(where: Path, *words: str, status: int = 0) -> dict[str, Any]:
    for program in ("ffmpeg", "espeak-ng"):
        if shutil.which(program) is None:
            if os.environ.get("CI"):
                pytest.fail(f"{program} is not installed")
            pytest.skip(f"{program} is not installed")
    command = [sys.executable, "-m", "tessera", "cluster", "studio", "--state-dir", str(where), "--port", "0", "--once"]
    done = subprocess.run([*command, "--json", *words], capture_output=True, text=True, timeout=360)
    assert done.returncode == status, done.stderr
    assert re.search(r"page\s+http://127\.0\.0\.1:\d+/", done.stderr)
    return json.loads(done.stdout.splitlines()[0])


def jobs_of(report: dict[str, Any], title: str) -> list[tuple[str, int, int]]:
    found = [job for job in reversed(report["jobs"]) if job["title"].startswith(title)]
    return [(job["phase"], job["paid"], job["refunded"]) for job in found]


def test_a_narrator_who_delivers_silence_is_not_paid_and_the_film_comes(tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    report = studio(tmp_path / "state", "--fault", "silent", "--out", str(film))
    assert (report["phase"], report["adds_up"], report["held"]) == ("done", True, 0)
    assert jobs_of(report, "Narration") == [("rejected", 0, 2_000_000), ("completed", 2_000_000, 0)]
    assert jobs_of(report, "Market recap") == [("completed", 12_000_000, 0)]
    changes = {agent["role"]: agent["change"] for agent in report["agents"]}
    assert changes["narrator"] == 0
    assert changes["second narrator"] == 2_000_000 - 300_000
    assert changes["editor"] == 12_000_000 - 7_000_000
    assert changes["buyer"] == -12_000_000
    for job in report["jobs"]:  # each figure has the transaction that proves it
        assert re.fullmatch("0x[0-9a-f]{64}", job["proofs"]["paid" if job["paid"] else "refunded"])
    words = ["ffprobe", "-v", "error", "-show_entries", "stream=codec_name,width,height", "-of", "json", str(film)]
    streams = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)["streams"]
    assert [stream["codec_name"] for stream in streams] == ["h264", "aac"]
    assert (streams[0]["width"], streams[0]["height"]) == (1_280, 720)
    assert 40 < report["film"]["seconds"] < 90
    listed = [sys.executable, "-m", "tessera", "cluster", "list", "--json", "--state-dir", str(tmp_path / "state")]
    rows = json.loads(subprocess.run(listed, capture_output=True, check=True).stdout)["productions"]
    assert [(row["number"], row["phase"], row["jobs"]) for row in rows] == [(1, "done", 5 + 1)]

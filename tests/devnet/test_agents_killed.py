"""A run whose process is killed again and again ends, and has done each thing once; on both databases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_a_run_survives_kill_9_and_repeats_nothing(database_url: str, tmp_path: Path, root: Path) -> None:
    path = os.pathsep.join([str(root / "tests"), os.environ.get("PYTHONPATH", str(root / "src"))])
    done = subprocess.run(
        [sys.executable, str(root / "tests/killed_agent.py"), database_url, str(tmp_path / "outbox"), "7"],
        capture_output=True, text=True, timeout=110, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2_000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["lines"] == list(range(6))
    assert result["kills"] > 0

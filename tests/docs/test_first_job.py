"""The first job of the guide: short, and it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_first_job_runs_and_is_short(root: Path) -> None:
    file = root / "examples/first_job.py"
    code = [line for line in file.read_text(encoding="utf-8").splitlines()[5:] if line.strip()]
    assert len(code) < 30
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("COMPLETED Small stones, laid well: mosaics Amount(units=40, ")

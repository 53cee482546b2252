"""The first agent: short, offline, and kept from what a stranger wants."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sources import ROOT, SOURCE

FIRST = ROOT / "examples/first_agent.py"


@pytest.mark.slow
def test_the_first_agent_is_short_and_runs_offline(tmp_path: Path) -> None:
    text = FIRST.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert len(text.splitlines()) - len(docstring.splitlines()) < 30
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, str(FIRST)], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100
    )
    assert done.returncode == 0, done.stderr
    sent, refused = [line for line in done.stdout.splitlines() if line.startswith(("returned", "refused"))]
    assert sent == "returned ['pal@example.com'] sent to pal@example.com"
    assert refused.startswith("refused ['thief@example.com']")
    assert "nobody can be asked" in refused

"""The page about agents: its example runs, and it explains every rule."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path


def _page(root: Path) -> str:
    return (root / "docs/explain/agents.md").read_text(encoding="utf-8")


def test_the_ten_lines_guard_an_executor(root: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", _page(root), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "agents.md", "exec"), {})
    assert printed.getvalue() == "('recipient_not_named',) {'thief@example.com': 'outside'}\n"


def test_every_rule_is_explained(root: Path) -> None:
    text = (root / "src/tessera/agents/policies/default.cedar").read_text(encoding="utf-8")
    rules = set(re.findall(r'@id\("(\w+)"\)', text)) - {"allowed"}
    rows = [row for row in _page(root).splitlines() if row.startswith("| `")]
    assert rules == {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}

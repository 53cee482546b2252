"""The guide to serving says what the commands take."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tessera.cli.main import app

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "serve.md").read_text(encoding="utf-8")
LINES = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines()
]
TREE: Any = get_command(app)


@pytest.mark.parametrize("line", LINES)
def test_a_command_in_the_guide_exists_with_its_options(line: str) -> None:
    words = shlex.split(line)[1:]
    count = next(count for count in (3, 2, 1) if tuple(words[:count]) in TREE.commands_below)
    command = TREE.commands_below[tuple(words[:count])]
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    assert {word for word in words[count:] if word.startswith("-")} <= known

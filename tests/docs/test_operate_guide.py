"""The operator's guide says what the commands take: its settings are read, its command lines parse."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tessera.cli.main import app
from tessera.cli.settings import SettingsFile

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "operate.md").read_text(encoding="utf-8")
LINES = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("tessera ")
]
TREE: Any = get_command(app)


def test_the_settings_in_the_guide_are_known(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "config.toml").write_text(text)
    read = SettingsFile.read(tmp_path / "config.toml", TREE.known)
    assert read is not None
    assert read.values.keys() == {(), ("join",), ("run", "create")}


@pytest.mark.parametrize("line", LINES)
def test_a_command_in_the_guide_exists_with_its_options(line: str) -> None:
    words = shlex.split(line)[1:]
    while words[0].startswith("-"):  # what holds for all commands: each takes a value
        assert words[0] in {name for param in TREE.params for name in param.opts}
        words = words[2:]
    count = next(count for count in (2, 1) if tuple(words[:count]) in TREE.commands_below)
    command = TREE.commands_below[tuple(words[:count])]
    if words[0] in ("config", "service") and len(words) > count:  # a command line inside another
        return
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    assert {word for word in words[count:] if word.startswith("-")} <= known

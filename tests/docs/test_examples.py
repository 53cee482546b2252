"""Every example in a docstring runs, every command in a page exists, every link leads somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sources import ROOT, SOURCE, module_files, pages

WITH_EXAMPLES = [name for name, file in module_files().items() if ">>> " in file.read_text(encoding="utf-8")]
PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()]
CODE = re.compile(r"```.*?```|`[^`\n]+`|^    .*$", re.DOTALL | re.MULTILINE)
HEAVY = {"torch", "web3", "eth", "numpy", "fastapi", "x402", "iroh"}


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_a_module_run(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 0
    assert failed == 0


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_every_make_command_in_a_page_exists(page: Path) -> None:
    code = "\n".join(CODE.findall(page.read_text(encoding="utf-8")))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) <= _make_targets()


@pytest.mark.parametrize("page", PAGES)
def test_every_tessera_command_in_a_page_exists(page: Path) -> None:
    code = "\n".join(CODE.findall(page.read_text(encoding="utf-8")))
    named = set(re.findall(r"(?:^|[`/\s])tessera ([a-z][a-z-]*)", code))
    if not named:
        return
    from typer.main import get_command

    from tessera.cli.main import app

    assert named <= set(getattr(get_command(app), "commands", {}))


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_in_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link.split("#")[0] for link in links if "://" not in link and not link.startswith(("#", "mailto:"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_readme_opens_with_the_two_commands() -> None:
    commands = re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert commands[:2] == ["up", "test"]


def test_help_names_every_target_for_people() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = set(re.findall(r"make ([a-z-]+)", text.split("help:")[1].split("\n\n")[0]))
    assert listed == _make_targets() - {"help", "install", "install-test", "install-dev", "install-eels"}


LIGHT = {
    package: names
    for package in ("core.", "incentives.", "cli.main")
    if (names := [name for name in module_files() if name.startswith(f"tessera.{package}")])
}


@pytest.mark.parametrize("package", LIGHT)
def test_a_light_package_imports_nothing_heavy(package: str) -> None:
    names = LIGHT[package]
    imports = "; ".join(f"import {name}" for name in names)
    code = f"import sys; {imports}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCE, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

"""The reference names exactly what is public, and every error is explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sources import REFERENCE, declared_names, module_files, public_definitions

from tessera.core import errors

MODULES = module_files()
ERRORS = {name: getattr(errors, name) for name in errors.__all__ if name != "from_dict"}


def _sections(page: Path) -> dict[str, set[str]]:
    """Module name to the names in the first column of the tables under its heading."""
    sections: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in page.read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"## `(tessera[\w.]*)`", line):
            current = sections.setdefault(heading[1], set())
        elif row := re.match(r"\| `(\w+)", line):
            current.add(row[1])
    return sections


SECTIONS = [
    pytest.param(module, names, id=module)
    for page in sorted(REFERENCE.glob("*.md"))
    for module, names in _sections(page).items()
]


@pytest.mark.parametrize(("module", "documented"), SECTIONS)
def test_the_reference_of_a_module_names_what_it_exports(module: str, documented: set[str]) -> None:
    assert module in MODULES, f"the reference describes {module}, which does not exist"
    assert documented == set(declared_names(MODULES[module]) or [])


def test_every_module_of_core_has_a_reference() -> None:
    described = {parameter.id for parameter in SECTIONS}
    assert {name for name in MODULES if name.startswith("tessera.core.")} <= described


@pytest.mark.parametrize("module", MODULES)
def test_a_module_with_public_names_lists_them(module: str) -> None:
    if public_definitions(MODULES[module]) and not module.startswith("tessera.cli"):
        assert declared_names(MODULES[module]), f"{module} has no __all__"


def test_every_error_is_explained_with_its_code_and_status() -> None:
    text = (REFERENCE / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \| (\S.*?) \|", text, re.MULTILINE)
    assert {(name, code, int(status)) for name, code, status, _ in rows} == {
        (name, cls.code, cls.status) for name, cls in ERRORS.items()
    }

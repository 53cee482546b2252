"""The page about settlement has every invariant of every contract; the tests that it names exist; its gas is right."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest
from sources import ROOT

FOLDER = ROOT / "contracts"
CONTRACTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.vy"))
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
GROUP = re.compile(r"\| \*(.+)\* \| \|")


def _page() -> str:
    return (ROOT / "docs/explain/settlement.md").read_text(encoding="utf-8")


def _natspec(contract: str) -> str:
    (text,) = re.findall(r'^"""\n(@title.*?)"""', (FOLDER / f"{contract}.vy").read_text("utf-8"), re.S | re.M)
    return str(text)


def _what_cannot_happen(contract: str) -> set[str]:
    """The points of a list, or the clauses of a sentence."""
    (said,) = re.findall(r"What cannot happen[^:]*:\s+(.*?)(?:\n\s*\n|\n@)", _natspec(contract), re.S)
    parts = re.split(r"(?:^|\n)\s*- ", said) if said.startswith("- ") else re.split(r"\.(?:\s|$)", said)[0].split(";")
    return {_line(part).rstrip(";.") for part in parts if part.strip()}


def _line(text: str) -> str:
    return " ".join(text.split())


def _rows(contract: str) -> dict[str, list[str]]:
    """A contract's section: under each of its own statements, the sentences that say what holds."""
    (section,) = re.findall(rf"^### {re.escape(contract)}\.vy\n(.*?)(?=^##)", _page(), re.S | re.M)
    groups: dict[str, list[str]] = {}
    for row in section.splitlines():
        if match := GROUP.fullmatch(row):
            groups[match[1]] = sentences = []
        elif row.startswith("| ") and row != "| sentence | held by |":
            sentences.append(row)
    return groups


@cache
def _tests_of(file: Path) -> set[str]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    names = {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, kinds)}
    return {name for name in names if name.startswith("test_")}


def test_no_contract_is_missing() -> None:
    assert sorted(re.findall(r"^### (\S+)\.vy$", _page(), re.M)) == CONTRACTS


@pytest.mark.parametrize("contract", CONTRACTS)
def test_each_thing_that_cannot_happen_is_held_by_a_test(contract: str) -> None:
    groups = _rows(contract)
    assert _what_cannot_happen(contract) - groups.keys() == set()
    assert [words for words in groups if words not in _line(_natspec(contract))] == []  # nothing made up
    assert [words for words, sentences in groups.items() if not sentences] == []
    assert [row for sentences in groups.values() for row in sentences if not TEST.search(row)] == []


def test_each_test_that_is_named_exists() -> None:
    named = [*TEST.findall(_page()), *TEST.findall((ROOT / "SECURITY.md").read_text(encoding="utf-8"))]
    assert len(named) > 100
    assert [f"{file}::{name}" for file, name in named if name not in _tests_of(ROOT / file)] == []


def test_each_file_that_is_named_exists() -> None:
    files = re.findall(r"`((?:tests|contracts)/[\w/]+\.(?:py|vy|json))", _page())
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_gas_on_the_page_is_the_gas_of_receipts() -> None:
    golden = json.loads((ROOT / "tests/golden/gas.json").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| [^|]+ \| (`\w+: [^|]+`) \| ([\d,]+) \| [\d,]* \|$", _page(), re.M)
    assert len(rows) > 10
    for entries, total in rows:
        parts = [entry.split(": ", 1) for entry in re.findall(r"`([^`]+)`", entries)]
        assert sum(golden[contract][operation] for contract, operation in parts) == int(total.replace(",", "")), entries

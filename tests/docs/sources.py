"""What the documentation tests look at: found by reading files, so that nothing heavy is imported."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
REFERENCE = ROOT / "docs" / "reference"


def module_files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = {}
    for file in sorted((SOURCE / "tessera").rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def declared_names(file: Path) -> list[str] | None:
    """The module's `__all__`, or None where it has none."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                return list(ast.literal_eval(node.value))
    return None


def public_definitions(file: Path) -> list[str]:
    """Top-level classes and functions whose name has no leading underscore."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def pages() -> list[Path]:
    """Every Markdown page of the repository."""
    folders = [ROOT / name for name in ("docs", "specs", "benchmarks", "examples", "contracts")]
    return sorted([*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))])

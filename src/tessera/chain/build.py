"""Compile `contracts/*.vy` into `artifacts/` and generate `faces.py`. For developers: it needs the Vyper compiler.

    python -m tessera.chain.build           write the files
    python -m tessera.chain.build --check   exit 1 if they would change

The output depends on the sources and the compiler's version alone, so that anyone can recompile and compare bytes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.chain.facegen import faces_source

__all__ = ["build", "main"]

HERE = Path(__file__).resolve().parent
CONTRACTS = HERE.parents[2] / "contracts"


def build(contracts: Path = CONTRACTS) -> dict[Path, str]:
    """What the files should hold. Needs vyper and, to format, ruff.  Cost: about 1 s a contract."""
    artifacts = {path.stem: compile_contract(path) for path in sorted(contracts.glob("*.vy"))}
    written = {HERE / "artifacts" / f"{name}.json": _json(artifact) for name, artifact in artifacts.items()}
    return {**written, HERE / "faces.py": faces_source(artifacts)}


def compile_contract(path: Path) -> dict[str, Any]:
    """One contract with the optimiser's default setting (gas), as the pragma's compiler makes it."""
    import vyper  # type: ignore[import-untyped]
    from vyper.compiler import compile_from_file_input  # type: ignore[import-untyped]
    from vyper.compiler.input_bundle import FilesystemInputBundle  # type: ignore[import-untyped]

    bundle = FilesystemInputBundle([path.parent])
    formats = ["abi", "bytecode", "bytecode_runtime", "userdoc"]
    out = compile_from_file_input(bundle.load_file(path), input_bundle=bundle, output_formats=formats)
    return {
        "contract": path.stem,
        "compiler": f"vyper {vyper.__version__}",
        "sources": _source_hashes(path),
        "abi": out["abi"],
        "userdoc": out["userdoc"],
        "bytecode": out["bytecode"],
        "runtime": out["bytecode_runtime"],
    }


def main(arguments: Sequence[str]) -> int:
    texts = build()
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" not in arguments:
        for path in changed:
            path.parent.mkdir(exist_ok=True)
            path.write_text(texts[path], encoding="utf-8")
    sys.stdout.write("".join(f"{path.name}\n" for path in changed))
    return 1 if changed and "--check" in arguments else 0


def _source_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of the contract and of each module that it imports."""
    modules = sorted(
        module
        for module in (path.parent / "modules").glob("*.vy")
        if f"from modules import {module.stem}\n" in path.read_text("utf-8")
    )
    return {
        file.relative_to(path.parent).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in [path, *modules]
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Compiled contracts as they ship in the wheel. `python -m tessera.chain.build` writes the files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from tessera.chain import abi
from tessera.core.errors import Missing

__all__ = ["Artifact", "load"]


@dataclass(frozen=True, slots=True)
class Artifact:
    """One compiled contract. `sources` maps each source file to its SHA-256."""

    name: str
    abi: list[dict[str, Any]]
    bytecode: bytes
    runtime: bytes
    compiler: str
    sources: dict[str, str]

    def init_code(self, *args: Any) -> bytes:
        """What a transaction carries to deploy it with these constructor arguments."""
        entry = next((item for item in self.abi if item["type"] == "constructor"), None)
        types = [abi.type_of(item) for item in entry["inputs"]] if entry else []
        return self.bytecode + abi.encode(types, args)


@lru_cache(maxsize=32)
def load(name: str) -> Artifact:
    """Raises `Missing` for a contract that is not in the package."""
    file = files("tessera.chain") / "artifacts" / f"{name}.json"
    if not name.isidentifier() or not file.is_file():
        raise Missing(f"no compiled contract {name!r} in this package")
    value = json.loads(file.read_text(encoding="utf-8"))
    return Artifact(
        name=name,
        abi=value["abi"],
        bytecode=bytes.fromhex(value["bytecode"][2:]),
        runtime=bytes.fromhex(value["runtime"][2:]),
        compiler=value["compiler"],
        sources=value["sources"],
    )

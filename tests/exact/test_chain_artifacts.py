"""What ships is what the sources say: recompiling gives the same bytes, and the same faces."""

from __future__ import annotations

import hashlib

import pytest

from chain_support import ROOT
from tessera.chain import artifact
from tessera.chain.build import build


@pytest.mark.slow
def test_recompiling_gives_the_same_files() -> None:
    for path, text in build().items():
        assert path.read_text("utf-8") == text, f"{path.name} is stale: run python -m tessera.chain.build"


def test_each_artifact_names_its_sources_by_their_hash() -> None:
    for name in ("coin", "model_share", "run"):
        sources = artifact.load(name).sources
        assert f"{name}.vy" in sources
        assert sources == {
            file: hashlib.sha256((ROOT / "contracts" / file).read_bytes()).hexdigest() for file in sources
        }

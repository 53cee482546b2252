"""Imported models give what transformers gives for them, as recorded from transformers itself.

The recording is made anew with `--update-golden`, which needs transformers; tests/exact/test_models_parity.py compares
with it directly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plain_world import FAMILIES, NEW, PROMPT, Staged, write_folder
from tessera.core.signing import PeerKey
from tessera.devnet.stage_invitation import StageInvitation
from tessera.models.card import ModelCard, StageFile
from tessera.models.config import CodecConfig
from tessera.models.plain_folder import PlainFolder
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import PeerRecord

VECTORS = Path(__file__).resolve().parents[2] / "specs" / "vectors" / "plain_models.json"


def reference(path: Path) -> dict[str, Any]:
    """Greedy tokens of transformers, and its logits of the first and last of them: the largest four."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = list(PROMPT)
    facts: dict[str, Any] = {}
    with torch.no_grad():
        for number in range(NEW):
            logits = model(torch.tensor([ids])).logits[0, -1]
            if number in (0, NEW - 1):
                top = logits.topk(4)
                facts["first" if number == 0 else "last"] = {
                    str(i): round(v, 4) for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                }
            ids.append(int(logits.argmax()))
    return {"tokens": ids[len(PROMPT) :], **facts}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_model_says_what_transformers_says(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = write_folder(tmp_path / family, family)
    known = json.loads(VECTORS.read_text()) if VECTORS.exists() else {}
    if request.config.getoption("--update-golden"):
        known[family] = reference(path)
        VECTORS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    tokens, logits = Staged(PlainFolder(path), 3, "float32", tmp_path / "stages").greedy(PROMPT, NEW)
    assert tokens == known[family]["tokens"]
    assert len(set(tokens)) > 16, "no text that would show a difference"
    for which, row in zip(("first", "last"), logits, strict=True):
        for token, value in known[family][which].items():
            assert float(row[int(token)]) == pytest.approx(value, abs=1e-3)


def test_a_card_and_an_invitation_are_as_recorded(golden: Callable[[str, Any], None], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "qwen3", "qwen3")
    spec = PlainFolder(folder).spec(2, CodecConfig(kind="dense", wire="int8", conv=False))
    stages = tuple(StageFile(blob=f"{number:064x}", size_bytes=10 + number, params=number + 1) for number in range(2))
    card = ModelCard(
        name="tiny", family="qwen3", spec=spec, stages=stages, tokenizer="ab" * 32, ends=(2, 7),
        named={"eos_token": "</s>"}, begins=None, template="{{ messages }}",
    )  # fmt: skip
    key = PeerKey(b"\x07" * 32)
    host = PeerRecord.sign(key, ("iroh:192.0.2.7:4433",), 1_800_000_000)
    relays = (RelayUrl("https://relay.example", "a-token-of-it"),)
    made = StageInvitation.make(key, card.digest, host=host, expires=1_800_000_000, relays=relays, secret="cd" * 16)
    golden(
        "specs/vectors/models.json",
        {"card": card.canonical.decode(), "digest": card.digest, "invitation": made.to_text()},
    )

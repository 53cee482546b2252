"""Models that were brought in: what is kept of them, and what comes out again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from plain_world import CHATML, PROMPT, Staged, tensors_of, write_folder, write_tokenizer
from tessera.cli.main import app
from tessera.core.encoding import decode, encode
from tessera.core.errors import Conflict, Invalid, Missing
from tessera.core.ids import parse_blob_id
from tessera.devnet.library import Import, find_model, import_model, known_models, model_tokenizer, remove_model
from tessera.models.card import ModelCard
from tessera.models.decode import StageDecoder
from tessera.models.plain_folder import PlainFolder
from tessera.models.stage_file import load_stage
from tessera.p2p.blobs import BlobStore
from tessera.training.files import one_at_a_time
from tessera.training.home import Home


def checkpoint(path: Path, family: str = "qwen2", **changes: Any) -> Path:
    folder = write_folder(path, family, files=2, **changes)
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    return folder


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    path = tmp_path_factory.mktemp("model")
    return import_model(Home(path / "state"), checkpoint(path / "tiny"), "tiny", Import(stages=1))


def tessera(*args: str) -> Any:
    result = CliRunner().invoke(app, ["models", *args])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1]) if "--json" in args else result.stdout


@pytest.mark.parametrize("boundary", ["int8", pytest.param("dense", marks=pytest.mark.slow)])
def test_an_imported_model_computes_what_its_folder_does(boundary: Any, tmp_path: Path) -> None:
    folder, home = checkpoint(tmp_path / "Qwen2-Tiny"), Home(tmp_path / "state")
    seen: list[tuple[int, int]] = []
    how = Import(stages=3, boundary=boundary)
    card = import_model(home, folder, "tiny", how, progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert find_model(home, "tiny") == find_model(home, card.digest[:8]) == card == ModelCard.parse(card.canonical)
    assert (card.ends, card.named["bos_token"], card.template) == ((7, 9, 1), "<s>", CHATML)
    blobs, message = BlobStore(home.blobs), None
    for stage, file in enumerate(card.stages):
        decoder = StageDecoder(load_stage(card.spec, stage, blobs.path(parse_blob_id(file.blob))))
        message = decoder.step("s", PROMPT, message)
    wire = {"dense": "bfloat16", "int8": "int8"}[boundary]
    plain = Staged(PlainFolder(folder), 3, wire, tmp_path / "plain").logits("s", PROMPT)
    assert torch.equal(torch.as_tensor(message), plain)
    assert model_tokenizer(blobs, card).decode([3]) != ""
    assert sum(t.numel() for t in tensors_of("qwen2").values()) < card.params  # the tied head is held twice


def test_the_commands_import_list_export_and_remove(tmp_path: Path) -> None:
    folder, state = checkpoint(tmp_path / "Qwen2-Tiny"), ("--state-dir", str(tmp_path / "state"))
    made = tessera("import", str(folder), "--stages", "2", "--context", "64", *state, "--json")
    assert (made["name"], made["family"], made["context"], len(made["stages"])) == ("Qwen2-Tiny", "qwen2", 64, 2)
    assert tessera("list", *state, "--json") == [made]
    assert "Qwen2-Tiny" in tessera("list", *state)
    tessera("export", made["digest"][:9], str(tmp_path / "out"), *state)
    ours, theirs = PlainFolder(tmp_path / "out", context=64), PlainFolder(folder, context=64)
    assert ours.config == theirs.config
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
    again = tessera("import", str(tmp_path / "out"), "--stages", "2", "--name", "again", *state, "--json")
    assert again["stages"] == made["stages"]
    tessera("remove", "Qwen2-Tiny", *state)
    assert [card["name"] for card in tessera("list", *state, "--json")] == ["again"]
    home = Home.existing(tmp_path / "state")
    assert all(BlobStore(home.blobs).is_here(blob) for blob in find_model(home, "again").blobs)  # shared ones stay
    remove_model(home, "again")
    assert BlobStore(home.blobs).blobs() == []


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder, home = checkpoint(tmp_path / "tiny"), Home(tmp_path / "state")
    for name in ("", ".hidden", "../x", "a/b", "x" * 101, "a b"):
        with pytest.raises(Invalid, match="cannot be called"):
            import_model(home, folder, name, Import())
    (folder / "generation_config.json").write_text('{"eos_token_id": 320}')
    with pytest.raises(Invalid, match="eos_token_id"):
        import_model(home, folder, "tiny", Import())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Invalid, match=r"cannot read tokenizer\.json"):
        import_model(home, folder, "tiny", Import())
    assert known_models(home) == []
    with pytest.raises(Missing, match="tessera models list"):
        find_model(home, "tiny")


def test_a_name_is_given_once_and_a_damaged_card_is_passed_over(tmp_path: Path) -> None:
    folder, home = checkpoint(tmp_path / "tiny"), Home(tmp_path / "state")
    card = import_model(home, folder, "tiny", Import(stages=9))
    assert card.spec.stages == 4  # one for each layer
    with pytest.raises(Conflict, match="tessera models remove tiny"):
        import_model(home, folder, "tiny", Import())
    (home.path / "models" / "bad.json").write_text("{}")
    assert known_models(home) == [card]


def test_imports_take_turns_and_clear_away_what_a_killed_one_left(tmp_path: Path) -> None:
    folder, home = checkpoint(tmp_path / "tiny"), Home(tmp_path / "state")
    (home.path / ".import-killed").mkdir()
    (home.path / ".import-killed" / "stage").write_bytes(b"half")
    assert known_models(home) == []
    held = one_at_a_time(home.path / "models" / "lock", "tests this")
    with held, pytest.raises(Conflict, match="another process imports"):
        import_model(home, folder, "tiny", Import())
    import_model(home, folder, "tiny", Import())
    assert list(home.path.glob(".import-*")) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "tessera/model/2"}, "format"),
        ({"name": "../x"}, "name"),
        ({"tokenizer": "x"}, "tokenizer"),
        ({"stages": []}, "files for"),
        ({"ends": [320]}, "outside a vocabulary"),
        ({"ends": list(range(17))}, "ends"),
        ({"colour": 1}, "colour"),
        ({"template": "x" * (256 * 1024 + 1)}, "template"),
    ],
)
def test_a_card_from_elsewhere_is_checked(change: dict[str, Any], reason: str, card: ModelCard) -> None:
    value = decode(card.canonical, 1 << 20)
    with pytest.raises(Invalid, match=reason):
        ModelCard.parse(encode(value | change))
    for data in (b"", b"{}", b"[]", b" " + card.canonical):
        with pytest.raises(Invalid):
            ModelCard.parse(data)

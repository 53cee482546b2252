"""An owner's data sets: added once, listed, shown, put into a manifest and trained on."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_world import write
from tessera.cli.data import data_app
from tessera.core.errors import Conflict, Invalid, Missing
from tessera.core.ids import Account
from tessera.core.signing import AccountKey
from tessera.devnet.datasets import KnownSet, add_set, find_set, known_sets, sample_of
from tessera.devnet.people import load_people
from tessera.devnet.text import text_of
from tessera.models.tokenizer import Tokenizer
from tessera.p2p.blobs import BlobStore
from tessera.training.data import open_batches
from tessera.training.home import Home
from tessera.training.manifest import Allocation, DataRecipe, Manifest, Part, Schedule
from training_world import CREATOR, small_manifest

OWNER = AccountKey(b"\x07" * 32).account
CODE = "def add(first, second):\n    return first + second\n"
TALK = "She said that it rained, and that it was late. "


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    write(root, {f"code/{n}.py": (f"# {n}\n" + CODE * 30).encode() for n in range(40)})
    rows = [json.dumps({"body": f"{n}. " + TALK * 10}) for n in range(200)]
    write(root, {"talk.jsonl": "\n".join(["{", *rows]).encode()})
    return root


def add(home: Home, path: Path, **changes: Any) -> KnownSet:
    options = {
        "field": "body", "name": path.name, "account": OWNER, "tokenizer": "", "now": 1_800_000_000,
        "vocabulary": 300, "shard_tokens": 2000, **changes,
    }  # fmt: skip
    return add_set(home, path, **options)


@pytest.fixture(scope="module")
def home(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = Home(tmp_path_factory.mktemp("home") / "state")
    add(made, texts / "code")
    add(made, texts / "talk.jsonl", now=1_800_000_001, account=CREATOR)
    return made


def test_sets_are_remembered_and_share_a_tokenizer(home: Home) -> None:
    code, talk = known_sets(home)
    assert (code.name, talk.name) == ("code", "talk.jsonl")
    assert code.tokenizer == talk.tokenizer
    assert (code.vocab_size, talk.skipped_rows, talk.shards) == (300, 1, talk.shards)
    assert talk.reasons[0].startswith("talk.jsonl, byte 0: no JSON")
    assert sample_of(home, talk).count("She said") > 2
    assert find_set(home, "code") == find_set(home, code.index[:10]) == code
    for what in ("", "nothing"):
        with pytest.raises(Missing, match="`tessera data list` shows them"):
            find_set(home, what)


@pytest.mark.anyio
async def test_a_manifest_mixes_two_owners_sets(home: Home, tmp_path: Path) -> None:
    code, talk = known_sets(home)
    blobs = BlobStore(home.blobs)
    manifest = small_manifest()
    model = manifest.model.model.model_copy(update={"vocab_size": 300, "context": 32})
    manifest = manifest.model_copy(
        update={
            "model": manifest.model.model_copy(update={"model": model}),
            "data": DataRecipe(tokenizer=code.tokenizer, sets=(code.entry, talk.entry)),
            "allocation": Allocation(
                work=9000,
                data=(Part(account=OWNER, bps=600), Part(account=CREATOR, bps=400)),
                creator=Part(account=CREATOR, bps=0),
            ),
            "schedule": Schedule(
                steps=20, microbatches=2, sequences=4, length=32, evaluate_every=5, evaluate_batches=2, epoch_steps=5
            ),
        }
    )
    manifest = Manifest.parse(manifest.canonical)

    async def fetch(blob: Any) -> Path:
        return blobs.path(blob)

    batches = await open_batches(manifest, fetch, lambda blob: None, tmp_path)
    await batches.ready(3)
    tokenizer = Tokenizer.from_bytes(blobs.path(manifest.tokenizer).read_bytes())
    told = [tokenizer.decode(row.tolist()) for index in range(2) for row in batches.train(3, index)]
    assert sorted("first" in text or "def" in text for text in told) == [False] * 4 + [True] * 4
    text = text_of(manifest, blobs, tmp_path / "text.json")
    assert (text.index, text.source, text.is_python) == (code.index, "code", False)
    assert 0 < text.bigram_loss < text.unigram_loss
    assert text_of(manifest, blobs, tmp_path / "text.json") == text
    with pytest.raises(Missing, match="prepare it with `tessera data add`"):
        text_of(manifest, BlobStore(tmp_path / "empty"), tmp_path / "other.json")


def test_the_same_text_is_the_same_set_wherever_it_is_prepared(home: Home, texts: Path, tmp_path: Path) -> None:
    known = known_sets(home)[0]
    file = tmp_path / "tokenizer.json"
    file.write_bytes(BlobStore(home.blobs).path(known.tokenizer).read_bytes())
    other = Home(tmp_path / "other")
    assert add(other, texts / "code", tokenizer=str(file)).index == known.index
    assert add(other, texts / "code", tokenizer="new", now=5).tokenizer == known.tokenizer, "training is deterministic"
    assert len(known_sets(other)) == 1


def test_what_cannot_be_a_tokenizer_is_refused(texts: Path, tmp_path: Path) -> None:
    home = Home(tmp_path / "state")
    write(tmp_path, {"manifest.json": small_manifest().canonical, "thesis.doc": b"mine"})
    for asked, error, message in (
        ("ab" * 32, Missing, "not in this state directory"),
        (str(tmp_path / "manifest.json"), Missing, "names tokenizer cdcd"),
        (str(tmp_path / "thesis.doc"), Invalid, "not a tokenizer"),
        ("latest", Invalid, "a blob id is 64"),
    ):
        with pytest.raises(error, match=message):
            add(home, texts / "code", tokenizer=asked)
    with pytest.raises(Invalid, match="no such file or folder"):
        add(home, texts / "nowhere")
    with pytest.raises(Invalid, match="name has 1 to 100 characters"):
        add(home, texts / "code", name=" ")


def test_one_preparation_at_a_time(texts: Path, tmp_path: Path) -> None:
    home = Home(tmp_path / "state")
    known_sets(home)
    with (home.path / "datasets" / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="another process prepares"):
            add(home, texts / "code")


def test_a_damaged_record_is_passed_over(home: Home) -> None:
    before = known_sets(home)
    files = [home.path / "datasets" / f"{digit * 64}.json" for digit in "1234"]
    for file, data in zip(files, (b"{", b"[]", b'{"reasons": []}', b" " * 70_000), strict=True):
        file.write_bytes(data)
    assert known_sets(home) == before
    for file in files:
        file.unlink()


def test_the_commands_say_what_they_did(texts: Path, tmp_path: Path) -> None:
    state, runner = str(tmp_path / "state"), CliRunner()

    def run(*words: str) -> str:
        result = runner.invoke(data_app, [*words, "--state-dir", state], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    def last(said: str) -> Any:
        return json.loads(said.splitlines()[-1])

    said = last(run("add", str(texts / "talk.jsonl"), "--field", "body", "--name", "talk", "--json"))
    owner: Account = load_people(Home(tmp_path / "state")).data_owner.account
    assert said["entry"] == {"index": said["index"], "weight": 1, "account": owner, "description": "talk"}
    assert said["skipped_rows"] == 1
    listed = last(run("list", "--json"))
    assert [known["index"] for known in listed] == [said["index"]]
    assert "talk" in run("list")
    shown = run("show", said["index"][:8])
    assert json.dumps(said["entry"]) in shown
    assert "She said" in shown
    assert "Skipped 0 files and 1 rows" in shown

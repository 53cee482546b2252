"""The models that this machine can serve: brought in from checkpoint folders, kept as one file for each stage.

A card about each lies in `models/`; what it names are blobs like any other, so another machine fetches its stage as it
fetches data. One stage at a time is in memory.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog

from tessera.core.errors import Conflict, Invalid, Missing, Unavailable
from tessera.core.ids import BlobId, parse_blob_id
from tessera.models.card import CARD_LIMIT, MAX_ENDS, NAME, ModelCard, StageFile
from tessera.models.config import CodecConfig, ModelSpec
from tessera.models.plain import CONFIG_LIMIT, read_json
from tessera.models.plain_export import export_plain
from tessera.models.plain_folder import Compute, PlainFolder
from tessera.models.plain_tokenizer import (
    TEMPLATE_LIMIT,
    TOKENIZER_CONFIG_LIMIT,
    TOKENIZER_LIMIT,
    PlainTokenizer,
    TokenizerFacts,
)
from tessera.models.stage_file import load_stage, write_stage
from tessera.p2p.blobs import BlobStore
from tessera.training.files import one_at_a_time
from tessera.training.home import Home, write_atomic

__all__ = [
    "Boundary",
    "Import",
    "export_model",
    "find_model",
    "import_model",
    "known_models",
    "model_tokenizer",
    "remove_model",
]

log = structlog.get_logger()

Boundary = Literal["dense", "int8"]
_WORK = ".import-"  # what folders of an import under way begin with
_WIRES: dict[Boundary, Literal["bfloat16", "int8"]] = {"dense": "bfloat16", "int8": "int8"}


@dataclass(frozen=True, slots=True)
class Import:
    """How a checkpoint is brought in."""

    stages: int = 4  # at most one for each layer
    boundary: Boundary = "dense"  # bfloat16, or int8 with a scale for each token
    context: int = 0  # tokens; 0 = as many as the model was made for
    compute: Compute = ""


def import_model(
    home: Home, path: Path, name: str, how: Import, *, progress: Callable[[int, int], None] | None = None
) -> ModelCard:
    """Cut the checkpoint in the folder `path` into stages and keep them under `name`.

    Args:
        progress: told how many stages of how many are done.

    Raises: Invalid: what `PlainFolder` refuses, a tokenizer that does not fit, a bad name; Conflict: the name is taken,
    or another import goes on; Unavailable: no room.
    """
    if re.match(NAME, name) is None:
        raise Invalid(f"a model cannot be called {name[:80]!r}: up to 100 letters, digits, '.', '_', '-'")
    if _file(home, name).exists():
        raise Conflict(f"a model is called {name} here already: give a --name, or `tessera models remove {name}`")
    folder = PlainFolder(path, context=how.context, compute=how.compute)
    codec = CodecConfig(kind="dense", wire=_WIRES[how.boundary], conv=False)
    spec = folder.spec(min(how.stages, folder.config.model.layers), codec)
    data = folder.read("tokenizer.json", TOKENIZER_LIMIT)
    facts = _tokenizer_facts(folder)
    tokenizer = PlainTokenizer(data, facts)
    if tokenizer.vocab_size > spec.model.vocab_size:
        raise Invalid(f"the tokenizer has {tokenizer.vocab_size} tokens, the model knows {spec.model.vocab_size}")
    ends = _ends(folder, tokenizer)
    blobs, files = BlobStore(home.blobs), []
    with one_at_a_time(_folder(home) / "lock", f"imports a model in {home.path}"):
        for leftover in home.path.glob(f"{_WORK}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        for stage in range(spec.stages):
            files.append(_keep_stage(blobs, folder, spec, stage, home.path))
            if progress is not None:
                progress(stage + 1, spec.stages)
        card = ModelCard(
            name=name, family=folder.config.family, spec=spec, stages=tuple(files), tokenizer=blobs.put(data),
            ends=ends, named=dict(facts.named), begins=facts.begins, template=facts.template,
        )  # fmt: skip
        write_atomic(_file(home, name), card.canonical)
    log.info("model_imported", model=name, stages=spec.stages, params=card.params)
    return card


def known_models(home: Home) -> list[ModelCard]:
    """By name. Damaged cards are named in the log and passed over."""
    found = []
    for file in sorted(_folder(home).glob("*.json")):
        try:
            found.append(_read(file))
        except (OSError, Invalid) as error:
            log.warning("model_card_unreadable", file=str(file), reason=str(error))
    return found


def find_model(home: Home, what: str) -> ModelCard:
    """By its name, or the first digits of its digest. Raises `Missing` unless exactly one fits."""
    found = [card for card in known_models(home) if card.name == what or (what and card.digest.startswith(what))]
    if len(found) != 1:
        raise Missing(f"{len(found)} models here are called {what[:80]!r}: `tessera models list` shows them")
    return found[0]


def remove_model(home: Home, name: str) -> ModelCard:
    """Forget a model and drop its files, but for what another one shares."""
    card = find_model(home, name)
    _file(home, card.name).unlink()
    shared = {blob for other in known_models(home) for blob in other.blobs}
    blobs = BlobStore(home.blobs)
    for blob in card.blobs:
        if blob not in shared:
            blobs.remove(blob)
    return card


def model_tokenizer(blobs: BlobStore, card: ModelCard) -> PlainTokenizer:
    """Raises: Missing when its file is not here; Invalid when it is damaged."""
    return PlainTokenizer(blobs.path(parse_blob_id(card.tokenizer)).read_bytes(), card.facts)


def export_model(home: Home, card: ModelCard, folder: Path) -> None:
    """Write a model back as a checkpoint folder. Raises: as `export_plain`."""
    blobs = BlobStore(home.blobs)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **card.named}
    if card.begins is not None:
        config["add_bos_token"] = card.begins
    files = {"tokenizer.json": blobs.path(parse_blob_id(card.tokenizer)).read_bytes()}
    if card.template:
        files["chat_template.jinja"] = card.template.encode()
    files["tokenizer_config.json"] = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"

    def stage(number: int) -> dict[str, Any]:
        file = blobs.path(BlobId(card.stages[number].blob))
        return dict(load_stage(card.spec, number, file).named_parameters())

    export_plain(card.spec, stage, folder, ends=card.ends, files=files)


# --- inside -----------------------------------------------------------------------------------------------------------


def _keep_stage(blobs: BlobStore, folder: PlainFolder, spec: ModelSpec, stage: int, work: Path) -> StageFile:
    """One stage as a blob. Its file is written beside the blobs and goes again: a blob is a copy."""
    params = folder.stage(spec, stage)
    size = sum(tensor.nbytes for tensor in params.values())
    free = shutil.disk_usage(work).free
    if free < 2 * size:
        need = f"{2 * size / 1e9:.1f} GB of disk while it is written"
        raise Unavailable(f"stage {stage} needs {need}, {free / 1e9:.1f} GB are free in {work}")
    with tempfile.TemporaryDirectory(dir=work, prefix=_WORK) as temporary:
        file = Path(temporary) / "stage"
        try:
            write_stage(params, file)
        except OSError as error:
            raise Unavailable(f"cannot write stage {stage} in {work}: {error.strerror or error}") from error
        count = sum(tensor.numel() for tensor in params.values())
        return StageFile(blob=blobs.put(file), size_bytes=file.stat().st_size, params=count)


def _tokenizer_facts(folder: PlainFolder) -> TokenizerFacts:
    template = ""
    if (folder.path / "chat_template.jinja").exists():
        try:
            template = folder.read("chat_template.jinja", 4 * TEMPLATE_LIMIT).decode()
        except UnicodeDecodeError as error:
            raise Invalid(f"chat_template.jinja is no text: {error}") from error
    if not (folder.path / "tokenizer_config.json").exists():
        return TokenizerFacts(template=template)
    return TokenizerFacts.read(folder.read("tokenizer_config.json", TOKENIZER_CONFIG_LIMIT), template)


def _ends(folder: PlainFolder, tokenizer: PlainTokenizer) -> tuple[int, ...]:
    """The tokens that end a text: of generation_config.json, else of config.json; and the tokenizer's own."""
    said: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if not said and (folder.path / name).exists():
            value = read_json(folder.read(name, CONFIG_LIMIT), name).get("eos_token_id")
            said = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(token) is int and 0 <= token < folder.config.model.vocab_size for token in said):
                raise Invalid(f"{name}'s eos_token_id is {str(value)[:60]}: expected tokens of the vocabulary")
    own = tokenizer.token(tokenizer.facts.named.get("eos_token", ""))
    ends = tuple(dict.fromkeys([*said, *([] if own is None else [own])]))
    if len(ends) > MAX_ENDS:
        raise Invalid(f"{len(ends)} tokens end a text: at most {MAX_ENDS} expected")
    return ends


def _read(file: Path) -> ModelCard:
    if file.stat().st_size > CARD_LIMIT:
        raise Invalid(f"{file} has over {CARD_LIMIT} bytes")
    return ModelCard.parse(file.read_bytes())


def _file(home: Home, name: str) -> Path:
    return _folder(home) / f"{name}.json"


def _folder(home: Home) -> Path:
    folder = home.path / "models"
    folder.mkdir(exist_ok=True)
    return folder

"""Writing a model in plain form, one stage at a time, so that other programs can hold it.

What has a plain form: every model whose stages send the stream itself (`dense`), a model in one stage, and `reparam`
and `ssn`, whose fixed token table and basis are folded into the embedding and the output matrices. What has none is
refused: a learned code with a token table at every stage (`codec`, and `control`, which has the tables alone) is added
between layers, and a trained convolution or table of pairs at the entry looks at several tokens at once; no other
program knows either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tessera.core.errors import Conflict, Invalid, Unavailable
from tessera.models.codec import shared_basis
from tessera.models.config import ModelSpec
from tessera.models.noise import symmetric
from tessera.models.plain import write_config
from tessera.models.plain_tensors import HEAD, stage_pieces

__all__ = ["check_plain", "export_plain", "plain_params"]

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def check_plain(spec: ModelSpec) -> None:
    """Raises: Invalid: saying why the model has no plain form."""
    kind = spec.codec.kind
    if spec.stages > 1 and kind in ("codec", "control"):
        what = "a learned code crosses its boundaries and " if kind == "codec" else ""
        raise Invalid(f"{what}every stage adds a token table of its own ({kind}): other programs have no counterpart")
    write_config(spec.model, tied=False, dtype="float32")


def plain_params(spec: ModelSpec, stage: int, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stage's parameters with everything folded in that a plain model has no place for.

    Raises: Invalid: something can not be folded.
    """
    kind, folded = spec.codec.kind, dict(params)
    for name in [name for name in params if name.startswith("codecs.")]:
        part = name.rpartition(".")[2]
        if part in ("taps", "pairs"):
            if bool(folded.pop(name).any()):
                raise Invalid(f"{name} was trained: the model looks at several tokens before its first layer")
        elif part != "rows":
            raise Invalid(f"{name} has no counterpart in a plain model")
    if not spec.codec.subspace:
        return folded
    basis_Dk = shared_basis(spec)
    if stage == 0:
        m, rows = spec.model, folded.pop(f"codecs.{stage}.rows")
        fixed = torch.from_numpy(symmetric((m.vocab_size, m.width), m.table_std, spec.seed, "table"))
        folded[f"codecs.{stage}.table.rows"] = fixed + (rows if kind == "ssn" else rows @ basis_Dk.T)
    if kind == "reparam" and stage < spec.stages - 1:
        for name in [name for name in params if name.endswith((".out", ".down"))]:
            folded[name] = basis_Dk @ folded[name]
    return folded


def export_plain(
    spec: ModelSpec,
    stage: Callable[[int], Mapping[str, Tensor]],
    folder: Path,
    *,
    ends: tuple[int, ...] = (),
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the model into `folder`, which is made and must be new or empty.

    Args:
        stage: gives a stage's parameters by our names; called once for each, in order.
        ends: tokens that end a text.
        files: more files of the folder, such as the tokenizer's.

    Raises: Invalid: the model has no plain form; Conflict: the folder holds something; Unavailable: the disk refuses.
    """
    check_plain(spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise Conflict(f"{folder} holds something already: give a new folder")
        tied, dtype, where, size = _write_params(spec, stage, folder)
        config = write_config(spec.model, tied=tied, dtype=dtype, ends=ends)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        generation = {"eos_token_id": list(ends) or None}
        for name, value in (("model.safetensors.index.json", index), ("generation_config.json", generation)):
            (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
        for name, data in (files or {}).items():
            (folder / name).write_bytes(data)
        (folder / "config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n"
        )  # last: now it is whole
    except OSError as error:
        raise Unavailable(f"cannot write {folder}: {error.strerror or error}") from error


def _write_params(
    spec: ModelSpec, stage: Callable[[int], Mapping[str, Tensor]], folder: Path
) -> tuple[bool, str, dict[str, str], int]:
    """(whether the head is the token table, type of the matrices, file of each tensor, bytes of all)."""
    where: dict[str, str] = {}
    size, table, tied, dtype = 0, b"", False, ""
    for number in range(spec.stages):
        params = plain_params(spec, number, stage(number))
        if number == 0:
            rows = params["codecs.0.table.rows"]
            table, dtype = _digest(rows), _NAMES[rows.dtype]
        name = f"model-{number + 1:05d}-of-{spec.stages:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for ours, pieces in stage_pieces(spec, number, tied=False).items():
            parts = params[ours].detach().split_with_sizes([piece.shape[0] for piece in pieces])
            tensors |= {piece.name: part.contiguous() for piece, part in zip(pieces, parts, strict=True)}
        if HEAD in tensors and (tied := _digest(tensors[HEAD]) == table):
            del tensors[HEAD]
        safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    return tied, dtype, dict(sorted(where.items())), size


def _digest(tensor: Tensor) -> bytes:
    numbers = tensor.detach().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(numbers.data).digest()  # of the memory itself: a table may be gigabytes

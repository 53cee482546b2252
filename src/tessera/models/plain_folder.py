"""A checkpoint folder in plain form, read lazily: safetensors in one file or in several with an index.

Opening it reads headers only. A stage's parameters are read when they are asked for, one tensor after another, from the
files that hold them: a machine that takes one stage of a large model never has the rest in memory. Pickled params are
refused, because unpickling runs code; names in the index are file names and no paths; what is in the files is compared
with what the config promises before a number is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.config import CodecConfig, ModelSpec
from tessera.models.plain import CONFIG_LIMIT, PlainConfig, read_config, read_json
from tessera.models.plain_tensors import HEAD, Piece, number_type, stage_pieces

__all__ = ["Compute", "PlainFolder"]

Compute = Literal["", "float32", "bfloat16"]  # "": bfloat16 where the checkpoint's matrices are, else float32
INDEX_LIMIT = 64 << 20  # bytes
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FLOATS = ("F32", "F16", "BF16")
_KNOWN_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # old files hold it; it is computed


@dataclass(frozen=True, slots=True)
class _Found:
    """Where a tensor lies."""

    file: str
    shape: tuple[int, ...]
    kind: str  # as safetensors names its type


class PlainFolder:
    """The checkpoint in the folder `path`.

    Args:
        context, compute: as `read_config`.

    Raises: Invalid: naming what is missing, of another shape, of another type, unexpected or not readable.
    """

    def __init__(self, path: Path, *, context: int = 0, compute: Compute = "") -> None:
        if not path.is_dir():
            raise Invalid(f"{path} is not a folder: a checkpoint is a folder with config.json and safetensors")
        self.path = path
        config = self.read("config.json", CONFIG_LIMIT)
        self._found = self._tensors()
        if not compute:
            first = self._found.get("model.layers.0.self_attn.q_proj.weight")
            compute = "bfloat16" if first is not None and first.kind == "BF16" else "float32"
        self.config: PlainConfig = read_config(config, context=context, compute=compute)
        self._check(self.spec(1, CodecConfig(kind="dense", wire="float32", conv=False)))

    @property
    def size_bytes(self) -> int:
        """Of all files with params."""
        return sum((self.path / name).stat().st_size for name in {found.file for found in self._found.values()})

    def spec(self, stages: int, codec: CodecConfig) -> ModelSpec:
        """The model cut into `stages`. Raises: Invalid: more stages than layers."""
        if not 1 <= stages <= self.config.model.layers:
            raise Invalid(f"a model of {self.config.model.layers} layers has 1 to as many stages, not {stages}")
        return ModelSpec(model=self.config.model, codec=codec, stages=stages)

    def stage(self, spec: ModelSpec, stage: int) -> dict[str, Tensor]:
        """The parameters of one stage, by our names. Reads the files that hold them, and nothing else.

        Raises: Invalid: a file that cannot be read, or numbers that are not finite.
        """
        params: dict[str, Tensor] = {}
        for name, pieces in stage_pieces(spec, stage, tied=self._tied).items():
            kind = number_type(name, spec.model)
            whole = torch.empty((sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:]), dtype=kind)
            start = 0
            for piece in pieces:
                rows = whole[start : start + piece.shape[0]]
                rows.copy_(self._read(piece))
                if not bool(torch.isfinite(rows).all()):
                    raise Invalid(f"{piece.name} holds numbers that are not finite in {kind}")
                start += piece.shape[0]
            params[name] = whole
        return params

    def read(self, name: str, limit: int) -> bytes:
        """A small file of the folder. Raises: Invalid: missing or larger than `limit` bytes."""
        try:
            with (self.path / name).open("rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise Invalid(f"cannot read {name} in {self.path}: {error.strerror}") from error
        if len(data) > limit:
            raise Invalid(f"{name} has more than {limit} bytes")
        return data

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _tied(self) -> bool:
        return self.config.tied

    def _tensors(self) -> dict[str, _Found]:
        files, promised = self._files()
        found: dict[str, _Found] = {}
        for name in files:
            with self._open(name) as file:
                for key in file.keys():  # noqa: SIM118  it is no dict
                    if key in found:
                        raise Invalid(f"{key[:100]} lies in {found[key].file} and in {name}")
                    part = file.get_slice(key)
                    found[key] = _Found(name, tuple(part.get_shape()), str(part.get_dtype()))
        for key, name in promised.items():
            if key not in found or found[key].file != name:
                raise Invalid(f"{_INDEX} says that {key[:100]} lies in {name}: it does not")
        return found

    def _files(self) -> tuple[list[str], dict[str, str]]:
        """The files with params, and what the index promises of them."""
        if (self.path / _INDEX).exists():
            index = read_json(self.read(_INDEX, INDEX_LIMIT), _INDEX).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise Invalid(f"{_INDEX} has no weight_map")
            for name in index.values():
                if not isinstance(name, str) or _FILE.fullmatch(name) is None:
                    raise Invalid(f"{_INDEX} names {str(name)[:100]!r}: expected a safetensors file of this folder")
            return sorted(set(index.values())), index
        if (self.path / _SINGLE).exists():
            return [_SINGLE], {}
        if any(next(self.path.glob(pattern), None) for pattern in _PICKLED):
            raise Invalid(f"{self.path} holds pickled params, which may run code when read: convert to safetensors")
        raise Invalid(f"{self.path} holds neither {_SINGLE} nor {_INDEX}")

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        try:
            with safetensors.safe_open(self.path / name, framework="pt") as file:
                yield file
        except (safetensors.SafetensorError, OSError) as error:
            raise Invalid(f"cannot read {name} in {self.path}: {error}") from error

    def _read(self, piece: Piece) -> Tensor:
        with self._open(self._found[piece.name].file) as file:
            tensor: Tensor = file.get_tensor(piece.name)
        if tuple(tensor.shape) != piece.shape:
            raise Invalid(f"{piece.name} has changed since the folder was opened")
        return tensor

    def _check(self, spec: ModelSpec) -> None:
        expected = {p.name: p for pieces in stage_pieces(spec, 0, tied=self._tied).values() for p in pieces}
        for name, piece in expected.items():
            there = self._found.get(name)
            if there is None:
                raise Invalid(f"{name} is missing in {self.path}")
            if there.kind not in _FLOATS:
                raise Invalid(f"{name} is in {there.kind}: quantised params are not read, only {', '.join(_FLOATS)}")
            if there.shape != piece.shape:
                raise Invalid(f"{name} has the shape {there.shape}, config.json says {piece.shape}")
        extra = sorted(self._found.keys() - expected.keys() - ({HEAD} if self._tied else set()))
        extra = [name for name in extra if _KNOWN_BUFFER.fullmatch(name) is None]
        if extra:
            raise Invalid(f"{self.path} holds {extra[0][:100]}, which no part of the model uses")

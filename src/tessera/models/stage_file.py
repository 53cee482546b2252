"""A stage's parameters as a file, to serve from: safetensors, mapped into memory and not read before it is used.

Unlike a trainer's checkpoint it holds no optimiser state, and matrices may be bfloat16. What it is of is not in it: a
`ModelCard` names each stage's file by its hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.config import ModelSpec
from tessera.models.plain_tensors import number_type
from tessera.models.stage import Stage

__all__ = ["load_stage", "write_stage"]


def write_stage(params: Mapping[str, Tensor], file: Path) -> None:
    """Equal parameters give equal bytes. Raises: OSError: the disk does not take it."""
    safetensors.torch.save_file({name: params[name].contiguous() for name in sorted(params)}, file)


def load_stage(spec: ModelSpec, stage: int, file: Path, *, device: str = "cpu") -> Stage:
    """The stage whose parameters lie in `file`, ready to decode and with no gradients.

    Raises: Invalid: the file cannot be read, or holds other tensors than the stage has.
    """
    with torch.device("meta"):
        blank = Stage(spec, stage)
    expected = {name: tuple(parameter.shape) for name, parameter in blank.named_parameters()}
    try:
        with safetensors.safe_open(file, framework="pt", device=device) as found:
            names = set(found.keys())
            if names != expected.keys():
                odd = sorted(names ^ expected.keys())[0]
                raise Invalid(f"stage {stage} does not fit its file: {odd[:100]} is missing or unexpected")
            params = {name: found.get_tensor(name) for name in sorted(names)}
    except (safetensors.SafetensorError, OSError) as error:
        raise Invalid(f"cannot read stage {stage} from {file}: {error}") from error
    for name, tensor in params.items():
        kind = number_type(name, spec.model)
        if tuple(tensor.shape) != expected[name] or tensor.dtype != kind:
            raise Invalid(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {expected[name]} {kind}")
    blank.load_state_dict(params, assign=True)
    return blank.requires_grad_(False).to(device).eval()

"""What a parameter starts with: numbers that follow from the run's seed, or none where a stage is to be filled."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.models.noise import symmetric

__all__ = ["initial"]


def initial(shape: tuple[int, ...], std: float, seed: int, name: str) -> Tensor:
    """Equal on every machine for an equal name. Under `torch.device("meta")` a shape alone, which takes no memory."""
    if torch.get_default_device().type == "meta":
        return torch.empty(shape)
    return torch.from_numpy(symmetric(shape, std, seed, name))

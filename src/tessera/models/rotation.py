r"""Turning a boundary: two shards that fit stop fitting shards of another time, and the model stays what it is.

A codec's boundary sends c = Eᵀ (y - K) and decodes D c. With any orthogonal R [k, k], known to both owners alone,

    E ← E R     D ← D R     so that     D R (E R)ᵀ = D Eᵀ

and the function is unchanged, up to the rounding of codes, which now happens along other axes. Adam's first moment is a
mean of gradients, and turns like its parameter: m ← m R, exactly. The second moment does not turn: it is the diagonal
of E[gᵀ g], and the diagonal of Rᵀ E[gᵀ g] R needs the rest of that matrix too. We take it to be diagonal,

    v ← v (R ∘ R)          R ∘ R: every row and column sums to 1, so v stays ≥ 0 and keeps its sum,

which is right when the gradient's k components are uncorrelated. Products run in float64: 1,000 turns add up to 1,000
roundings of E and D to float32, and two machines of a stage's replicas differ in about one entry in 10^8 of one turn.

After Unextractable Protocol Models (arXiv 2605.23464), which turns the whole width. What it protects from, and what it
does not, is measured by `benchmarks/bench_stitching.py`: it is not much.

Legend: D width, k code width.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tessera.core.encoding import encode
from tessera.core.errors import Invalid
from tessera.core.ids import RunId

__all__ = ["SECRET_BYTES", "boundary_rotation", "check_rotation", "turned"]

SECRET_BYTES = 32
_ORTHOGONAL = 1e-9  # largest entry of RᵀR - 1; a float64 factorisation is off by about 1e-15


def boundary_rotation(secret: bytes, run: RunId, boundary: int, epoch: int, k: int) -> Float[Tensor, "k k"]:
    """The orthogonal matrix of one boundary and epoch, in float64: the same for everybody who knows `secret`.

    SHAKE-256 of secret and name gives the entries of a matrix, uniform in [-1, 1); the Q of its QR factorisation, with
    R's diagonal made positive, is the rotation. One epoch's matrix tells nothing about another's.

    Raises: Invalid: a secret of another size than 32 bytes, or a code of no numbers.

    Cost: O(k³); 1 ms at k = 64.
    """
    if len(secret) != SECRET_BYTES:
        raise Invalid(f"a boundary's secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if k < 1:
        raise Invalid(f"a code has at least one number to turn, not {k}")
    name = encode(["tessera/rotation/1", run, boundary, epoch, k])
    words = np.frombuffer(hashlib.shake_256(secret + name).digest(4 * k * k), "<u4")
    q, r = np.linalg.qr(words.reshape(k, k).astype(np.float64) * 2.0**-31 - 1.0)
    return torch.from_numpy(q * np.where(np.diag(r) < 0, -1.0, 1.0))


def check_rotation(rotation: Tensor, k: int) -> None:
    """Raises: Invalid: not k × k float64 numbers, or not orthogonal."""
    if rotation.shape != (k, k) or rotation.dtype != torch.float64:
        raise Invalid(f"a rotation is {k} x {k} torch.float64, not {tuple(rotation.shape)} {rotation.dtype}")
    off = float((rotation.T @ rotation - torch.eye(k, dtype=torch.float64)).abs().max())
    if not off <= _ORTHOGONAL:
        raise Invalid(f"a rotation is orthogonal to {_ORTHOGONAL}, this matrix to {off:.1e}")


@torch.no_grad()
def turned(name: str, state: Tensor, rotation: Tensor) -> Tensor:
    """A state tensor of an encoder [k, D] or decoder [D, k] after the turn.

    Args:
        name: as in `StageOptimizer.state_dict` and checkpoints: `adam.exp_avg_sq.` is a second moment, everything else
            turns like the parameter; the last part says which end it is.
        rotation: [k, k], float64.
    """
    turn = rotation.square() if name.startswith("adam.exp_avg_sq.") else rotation
    wide = state.to("cpu", torch.float64)  # not every device knows float64, and one place rounds alike for all
    return (turn.T @ wide if name.endswith(".encode") else wide @ turn).to(state.device, state.dtype)

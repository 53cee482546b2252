"""The optimiser of one stage: Muon for hidden matrices, AdamW for tables, head, codes and gains.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix' Nesterov momentum by the
nearest semi-orthogonal matrix, found with a few Newton-Schulz iterations. Fused matrices are treated as the
matrices that they stand for. Every rate follows one schedule: linear warm-up, then linear decay to zero at the last
step; so the number of steps is part of the run. State is a flat dict of tensors, named after the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from tessera.core.errors import Conflict, Invalid
from tessera.models.codec import shared_basis
from tessera.models.config import OptimizerConfig
from tessera.models.stage import Stage

__all__ = ["Muon", "Pieces", "StageOptimizer", "newton_schulz", "schedule"]

_MATRICES = ("qkv", "out", "gate_up", "down")
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0; singular values end in about [0.7, 1.2]


def schedule(step: int, steps: int, warmup: int) -> float:
    """The factor on every rate at `step` of `steps`, counted from 0."""
    return min(1.0, (step + 1) / warmup) * (1.0 - step / steps)


@torch.no_grad()
def newton_schulz(x: Tensor, iterations: int, low: bool = False) -> Tensor:
    """About U Vᵀ of each x = U S Vᵀ in a batch [n, rows, columns] with rows ≤ columns."""
    a, b, c = _COEFFICIENTS
    y = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    y = y.to(torch.bfloat16) if low else y
    for _ in range(iterations):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.to(torch.float32)


class Pieces(Protocol):
    """How matrices are put together that lie on several devices, a piece of the rows on each."""

    def whole(self, name: str, own: Tensor) -> Tensor: ...
    def own(self, name: str, whole: Tensor) -> Tensor: ...


class Muon:
    """Momentum, orthogonalised. Matrices of one shape are handled in one batch, those in pieces one by one."""

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        fused_rows: dict[str, tuple[int, ...]],
        config: OptimizerConfig,
        low: bool,
        pieces: Pieces | None = None,
    ) -> None:
        self._config, self.named, self._low, self._pieces = config, named, low, pieces
        self._rows = {name: fused_rows.get(name, ()) for name in named}
        self.momentum = {name: torch.zeros_like(p) for name, p in named.items()}

    @torch.no_grad()
    def step(self, step: int, factor: float) -> None:
        """Moves every matrix. `factor` is the schedule's, `step` warms the momentum up."""
        c = self._config
        warm = min(1.0, step / c.momentum_warmup)
        momentum = c.momentum_start + (c.momentum - c.momentum_start) * warm
        rate = c.muon_rate * factor
        batches: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        grads, buffers = [_gradient(n, p) for n, p in self.named.items()], list(self.momentum.values())
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        torch._foreach_mul_(list(self.named.values()), 1 - rate * c.muon_decay)
        updates = torch._foreach_lerp(grads, buffers, momentum)
        for (name, parameter), nesterov in zip(self.named.items(), updates, strict=True):
            if self._pieces is not None:
                whole = self._turned(self._pieces.whole(name, nesterov), self._rows[name])
                parameter.add_(self._pieces.own(name, whole), alpha=-rate)
                continue
            rows = self._rows[name] or (parameter.size(0),)
            for target, update in zip(parameter.split_with_sizes(rows), nesterov.split_with_sizes(rows), strict=True):
                small, large = sorted(target.shape)
                batches.setdefault((small, large), []).append((target, update))
        for pairs in batches.values():
            self._apply(pairs, rate)

    def _turned(self, whole: Tensor, rows: tuple[int, ...]) -> Tensor:
        """The update of one matrix, or of the matrices fused in it, before the rate."""
        turned = []
        for part in whole.split_with_sizes(rows or (whole.size(0),)):
            tall = part.size(0) > part.size(1)
            y = newton_schulz((part.mT if tall else part)[None], self._config.newton_schulz, self._low)[0]
            turned.append((y.mT if tall else y) * max(1.0, part.size(0) / part.size(1)) ** 0.5)
        return torch.cat(turned)

    def _apply(self, pairs: list[tuple[Tensor, Tensor]], rate: float) -> None:
        wide = torch.stack([u.mT if u.size(0) > u.size(1) else u for _, u in pairs])
        for (target, _), y in zip(pairs, newton_schulz(wide, self._config.newton_schulz, self._low), strict=True):
            tall = target.size(0) > target.size(1)
            scale = max(1.0, target.size(0) / target.size(1)) ** 0.5
            target.add_(y.mT if tall else y, alpha=-rate * scale)


class StageOptimizer:
    """Both optimisers over one stage's parameters and a run of `steps` steps.

    Args:
        named: stand for the stage's own parameters, when only pieces of those lie here; then `pieces` joins them.
    """

    def __init__(
        self,
        stage: Stage,
        steps: int,
        *,
        named: Mapping[str, nn.Parameter] | None = None,
        pieces: Pieces | None = None,
    ) -> None:
        if steps < 1:
            raise Invalid(f"a run has at least one step, not {steps}")
        self.steps = steps
        self.config = config = stage.spec.optimizer
        named = dict(stage.named_parameters()) if named is None else dict(named)
        matrices = {n: p for n, p in named.items() if n.startswith("layers.") and n.rsplit(".", 1)[1] in _MATRICES}
        self._muon = Muon(matrices, stage.fused_rows(), config, stage.spec.model.compute == "bfloat16", pieces)
        self._others = {n: p for n, p in named.items() if n not in matrices}
        alike: dict[tuple[float, float], list[nn.Parameter]] = {}  # one call for each group, not for each parameter
        for name, parameter in self._others.items():
            alike.setdefault(_rate(name, config), []).append(parameter)
        groups = [{"params": ps, "lr": rate, "peak": rate, "weight_decay": d} for (rate, d), ps in alike.items()]
        self._adam = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
        self._parameters = list(named.values())
        held = stage.spec.codec.kind == "ssn" and not stage.last
        self._basis = shared_basis(stage.spec).to(stage.device) if held else None
        self._pieces = pieces

    @torch.no_grad()
    def step(self, step: int, tokens: int, sums: Mapping[str, Tensor] | None = None) -> None:
        """One step from gradients that are sums over `tokens` tokens. Clears them.

        Args:
            sums: by name, of every parameter, in place of those that backward passes left here. Overwritten.

        Raises: Conflict: the run has no step `step`, or a parameter has no gradient.
        """
        if step >= self.steps:
            raise Conflict(f"the run of {self.steps} steps is over")
        for name, gradient in ({} if sums is None else sums).items():
            (self._others if name in self._others else self._muon.named)[name].grad = gradient
        gradients = [_gradient(name, p) for name, p in self._others.items()]
        gradients += [_gradient(name, p) for name, p in self._muon.named.items()]
        torch._foreach_mul_(gradients, 1.0 / tokens)
        factor = schedule(step, self.steps, self.config.warmup)
        for group in self._adam.param_groups:
            group["lr"] = group["peak"] * factor
        self._adam.step()
        self._muon.step(step, factor)
        if self._basis is not None:
            self._project(self._basis)
        self.clear()

    def _project(self, basis_Dk: Tensor) -> None:
        """Back onto span(U): the columns of the layers' output matrices, and the rows of the token table."""
        for name, parameter in self._muon.named.items():
            if name.endswith((".out", ".down")):
                whole = parameter if self._pieces is None else self._pieces.whole(name, parameter)
                whole = basis_Dk @ (basis_Dk.T @ whole)
                parameter.copy_(whole if self._pieces is None else self._pieces.own(name, whole))
        for name, parameter in self._others.items():
            if name.endswith(".rows"):
                parameter.copy_(parameter @ basis_Dk @ basis_Dk.T)

    def clear(self) -> None:
        """Forgets all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Flat; the same keys from the first step on."""
        state = {f"muon.{name}": buffer for name, buffer in self._muon.momentum.items()}
        for name, parameter in self._others.items():
            for key, value in self._adam_state(parameter).items():
                state[f"adam.{key}.{name}"] = value
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over tensors whose names and shapes the caller has compared with `state_dict()`."""
        for name, buffer in self._muon.momentum.items():
            buffer.copy_(state[f"muon.{name}"])
        for name, parameter in self._others.items():
            own = self._adam_state(parameter)
            for key, value in own.items():
                value.copy_(state[f"adam.{key}.{name}"])
            self._adam.state[parameter] = own

    def _adam_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's own entry, or the one that it would start with."""
        entry = self._adam.state.get(parameter)
        if entry:
            return dict(entry)
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def _rate(name: str, config: OptimizerConfig) -> tuple[float, float]:
    """(peak rate, weight decay) of a parameter that is no hidden matrix."""
    last = name.rsplit(".", 1)[-1]
    if last == "head":
        return config.head_rate, config.adam_decay
    if last in ("rows", "taps", "pairs"):
        return config.table_rate, config.adam_decay
    if last in ("encode", "decode"):
        return config.code_rate, 0.0
    if last.endswith(("gain", "bias")):
        return config.gain_rate, 0.0
    raise RuntimeError(f"no rate is chosen for the parameter {name}")


def _gradient(name: str, parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise Conflict(f"{name} has no gradient: no microbatch went through this stage in this step")
    return parameter.grad

"""Where a stage's numbers lie when several processes share it: a copy on each, or a piece of every tensor on each.

    Replicas   parameters and optimiser on every rank; gradients are summed once a step (what DDP does)
    Shards     FSDP2's `fully_shard`: each rank owns a part of the rows of every tensor, of its gradient and of its
               optimiser state; a layer is put together for as long as it computes

Muon turns whole matrices, so in a sharded stage each is put together for its update, one at a time. States leave and
enter whole, by way of rank 0's RAM: a checkpoint looks the same whatever the number of ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tessera.models.optim import StageOptimizer
from tessera.models.parallel_link import RankLink
from tessera.models.stage import Stage

__all__ = ["Replicas", "Shards", "piece"]

BUCKET = 8 * 2**20  # numbers that are summed at once


def piece(rows: int, rank: int, size: int) -> slice:
    """The rows of a tensor that lie on `rank`, as FSDP2 cuts them: ceil(rows / size) each, the last ones fewer."""
    each = -(-rows // size)
    return slice(min(rows, rank * each), min(rows, (rank + 1) * each))


class Replicas:
    """A copy of everything on each rank. They stay equal, because all make the same step from the same sums."""

    def __init__(self, stage: Stage, steps: int, link: RankLink) -> None:
        self._link = link
        self.stage = stage.to(link.device)
        self.optimizer = StageOptimizer(self.stage, steps)

    def before_step(self) -> None:
        self._sum_all([p.grad for p in self.stage.parameters() if p.grad is not None])

    def gradients(self) -> dict[str, Tensor]:
        named = self.stage.named_parameters()
        own = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}
        self._sum_all(list(own.values()))
        return own

    def _sum_all(self, gradients: list[Tensor]) -> None:
        """Each becomes the sum over all ranks."""
        bucket: list[Tensor] = []
        for gradient in gradients:
            bucket.append(gradient)
            if sum(g.numel() for g in bucket) >= BUCKET:
                _sum(bucket)
                bucket = []
        if bucket:
            _sum(bucket)

    def after_use(self) -> None:
        return

    def clear(self) -> None:
        self.optimizer.clear()

    def total(self, value: float) -> float:
        return self._link.total(value)

    def whole(self, name: str, own: Tensor) -> Tensor:
        return own

    def own(self, name: str, own: Tensor, whole: Tensor | None) -> Tensor:
        data = torch.empty(own.shape, dtype=own.dtype) if whole is None else whole.to("cpu").contiguous()
        self._link.broadcast(data)
        return data

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.stage.named_parameters()}

    def shape(self, name: str, own: Tensor) -> torch.Size:
        return own.shape


class Shards:
    """FSDP2 around each layer and the rest. `optimizer` works on the pieces that lie here."""

    def __init__(self, stage: Stage, steps: int, link: RankLink) -> None:
        self._link, self.stage = link, stage
        self._shapes = {name: parameter.shape for name, parameter in stage.named_parameters()}
        mesh = init_device_mesh(torch.device(link.device).type, (link.world.size,))
        for layer in stage.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(stage, mesh=mesh)
        self._modules = [module for module in stage.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)  # sums, not means: the step divides by its tokens
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        self._pieces = {name: nn.Parameter(_local(p)) for name, p in stage.named_parameters()}
        self.optimizer = StageOptimizer(stage, steps, named=self._pieces, pieces=_Gathered(self._shapes, link))

    def before_step(self) -> None:
        """FSDP2 summed the gradients after each backward; here the optimiser's pieces get theirs."""
        for name, parameter in self.stage.named_parameters():
            self._pieces[name].grad = None if parameter.grad is None else _local(parameter.grad)
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return {
            n: torch.zeros_like(self._pieces[n]) if p.grad is None else _local(p.grad)
            for n, p in self.stage.named_parameters()
        }

    def after_use(self) -> None:
        """Parameters that were put together hide what the next step or a checkpoint writes into the pieces."""
        for module in self._modules:
            module.reshard()

    def clear(self) -> None:
        self.stage.zero_grad(set_to_none=True)
        self.optimizer.clear()

    def total(self, value: float) -> float:
        return self._link.total(value)

    def whole(self, name: str, own: Tensor) -> Tensor:
        """In rank 0's RAM; elsewhere what lies there."""
        if own.dim() == 0:
            return own
        if self._link.world.rank > 0:
            self._link.send(own, 0)
            return own
        shape = self.shape(name, own)
        return torch.cat([own.to("cpu"), *(self._take(shape, own, rank) for rank in self._others())])

    def own(self, name: str, own: Tensor, whole: Tensor | None) -> Tensor:
        if own.dim() == 0:
            data = torch.empty((), dtype=own.dtype) if whole is None else whole.to("cpu").clone()
            self._link.broadcast(data)
            return data
        if whole is None:
            return self._link.receive(tuple(own.shape), own.dtype, 0)
        size = self._link.world.size
        for rank in self._others():
            self._link.send(whole[piece(whole.size(0), rank, size)], rank)
        return whole[piece(whole.size(0), 0, size)]

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._pieces.items()}

    def shape(self, name: str, own: Tensor) -> torch.Size:
        """Of the whole. A state tensor has its parameter's shape, except for AdamW's counter."""
        return own.shape if own.dim() == 0 else next(s for n, s in self._shapes.items() if name.endswith(f".{n}"))

    def _take(self, shape: torch.Size, own: Tensor, rank: int) -> Tensor:
        rows = piece(shape[0], rank, self._link.world.size)
        return self._link.receive((rows.stop - rows.start, *shape[1:]), own.dtype, rank)

    def _others(self) -> range:
        return range(1, self._link.world.size)


class _Gathered:
    """Matrices put together on every rank, for Muon."""

    def __init__(self, shapes: dict[str, torch.Size], link: RankLink) -> None:
        self._shapes, self._rank, self._size = shapes, link.world.rank, link.world.size

    def whole(self, name: str, own: Tensor) -> Tensor:
        rows, *rest = self._shapes[name]
        each = -(-rows // self._size)
        padded = own.new_zeros((each, *rest))
        padded[: own.size(0)] = own
        pieces = [torch.empty_like(padded) for _ in range(self._size)]
        dist.all_gather(pieces, padded)
        return torch.cat(pieces)[:rows]

    def own(self, name: str, whole: Tensor) -> Tensor:
        return whole[piece(whole.size(0), self._rank, self._size)]


def _local(tensor: Tensor) -> Tensor:
    """The piece that lies here, sharing its storage."""
    if not isinstance(tensor, DTensor):
        raise RuntimeError(f"FSDP2 left a {type(tensor).__name__} where a sharded tensor was expected")
    with torch.no_grad():
        return tensor.to_local().detach()


def _sum(bucket: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    dist.all_reduce(flat)
    for gradient, total in zip(bucket, flat.split_with_sizes([g.numel() for g in bucket]), strict=True):
        gradient.copy_(total.view_as(gradient))

"""Doing one microbatch of one stage again, from its messages and the parameters that its worker had.

A trainer's rounding noise is named by run seed, step, microbatch and boundary, so nothing but kernels and threads can
make a replay differ from the work. No optimiser is built and, unless a sum of gradients is asked for, no gradient of a
parameter is computed: a replay costs about two thirds of the work, and its memory is the parameters and one graph.

Legend: B sequences, T tokens, W message width.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from blake3 import blake3
from jaxtyping import Float
from torch import Tensor

from tessera.core.encoding import encode
from tessera.core.errors import Invalid
from tessera.models.checkpoint import read_checkpoint, write_checkpoint
from tessera.models.config import ModelSpec
from tessera.models.stage import Stage
from tessera.models.trainer import check_ids, receive
from tessera.models.wire import Wire

__all__ = [
    "LOSS_BYTES",
    "Replay",
    "Replayer",
    "Snapshot",
    "pack_gradients",
    "pack_loss",
    "pack_sums",
    "params_digest",
    "unpack_loss",
]


LOSS_BYTES = 8


@dataclass(frozen=True, slots=True)
class Replay:
    """What the microbatch gave. The last stage has a loss and no code, stage 0 no gradient."""

    code_BTW: Float[Tensor, "B T W"] | None  # before rounding
    gradient_BTW: Float[Tensor, "B T W"] | None  # of the message that entered, before rounding
    gradient_noise: tuple[object, ...]  # the name that its rounding has
    loss: float | None  # nats, summed over the microbatch


class Snapshot:
    """A stage's parameters at one moment, copied to memory: what a step began with.

    Cost: one copy and one hash of them; packing waits until somebody asks.
    """

    def __init__(self, stage: Stage) -> None:
        self._facts = _facts(stage.spec, stage.index)
        self.params = {name: p.detach().to("cpu", copy=True) for name, p in stage.named_parameters()}
        self.version = params_digest(self.params)

    def pack(self) -> bytes:
        """A safetensors file that `Replayer` takes."""
        return write_checkpoint({f"params.{name}": tensor for name, tensor in self.params.items()}, self._facts)


class Replayer:
    """Replays microbatches of `stage`. Not safe for use from two threads at once.

    Args:
        params: what `Snapshot.pack` wrote.
        device: a torch device; the worker's may be another.

    Raises: Invalid: no such stage, or bytes that are not its parameters.
    """

    def __init__(self, spec: ModelSpec, stage: int, params: bytes, *, device: str = "cpu") -> None:
        self.spec, self.wire = spec, Wire(spec)
        self.stage = Stage(spec, stage)
        expected = {f"params.{name}": p.detach() for name, p in self.stage.named_parameters()}
        tensors, _ = read_checkpoint(params, expected, _facts(spec, stage))
        self.stage.requires_grad_(False).to(device)
        self._take({name.removeprefix("params."): tensor for name, tensor in tensors.items()})

    def load(self, snapshot: Snapshot) -> None:
        """Replay with these from now on; they are ours, and so of the right shapes."""
        self._take(snapshot.params)

    @torch.no_grad()
    def _take(self, params: Mapping[str, Tensor]) -> None:
        for name, parameter in self.stage.named_parameters():
            parameter.copy_(params[name])
        self.version = params_digest(params)

    def replay(self, step: int, index: int, ids: Any, code_in: bytes | None, gradient_in: bytes | None) -> Replay:
        """Microbatch `index` of `step`, forward and backward.

        Args:
            ids: integers [B, T+1].
            code_in: what entered from the stage before; None on stage 0.
            gradient_in: what entered from the stage after; None on the last one.

        Raises: Invalid: ids or messages that the stage cannot take.
        """
        return self._run(step, index, ids, code_in, gradient_in, backward=not self.stage.first)

    def gradients(
        self, step: int, work: Mapping[int, tuple[Any, bytes | None, bytes | None]]
    ) -> tuple[dict[int, Replay], dict[str, Tensor]]:
        """All microbatches of a worker's step, and his sum of gradients by parameter.

        Args:
            work: ids, code in and gradient in of each microbatch, as for `replay`.
        """
        self.stage.requires_grad_(True)
        self.stage.zero_grad(set_to_none=True)
        try:
            replays = {index: self._run(step, index, *inputs, backward=True) for index, inputs in sorted(work.items())}
            total = {name: _gradient(parameter) for name, parameter in self.stage.named_parameters()}
        finally:
            self.stage.zero_grad(set_to_none=True)
            self.stage.requires_grad_(False)
        return replays, total

    def params(self) -> dict[str, Tensor]:
        """What it replays with, by name. Live."""
        return {name: parameter.detach() for name, parameter in self.stage.named_parameters()}

    def read_gradients(self, data: bytes) -> dict[str, Tensor]:
        """A sum of gradients that `pack_gradients` wrote, by parameter. Raises: Invalid: it is none of this stage."""
        expected: dict[str, Tensor] = {f"gradient.{name}": p for name, p in self.stage.named_parameters()}
        facts = {**_facts(self.spec, self.stage.index), "holds": "gradient"}
        tensors, _ = read_checkpoint(data, expected, facts)
        return {name.removeprefix("gradient."): tensor for name, tensor in tensors.items()}

    def write_gradients(self, gradients: Mapping[str, Tensor]) -> bytes:
        """The other way round."""
        return pack_sums(self.spec, self.stage.index, gradients)

    def _run(
        self, step: int, index: int, ids: Any, code_in: bytes | None, gradient_in: bytes | None, *, backward: bool
    ) -> Replay:
        tokens = check_ids(ids, self.spec)
        shape = tokens.size(0), tokens.size(1) - 1
        if (gradient_in is None) != self.stage.last:
            raise Invalid(f"stage {self.stage.index} of {self.spec.stages}: a gradient enters all stages but the last")
        entered = receive(self.stage, self.wire, code_in, *shape)
        gradient = None if gradient_in is None else self.wire.unpack(gradient_in, *shape).to(self.stage.device)
        if entered is not None:
            entered.requires_grad_(backward)
        tokens = tokens.to(self.stage.device)
        with torch.set_grad_enabled(backward):
            out: Tensor = self.stage(tokens[:, :-1], entered)
            if self.stage.last:
                out = F.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        if backward:
            torch.autograd.backward(out, gradient)
        noise = ("gradient", self.spec.seed, step, index, self.stage.index - 1)
        code, loss = (None, float(out.detach())) if self.stage.last else (out.detach(), None)
        return Replay(code, None if entered is None else entered.grad, noise, loss)


def params_digest(params: Mapping[str, Tensor]) -> bytes:
    """BLAKE3 over every parameter's name, type, shape and bytes, in order of names: what a worker commits to.

    Values decide, not where they lie. Cost: about 1 GB/s on one core, see the docs; SHA-256 needs three times as long.
    """
    hasher = blake3(b"tessera/params/1")
    for name, tensor in sorted(params.items()):
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        head = encode([name, str(flat.dtype).removeprefix("torch."), list(tensor.shape)])
        hasher.update(len(head).to_bytes(4, "big") + head)
        hasher.update(flat.view(torch.uint8).numpy().data)
    return hasher.digest()


def pack_gradients(stage: Stage) -> bytes:
    """The sum of gradients that lies at a stage's parameters before the optimiser's step; zeros where none is."""
    return pack_sums(stage.spec, stage.index, {name: _gradient(p) for name, p in stage.named_parameters()})


def pack_sums(spec: ModelSpec, stage: int, sums: Mapping[str, Tensor]) -> bytes:
    """A sum of gradients by parameter, as `Replayer.read_gradients` takes it."""
    tensors = {f"gradient.{name}": tensor for name, tensor in sums.items()}
    return write_checkpoint(tensors, {**_facts(spec, stage), "holds": "gradient"})


def pack_loss(loss: float) -> bytes:
    """The last stage's message about a microbatch: its summed loss in nats, 8 bytes."""
    return struct.pack(">d", loss)


def unpack_loss(data: bytes) -> float:
    """Raises: Invalid for anything but what `pack_loss` writes."""
    if len(data) != LOSS_BYTES:
        raise Invalid(f"a loss has {LOSS_BYTES} bytes, not {len(data)}")
    return float(struct.unpack(">d", data)[0])


def _facts(spec: ModelSpec, stage: int) -> dict[str, str]:
    return {"spec": spec.digest(), "stage": str(stage), "holds": "params"}


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()

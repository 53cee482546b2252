r"""Replicas that step on their own stay together by averaging a small random part of their state at a time.

    round r, partition P = r mod n:   s = θ[P] is sent;   training goes on;   θ[P] ← θ[P] + mean(s_1 … s_N) − s

(Agora's asynchronous SPARTA.) θ are the parameters and the optimiser's moments, the same entries of each; a partition
is every n-th entry on average, drawn once from the run's seed, so that no index crosses the wire. The difference is
taken against the very numbers that were sent, so rounding on the wire moves nobody as long as all agree.

A message holds, parameter by parameter in the order of their names, its entries in the parameter and in each moment.

Legend: N replicas, D numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.noise import integers
from tessera.models.robust import DistanceHistory, centered_clip
from tessera.models.wire import Number, pack_floats, unpack_floats

__all__ = ["Partitions"]

_NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
_PARAMS = "params."
_MOMENTS = ("muon.", "adam.exp_avg.", "adam.exp_avg_sq.")
_SQUARES = "adam.exp_avg_sq."


class Partitions:
    """Of one stage's state.

    Args:
        layout: names and shapes of the state, as an engine gives it.
        seed: of the run.

    Cost: two bytes of RAM for each parameter, drawn once at the first use: about 1 s for 100 million.
    """

    def __init__(self, layout: Mapping[str, Tensor], seed: int, count: int, number: Number) -> None:
        self.count, self._seed, self._number = count, seed, number
        self._sizes = {n.removeprefix(_PARAMS): layout[n].numel() for n in sorted(layout) if n.startswith(_PARAMS)}
        self._tensors = {
            name: [_PARAMS + name, *(kind + name for kind in _MOMENTS if kind + name in layout)] for name in self._sizes
        }
        self._owner: dict[str, np.ndarray[tuple[int], np.dtype[np.uint16]]] = {}
        self._histories = DistanceHistory()

    def size_bytes(self, round_: int) -> int:
        """Exact bytes of the message of `round_`."""
        entries = (len(index) * len(self._tensors[name]) for name, index in self._indices(round_))
        return sum(entries) * _NUMBER_BYTES[self._number]

    def pack(self, round_: int, state: Mapping[str, Tensor]) -> bytes:
        """This replica's entries. Raises: Invalid: one that is not finite, that is, training diverged."""
        flat = torch.cat([
            state[tensor].detach().flatten()[index.to(state[tensor].device)].to("cpu", torch.float32)
            for name, index in self._indices(round_)
            for tensor in self._tensors[name]
        ])  # fmt: skip
        if not bool(torch.isfinite(flat).all()):
            raise Invalid("the state holds numbers that are not finite: the training diverged, lower its rates")
        return pack_floats(flat, self._number)

    def check(self, round_: int, data: bytes) -> None:
        """Raises: Invalid for bytes that no `pack` writes."""
        self._unpack(round_, data)

    @torch.no_grad()
    def merge(
        self, round_: int, state: Mapping[str, Tensor], own: bytes, others: Sequence[bytes], *, robust: bool
    ) -> None:
        """Moves this replica's entries in `state`, in place, by the average over itself and `others` less `own`.

        Args:
            own: what `pack` gave for this round; the state may have moved on since.
            robust: CenteredClip, tensor by tensor; between two, a limit from how far apart they were in rounds before.

        Raises: Invalid: wrong bytes, or an average that is not finite; nothing has changed then.
        """
        if not others:
            return
        mine, theirs = self._unpack(round_, own), [self._unpack(round_, data) for data in others]
        moves = {
            tensor: self._average(tensor, s, [t[tensor] for t in theirs], robust) - s for tensor, s in mine.items()
        }
        if not all(bool(torch.isfinite(move).all()) for move in moves.values()):
            raise Invalid("the average of all replicas holds numbers that are not finite")
        for name, index in self._indices(round_):
            for tensor in self._tensors[name]:
                entries, here = state[tensor].view(-1), index.to(state[tensor].device)
                moved = entries[here] + moves[tensor].to(entries.device)
                entries[here] = moved.clamp_(min=0.0) if tensor.startswith(_SQUARES) else moved

    def _average(self, tensor: str, own: Tensor, others: list[Tensor], robust: bool) -> Float[Tensor, " D"]:
        if robust and len(others) == 1:
            return self._histories.mean(tensor, own, others[0])
        x_ND = torch.stack([own, *others])
        return centered_clip(x_ND) if robust else x_ND.mean(0)

    def _unpack(self, round_: int, data: bytes) -> dict[str, Tensor]:
        expected = self.size_bytes(round_)
        if len(data) != expected:
            raise Invalid(f"partition {round_ % self.count} of the state has {expected} bytes, not {len(data)}")
        flat, pieces, at = unpack_floats(data, self._number), dict[str, Tensor](), 0
        for name, index in self._indices(round_):
            for tensor in self._tensors[name]:
                pieces[tensor] = flat[at : at + len(index)]
                at += len(index)
                if tensor.startswith(_SQUARES) and bool((pieces[tensor] < 0).any()):
                    raise Invalid(f"{tensor} is a mean of squares, and holds numbers under zero")
        return pieces

    def _indices(self, round_: int) -> list[tuple[str, Tensor]]:
        if round_ < 0:
            raise Invalid(f"rounds count from 0, not {round_}")
        if not self._owner:
            self._owner = {
                name: integers(size, self.count, "partition", self._seed, name).astype(np.uint16)
                for name, size in self._sizes.items()
            }
        part = round_ % self.count
        return [(name, torch.from_numpy(np.flatnonzero(owner == part))) for name, owner in self._owner.items()]

r"""Replicas that step on their own stay together by averaging a small random part of their state at a time.

    round r, partition P = r mod n:   s = θ[P] is sent;   training goes on;   θ[P] ← θ[P] + mean(s_1 … s_N) − s

(Agora's asynchronous SPARTA.) θ are the parameters and, if asked for, the optimiser's moments, the same entries of
each. A partition is every n-th entry on average, drawn once from the run's seed, so that no index crosses the wire. The
difference is taken against the very numbers that were sent, so rounding on the wire moves nobody as long as all agree.

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
from tessera.models.numbers import Number, pack_numbers, packed_bytes, unpack_numbers
from tessera.models.robust import DistanceHistory, centered_clip

__all__ = ["Partitions"]

_PARAMS = "params."
_MOMENTS = ("muon.", "adam.exp_avg.", "adam.exp_avg_sq.")
_SQUARES = "adam.exp_avg_sq."


class Partitions:
    """Of one stage's state.

    Args:
        layout: names and shapes of the state, as an engine gives it.
        seed: of the run.
        moments: average them as well. They forget: with betas of 0.8 to 0.95, what a replica's moments hold is from its
            last 5 to 20 steps, so it pays only when every entry's turn comes more often than that.

    Cost: two bytes of RAM for each parameter, drawn once at the first use: about 1 s for 100 million.
    """

    def __init__(
        self, layout: Mapping[str, Tensor], seed: int, count: int, number: Number, *, moments: bool = False
    ) -> None:
        self.count, self._seed, self._number = count, seed, number
        self._sizes = {n.removeprefix(_PARAMS): layout[n].numel() for n in sorted(layout) if n.startswith(_PARAMS)}
        kinds = (_PARAMS, *_MOMENTS) if moments else (_PARAMS,)
        self._tensors = {name: [k + name for k in kinds if k + name in layout] for name in self._sizes}
        self._owner: dict[str, np.ndarray[tuple[int], np.dtype[np.uint16]]] = {}
        self._latest: tuple[int, list[tuple[str, Tensor]]] = (-1, [])  # a round asks for its indices many times
        self._histories = DistanceHistory()

    def size_bytes(self, round_: int) -> int:
        """Exact bytes of the message of `round_`."""
        each = (packed_bytes(len(index), self._number) * len(self._tensors[n]) for n, index in self._indices(round_))
        return sum(each)

    def pack(self, round_: int, state: Mapping[str, Tensor]) -> bytes:
        """This replica's entries. Raises: Invalid: one that is not finite, that is, training diverged."""
        pieces = []
        for name, index in self._indices(round_):
            for tensor in self._tensors[name]:
                entries = state[tensor].detach().flatten()[index.to(state[tensor].device)].to("cpu", torch.float32)
                if not bool(torch.isfinite(entries).all()):
                    raise Invalid(f"{tensor} holds numbers that are not finite: the training diverged, lower its rates")
                pieces.append(pack_numbers(entries, self._number))
        return b"".join(pieces)

    def check(self, round_: int, data: bytes) -> None:
        """Raises: Invalid for bytes that no `pack` writes. From any thread."""
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
        pieces, at = dict[str, Tensor](), 0
        for name, index in self._indices(round_):
            for tensor in self._tensors[name]:
                size = packed_bytes(len(index), self._number)
                pieces[tensor] = unpack_numbers(memoryview(data)[at : at + size], len(index), self._number)
                at += size
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
        latest = self._latest  # `check` may run in one thread while another asks for another round
        if part != latest[0]:
            indices = [(name, torch.from_numpy(np.flatnonzero(owner == part))) for name, owner in self._owner.items()]
            latest = self._latest = part, indices
        return latest[1]

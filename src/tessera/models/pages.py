"""Keys and values of many sessions in one stage, in pages of a fixed size and number.

A page holds the keys and values of `PAGE` tokens in every layer of the stage. Whoever uses a page holds a reference
to it; one without references is free. A session writes into pages that it alone holds; a page that is full and final
may be shared and is never written again.

Determinism: what a query sees is computed in pieces of `PIECE` keys, whose sums are added in order, from rows that are
a multiple of `ROWS` in number. So a token's numbers depend on the tokens before it alone, to the last bit on a CPU:
not on how many tokens came with it, on what other sessions were computed beside it, nor on how far its group was
padded (masked keys add exact zeros). Without this they would: torch takes another order of summation for products of
fewer than 4 rows (12 on two threads), and for sums over more keys than one of its own pieces.

Legend: N new tokens of all sessions, B sessions, T new tokens of a session (padded), S keys (padded), H heads, K
key-value heads, G = H / K, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.core.errors import Unavailable
from tessera.models.config import ModelConfig

__all__ = ["PAGE", "ROWS", "Batch", "Pages", "Span", "page_bytes", "round_up"]

PAGE = 16  # tokens
PIECE = 64  # keys; a multiple of PAGE
ROWS = 8
GROUP_KEYS = 1 << 16  # gathered at once, of all sessions of a group


@dataclass(frozen=True)
class Span:
    """New tokens of one session: it had `start`, and `count` more come. `pages` has room for all of them."""

    pages: Sequence[int]
    start: int
    count: int


@dataclass
class _Group:
    """Sessions that attend together: of similar length, with as many new tokens, padded."""

    rows_BT: Tensor  # into the N new tokens; N where padded
    keys_BS: Tensor  # places
    visible_B1TS: Tensor


class Pages:
    """`total` pages of `layers` layers. Not safe for use from two threads at once."""

    def __init__(self, config: ModelConfig, layers: int, total: int, device: torch.device) -> None:
        self.total = total
        self.window = config.window or config.context  # keys that a query sees
        # One page more than may be taken, the first, which stays empty: padding points there. Memory is committed by
        # the first write, at least on a CPU.
        shape = (layers, (1 + total) * PAGE, config.kv_heads, config.head_dim)
        self._keys = torch.empty(shape, device=device)
        self._values = torch.empty(shape, device=device)
        self._clear(0)
        self._references = [1] + [0] * total
        self._free = list(range(total, 0, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A page of zeros, with one reference. Raises: Unavailable: there is none."""
        if not self._free:
            raise Unavailable(f"all {self.total} pages of this stage's memory are in use", retry_after_s=1.0)
        page = self._free.pop()
        self._clear(page)  # whatever was there, masked or not, zero times it must be zero
        self._references[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One reference more to a page that has some."""
        if not self._references[page]:
            raise RuntimeError(f"page {page} is free")
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One reference less."""
        if page == 0 or not self._references[page]:
            raise RuntimeError(f"page {page} is not held")
        self._references[page] -= 1
        if not self._references[page]:
            self._free.append(page)

    def shared(self, page: int) -> bool:
        """Whether more than one holds it."""
        return self._references[page] > 1

    def _clear(self, page: int) -> None:
        self._keys[:, page * PAGE : (page + 1) * PAGE] = 0
        self._values[:, page * PAGE : (page + 1) * PAGE] = 0


class Batch:
    """The attention of one forward over new tokens of several sessions: `attention(layer)` for each layer in turn."""

    def __init__(self, pages: Pages, spans: Sequence[Span]) -> None:
        self._pages = pages
        device = pages._keys.device
        self.tokens = sum(span.count for span in spans)
        places, positions = list[int](), list[int]()
        for span in spans:
            for at in range(span.start, span.start + span.count):
                places.append(span.pages[at // PAGE] * PAGE + at % PAGE)
                positions.append(at)
        self.positions = torch.tensor(positions, device=device)
        self._places = torch.tensor(places, device=device)
        firsts, row = list[int](), 0
        for span in spans:
            firsts.append(row)
            row += span.count
        self._groups = [self._group(spans, firsts, members) for members in _alike(spans)]

    def attention(self, layer: int) -> _LayerAttention:
        return _LayerAttention(self, layer)

    def _group(self, spans: Sequence[Span], firsts: Sequence[int], members: Sequence[int]) -> _Group:
        device = self._places.device
        length = round_up(max(spans[i].count for i in members), ROWS)
        keys = round_up(max(spans[i].start + spans[i].count for i in members), PIECE)
        rows, tables, last = list[list[int]](), list[list[int]](), list[list[int]]()
        for i in members:
            span = spans[i]
            pad = length - span.count
            rows.append([firsts[i] + t for t in range(span.count)] + [self.tokens] * pad)
            last.append([span.start + t for t in range(span.count)] + [0] * pad)
            used = span.pages[: -(-(span.start + span.count) // PAGE)]
            tables.append([*used, *[0] * (keys // PAGE - len(used))])
        table = torch.tensor(tables, device=device)
        places = (table[:, :, None] * PAGE + torch.arange(PAGE, device=device)).flatten(1)
        at, own = torch.arange(keys, device=device), torch.tensor(last, device=device)[:, :, None]
        visible = (at <= own) & (at > own - self._pages.window)
        return _Group(torch.tensor(rows, device=device), places, visible[:, None])

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[1, N padded, H, E]; rows beyond the new tokens are zero."""
        keys, values = self._pages._keys[layer], self._pages._values[layer]
        keys[self._places] = k[0, : self.tokens]
        values[self._places] = v[0, : self.tokens]
        out = q.new_zeros(max(q.size(1), self.tokens + 1), *q.shape[2:])
        asked = torch.cat((q[0, : self.tokens] * q.size(3) ** -0.5, q.new_zeros(1, *q.shape[2:])))
        for group in self._groups:
            y = _attend(asked[group.rows_BT], keys[group.keys_BS], values[group.keys_BS], group.visible_B1TS)
            out[group.rows_BT] = y
        out[self.tokens :] = 0  # padded rows of the groups ended there
        return out[None, : q.size(1)]


@dataclass(frozen=True)
class _LayerAttention:
    batch: Batch
    layer: int

    def __call__(self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        return self.batch._attend(self.layer, q_BTHE, k_BTKE, v_BTKE)


def page_bytes(config: ModelConfig, layers: int) -> int:
    """Of the keys and values of one page."""
    return 2 * 4 * layers * PAGE * config.kv_heads * config.head_dim


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _alike(spans: Sequence[Span]) -> list[list[int]]:
    """Sessions by how many new tokens and how many keys they have, to the next power of two; large groups in parts."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, span in enumerate(spans):
        new, keys = -(-span.count // ROWS), -(-(span.start + span.count) // PIECE)
        groups.setdefault(((new - 1).bit_length(), (keys - 1).bit_length()), []).append(i)
    parts = []
    for (_, keys), members in groups.items():
        size = max(1, GROUP_KEYS // (PIECE << keys))
        parts += [members[start : start + size] for start in range(0, len(members), size)]
    return parts


def _attend(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, visible_B1TS: Tensor) -> Tensor:
    """Softmax attention, [B, T, H, E]; queries are scaled already."""
    batch, length, heads, size = q_BTHE.shape
    groups = heads // k_BSKE.size(2)
    q = q_BTHE.view(batch, length, -1, groups, size).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, K, G·T, E]
    scores = q @ k_BSKE.permute(0, 2, 3, 1)  # [B, K, G·T, S]
    scores.masked_fill_(~visible_B1TS.repeat(1, 1, groups, 1), -torch.inf)
    likely = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    values = v_BSKE.transpose(1, 2)
    out, total = likely.new_zeros(*likely.shape[:3], size), likely.new_zeros(*likely.shape[:3], 1)
    for start in range(0, likely.size(3), PIECE):
        piece = likely[..., start : start + PIECE]
        out += piece @ values[:, :, start : start + PIECE]
        total += piece.sum(-1, keepdim=True)
    y = (out / total).view(batch, -1, groups, length, size)
    return y.permute(0, 3, 1, 2, 4).reshape(batch, length, heads, size)

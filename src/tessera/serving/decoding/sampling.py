"""The next token from logits: greedy, temperature, top-p, with randomness that is counted, not drawn.

The uniform number for a position is a hash of (seed, position), so a stage that lost its state, or another replica,
chooses the same token again. For the same reason guesses can be checked by comparing: a token is the one that would
have been chosen without any guess, whatever was guessed. Sums run in float64 and in a fixed order.

Legend: V vocabulary, N positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.core.hashing import sha256
from tessera.serving.engine import Sampling, Token

__all__ = ["choose", "follow", "uniform"]


def follow(logits_NV: Tensor, guesses: Sequence[int], sampling: Sampling, position: int) -> list[Token]:
    """The tokens from `position` on: as many guesses as are right, and one more.

    Args:
        logits_NV: the first for `position`; then those after each guess.
    """
    found = list[Token]()
    for place, logits_V in enumerate(logits_NV):
        token = choose(logits_V, sampling, position + place)
        found.append(_with_logprobs(token, logits_V, sampling.logprobs))
        if place == len(guesses) or guesses[place] != token:
            break
    return found


def _with_logprobs(token: int, logits_V: Tensor, count: int | None) -> Token:
    if count is None:
        return Token(token)
    logprobs_V = torch.log_softmax(logits_V.to(torch.float64), 0)
    likeliest = torch.sort(logprobs_V, descending=True, stable=True)
    top = zip(likeliest.indices[:count].tolist(), likeliest.values[:count].tolist(), strict=True)
    return Token(token, float(logprobs_V[token]), tuple(top))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 bits, fixed by its two arguments."""
    digest = sha256(b"tessera/sampling", seed.to_bytes(8, "big"), position.to_bytes(8, "big"))
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def choose(logits_V: Tensor, sampling: Sampling, position: int) -> int:
    """The token at `position`. Ties go to the lowest id. Raises: Invalid for logits that hold no number.

    top-p keeps the shortest run of likeliest tokens whose probabilities sum to at least `top_p` (Holtzman et al. 2020).
    Cost: O(V log V), O(V) when greedy.
    """
    logits_V = logits_V.detach().to(device="cpu", dtype=torch.float64).flatten()
    if logits_V.numel() == 0 or not bool(torch.isfinite(logits_V).all()):
        raise Invalid("the logits are not finite: the stage's params are damaged")
    if sampling.temperature == 0:
        return int(torch.argmax(logits_V))  # argmax gives the first of equals on the CPU
    probabilities_V = torch.softmax(logits_V / sampling.temperature, dim=0)
    sorted_V, order_V = torch.sort(probabilities_V, descending=True, stable=True)
    cumulative_V = torch.cumsum(sorted_V, dim=0)
    kept = int((cumulative_V < sampling.top_p).sum()) + 1 if sampling.top_p < 1 else sorted_V.numel()
    kept = min(kept, sorted_V.numel())
    target = uniform(sampling.seed, position) * float(cumulative_V[kept - 1])
    index = int(torch.searchsorted(cumulative_V[:kept], target, right=True))
    return int(order_V[min(index, kept - 1)])

"""From receipts to shares. Every worker computes the same leaves from the same receipts, to the last unit.

    work_w   = floor(verified_tokens_w · flops_per_token_w · weight · 10^18 / 10^12)
    owner_o  = floor(Σ work · bps_o / bps_work)

one share for each 10^12 operations at weight 1, and more for early ones where the manifest says so. The workers keep
their part of 10,000, the owners' parts never round up against them, and no epoch exceeds the contract's cap. An epoch
in which no work was verified has no leaves and the root zero: it is proposed all the same, so that the next can follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.core.ids import Account, parse_account
from tessera.core.merkle import MerkleTree, share_leaf
from tessera.training.manifest import SHARE_FLOPS, SHARE_WAD, WHOLE_BPS, Manifest
from tessera.training.terms import weight_bps

__all__ = ["EpochLeaves", "compute_epoch"]

MAX_LEAVES = 8192  # present and past workers, and owners


@dataclass(frozen=True, slots=True)
class EpochLeaves:
    """The shares of one epoch, one leaf for each account, sorted by account."""

    epoch: int
    leaves: tuple[tuple[Account, int], ...]

    @property
    def total(self) -> int:
        return sum(shares for _, shares in self.leaves)

    @property
    def root(self) -> bytes:
        """Zero when there are no leaves."""
        return self._tree().root if self.leaves else bytes(32)

    def shares_of(self, account: Account) -> int:
        return dict(self.leaves).get(account, 0)

    def proof(self, account: Account) -> list[bytes]:
        accounts = [holder for holder, _ in self.leaves]
        return self._tree().proof(accounts.index(account))

    def _tree(self) -> MerkleTree:
        return MerkleTree([share_leaf(self.epoch, account, shares) for account, shares in self.leaves])

    def to_text(self) -> str:
        return encoding.encode([self.epoch, [[account, str(shares)] for account, shares in self.leaves]]).decode()

    @classmethod
    def from_text(cls, text: str) -> EpochLeaves:
        """Raises `Invalid` for anything but what `to_text` writes."""
        value: Any = encoding.decode(text.encode(), 128 * MAX_LEAVES)
        try:
            epoch, rows = value
            leaves = tuple((parse_account(account), int(shares)) for account, shares in rows)
        except (TypeError, ValueError) as error:
            raise Invalid(f"epoch leaves cannot be read: {error}") from error
        if type(epoch) is not int or len(leaves) > MAX_LEAVES or any(shares <= 0 for _, shares in leaves):
            raise Invalid(f"epoch leaves are at most {MAX_LEAVES}, each of a positive number of shares")
        return cls(epoch, leaves)


def compute_epoch(manifest: Manifest, epoch: int, work: Iterable[tuple[Account, int, int]]) -> EpochLeaves:
    """The leaves of `epoch`; none when no work was verified.

    Args:
        work: for each worker, present or past, his account, his stage, and how many microbatches were credited to him.
    """
    shares: dict[Account, int] = {}
    weight = weight_bps(manifest, epoch)
    for account, stage, microbatches in work:
        flops = microbatches * manifest.tokens_per_microbatch * manifest.model.flops_per_token(stage)
        shares[account] = shares.get(account, 0) + flops * SHARE_WAD * weight // (SHARE_FLOPS * WHOLE_BPS)
    earned = sum(shares.values())
    for owner in manifest.owners:
        shares[owner.account] = shares.get(owner.account, 0) + earned * owner.bps // manifest.allocation.work
    leaves = tuple(sorted((account, count) for account, count in shares.items() if count > 0))
    return EpochLeaves(epoch, leaves)

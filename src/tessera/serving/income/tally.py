"""From serving receipts to money. Every worker computes the same leaves from the same receipts, to the last unit.

    work_w = credited tokens_w · operations per token of w's stage
    paid_w = floor(pool · work_w / Σ work)

`pool` is what the split's earlier tallies have not given out of the workers' part; what rounding leaves stays in it. A
tally pays for the vouchers that ended after the one before and until its `cut`, so that no session is paid for twice;
the cut is a leaf too, of nobody, which the contract pays to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tessera.chain.consent import NOBODY
from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.core.ids import Account, PeerId, parse_account
from tessera.core.merkle import MerkleTree, share_leaf
from tessera.serving.income.receipts import Receipt, credited
from tessera.serving.income.vouchers import Terms, Voucher

__all__ = ["Server", "Tally", "compute_tally"]

MAX_LEAVES = 8_192  # present and past workers


@dataclass(frozen=True, slots=True)
class Server:
    """A worker, present or past: whose account is paid, and for what."""

    account: Account
    stage: int
    flops_per_token: int


@dataclass(frozen=True, slots=True)
class Tally:
    """The units of one tally, one leaf for each account, sorted by account; sessions until `cut`, in seconds."""

    number: int
    cut: int
    leaves: tuple[tuple[Account, int], ...]

    @property
    def total(self) -> int:
        return sum(units for _, units in self.leaves)

    @property
    def root(self) -> bytes:
        return self._tree().root

    def units_of(self, account: Account) -> int:
        return dict(self.leaves).get(account, 0)

    def proof(self, account: Account) -> list[bytes]:
        accounts = [holder for holder, _ in self.leaves]
        return self._tree().proof(1 + accounts.index(account))

    def leaf(self, account: Account) -> bytes:
        return share_leaf(self.number, account, self.units_of(account))

    def _tree(self) -> MerkleTree:
        rows = [(NOBODY, self.cut), *self.leaves]
        return MerkleTree([share_leaf(self.number, account, units) for account, units in rows])

    def to_text(self) -> str:
        rows = [[account, str(units)] for account, units in self.leaves]
        return encoding.encode([self.number, self.cut, rows]).decode()

    @classmethod
    def from_text(cls, text: str) -> Tally:
        """Raises `Invalid` for anything but what `to_text` writes."""
        value: Any = encoding.decode(text.encode(), 128 * MAX_LEAVES)
        try:
            number, cut, rows = value
            leaves = tuple((parse_account(account), int(units)) for account, units in rows)
        except (TypeError, ValueError) as error:
            raise Invalid(f"a tally cannot be read: {error}") from error
        if any(type(whole) is not int or whole < 0 for whole in (number, cut)) or len(leaves) > MAX_LEAVES:
            raise Invalid(f"a tally has a number, a cut, and at most {MAX_LEAVES} leaves")
        if any(units <= 0 for _, units in leaves) or list(leaves) != sorted(dict(leaves).items()):
            raise Invalid("a tally's leaves are positive, one for each account, in order")
        return cls(number, cut, leaves)


def compute_tally(
    terms: Terms,
    number: int,
    cut: int,
    pool: int,
    vouchers: Iterable[Voucher],
    receipts: Iterable[Receipt],
    servers: Mapping[PeerId, Server],
    stages: int,
) -> Tally:
    """The tally of these vouchers and receipts: checked, and of purchases that are paid."""
    stage_of = {peer: server.stage for peer, server in servers.items()}
    work: dict[Account, int] = {}
    for peer, tokens in credited(terms, vouchers, receipts, stage_of, stages).items():
        server = servers[peer]
        work[server.account] = work.get(server.account, 0) + tokens * server.flops_per_token
    whole = sum(work.values())
    units = {account: pool * done // whole for account, done in work.items()}
    return Tally(number, cut, tuple(sorted((account, paid) for account, paid in units.items() if paid > 0)))

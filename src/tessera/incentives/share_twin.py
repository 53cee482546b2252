"""The Python twin of `contracts/model_share.vy`: the same rules in exact fractions, without the contract's arithmetic.

Tests run both side by side. Where the contract keeps an index and settles lazily, the twin gives everybody their part
of every income at once, so that the two agree only if the contract's bookkeeping is right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from tessera.core.errors import Conflict, Refused

__all__ = ["Leaf", "ShareTwin"]


@dataclass(slots=True)
class Leaf:
    """One contributor's shares in a posted epoch; `due` is what they have earned so far."""

    epoch: int
    holder: str
    shares: int
    due: Fraction = Fraction(0)


@dataclass(slots=True)
class ShareTwin:
    """Balances, leaves and income of one model share. Shares and payments are ints, what is due is exact.

    Invariants: supply = balances + unredeemed; distributed = paid + everything due.
    """

    balances: dict[str, int] = field(default_factory=dict)
    due: dict[str, Fraction] = field(default_factory=dict)
    leaves: list[Leaf] = field(default_factory=list)
    epochs: int = 0
    arrived: int = 0  # not distributed yet
    distributed: int = 0
    paid: int = 0

    @property
    def unredeemed(self) -> int:
        return sum(leaf.shares for leaf in self.leaves)

    @property
    def supply(self) -> int:
        return sum(self.balances.values()) + self.unredeemed

    @property
    def held(self) -> int:
        return self.distributed - self.paid

    def post(self, shares: dict[str, int]) -> list[Leaf]:
        """Admit an epoch; one without shares is one too."""
        posted = [Leaf(self.epochs, holder, amount) for holder, amount in shares.items()]
        self.leaves += posted
        self.epochs += 1
        return posted

    def redeem(self, leaf: Leaf) -> None:
        """Raises `Conflict` for a leaf that is redeemed already."""
        position = next((i for i, known in enumerate(self.leaves) if known is leaf), None)
        if position is None:
            raise Conflict("already redeemed")
        del self.leaves[position]
        self.balances[leaf.holder] = self.balances.get(leaf.holder, 0) + leaf.shares
        self.due[leaf.holder] = self.due.get(leaf.holder, Fraction(0)) + leaf.due

    def receive(self, amount: int) -> None:
        """Income arrives; nobody has a part in it before `distribute`."""
        self.arrived += amount

    def distribute(self) -> int:
        """Everybody's part of what has arrived, at once; 0 while there are no shares."""
        supply, income = self.supply, self.arrived
        if supply == 0 or income == 0:
            return 0
        for holder, balance in self.balances.items():
            self.due[holder] = self.due.get(holder, Fraction(0)) + Fraction(income * balance, supply)
        for leaf in self.leaves:
            leaf.due += Fraction(income * leaf.shares, supply)
        self.arrived, self.distributed = 0, self.distributed + income
        return income

    def transfer(self, sender: str, receiver: str, amount: int) -> None:
        """Shares move; what they have earned stays. Raises `Refused` for more than the sender has."""
        if not 0 <= amount <= self.balances.get(sender, 0):
            raise Refused(f"{sender} has {self.balances.get(sender, 0)} shares, not {amount}", rule="balance")
        self.balances[sender] = self.balances.get(sender, 0) - amount
        self.balances[receiver] = self.balances.get(receiver, 0) + amount

    def claim(self, holder: str, amount: int) -> None:
        """A payment of `amount` to `holder`. Raises `Refused` if it is more than is due: nobody is ever overpaid."""
        due = self.due.get(holder, Fraction(0))
        if amount > due:
            raise Refused(f"{holder} was paid {amount}, due is {float(due)}", rule="overpaid")
        self.due[holder] = due - amount
        self.paid += amount

    def owed_down(self, holder: str) -> int:
        """Whole units due to a holder, rounded down."""
        return int(self.due.get(holder, Fraction(0)))

# pragma version 0.4.3
"""
@title Accrual
@license Apache-2.0
@notice Splits income over weights that change, in constant time per call and without losing a fraction.

        Let `index` be the income that one unit of weight has earned since the beginning, in 1/SCALE of the asset's
        smallest unit. An account that was last settled at `at` with weight `w` has since earned `w * (index - at)`.
        Nobody iterates over holders, ever.

        What cannot happen: income counted twice, or an account that is owed more than its exact part. At every moment,
        in 1/SCALE units,

            SCALE * (income accrued - amounts taken) = sum of what accounts are owed + remainder

        where what an account is owed includes what it has earned since it was settled. `_take` rounds down, and the
        fraction stays with the account. What does not divide by the total weight goes to `remainder`, which grows by
        less than weight / SCALE of a unit with each income: with 10**24 shares, one unit in 3 * 10**14 incomes. It is
        nobody's: spread with the next income, it would pay later holders for earlier ones.
@dev    Whoever uses the module settles an account BEFORE changing its weight; that is the whole protocol.
        No overflow while the total weight and the sum of untaken income each stay below 2**128: `_accrue` computes
        income * SCALE < 2**256, and an account's part is never more than the whole.
@custom:kill Nothing to stop: the module holds numbers, not money.
"""

SCALE: constant(uint256) = 2**128

index: public(uint256)  # earned by one unit of weight since the beginning, in 1/SCALE units
remainder: public(uint256)  # what did not divide by the weight, over all incomes, in 1/SCALE units
at: HashMap[address, uint256]  # the index when the account was last settled
owed: HashMap[address, uint256]  # settled and not taken, in 1/SCALE units


@internal
def _accrue(income: uint256, weight: uint256):
    """
    @notice Spread `income` over all of `weight`, which is not zero.
    """
    scaled: uint256 = income * SCALE
    self.index += scaled // weight
    self.remainder += scaled % weight


@internal
def _settle(account: address, weight: uint256):
    """
    @notice Credit what `account` has earned with `weight` since it was last settled.
    """
    index: uint256 = self.index
    if self.at[account] != index:
        self.owed[account] += weight * (index - self.at[account])
        self.at[account] = index


@internal
def _credit(account: address, weight: uint256, since: uint256):
    """
    @notice Credit what `weight` has earned since the index was `since`, on top of what the account has.
    """
    self.owed[account] += weight * (self.index - since)


@internal
def _take(account: address) -> uint256:
    """
    @notice The whole units that a settled account is owed, rounded down; from now on they count as paid.
    """
    owed: uint256 = self.owed[account]
    self.owed[account] = owed % SCALE
    return owed // SCALE


@internal
@view
def _earned(account: address, weight: uint256) -> uint256:
    """
    @notice What `account` is owed, unsettled earnings included, in 1/SCALE units.
    """
    return self.owed[account] + weight * (self.index - self.at[account])


@internal
@view
def _growth(weight: uint256, since: uint256) -> uint256:
    """
    @notice What `weight` has earned since the index was `since`, in 1/SCALE units.
    """
    return weight * (self.index - since)

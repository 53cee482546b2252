# pragma version 0.4.3
# pragma nonreentrancy on
"""
@title Model share
@license Apache-2.0
@notice Ownership of one jointly trained model, as an ERC-20 that earns.

        Shares come into being only through `post`, called by the contract that issues them (`run`): an epoch of
        verified work, as the Merkle root over every contributor's shares. A posted epoch counts in `totalSupply` and
        earns from that moment; each contributor's leaf is turned into a balance by `redeem`, whenever anybody likes,
        and loses nothing by waiting.

        Income is whatever arrives in `asset`: a plain transfer, an x402 payment, an escrow's release. Anyone may call
        `distribute` to spread what has arrived; holders pull their part with `claim`.

        What cannot happen:
        - a share that the issuer has not posted, an epoch posted twice or out of order, a leaf redeemed twice, or more
          shares redeemed from an epoch than were posted;
        - a contract that owes more than it holds: held >= sum of everything claimable, and asset balance >= held;
        - income paid to anybody but the holder who earned it.

        The books balance to the last unit. With S = 2**128, over all holders and all epochs,

            S * held = sum of accrued(holder) + sum of pending(epoch) + remainder

        so that what `held` exceeds the whole units of all claims by (the dust) is at most one unit for each holder
        and each epoch not fully redeemed, plus the whole units of `remainder`, which takes ages to reach one.
@dev    Nobody owns the contract; there is no mint, no pause and no upgrade. A leaf is
        keccak256(keccak256(abi_encode(epoch, holder, shares))): hashed twice, because a node of the tree is hashed
        once and must never pass for a leaf. `asset` must be a plain ERC-20: no fee on transfer, no rebasing.
@custom:kill Nobody can stop the contract. The issuer ends new issuance by not posting; claims stay open for ever.
"""

from ethereum.ercs import IERC20
from ethereum.ercs import IERC20Detailed

from modules import accrual

implements: IERC20
implements: IERC20Detailed

initializes: accrual

exports: (accrual.index, accrual.remainder)

MAX_DEPTH: constant(uint256) = 32
MAX_SUPPLY: constant(uint256) = 2**128 - 1  # keeps `accrual` free of overflow
MAX_HELD: constant(uint256) = 2**128 - 1
SCALE: constant(uint256) = 2**128

decimals: public(constant(uint8)) = 18

asset: public(immutable(IERC20))
run_id: public(immutable(bytes32))
issuer: public(immutable(address))


struct Epoch:
    root: bytes32
    unredeemed: uint256  # shares posted and not yet redeemed
    index: uint256  # accrual index when the epoch was posted


name: public(String[64])
symbol: public(String[16])
balanceOf: public(HashMap[address, uint256])
allowance: public(HashMap[address, HashMap[address, uint256]])
totals: uint256  # below 2**128: all shares, in balances and unredeemed; above: epochs. One slot, `post` changes both
epochs: public(HashMap[uint256, Epoch])
counted: public(HashMap[bytes32, bool])  # leaves already redeemed
held: public(uint256)  # income distributed and not yet claimed


event Transfer:
    sender: indexed(address)
    receiver: indexed(address)
    value: uint256

event Approval:
    owner: indexed(address)
    spender: indexed(address)
    value: uint256

event Posted:
    epoch: indexed(uint256)
    root: bytes32
    shares: uint256

event Redeemed:
    epoch: indexed(uint256)
    holder: indexed(address)
    shares: uint256

event Distributed:
    income: uint256
    index: uint256

event Claimed:
    holder: indexed(address)
    amount: uint256


@deploy
def __init__(name_: String[64], symbol_: String[16], asset_: IERC20, run_id_: bytes32, issuer_: address):
    """
    @param asset_ The ERC-20 in which the model earns.
    @param run_id_ The hash of the run's manifest.
    @param issuer_ The contract that admits epochs: of the run with this id.
    """
    assert asset_.address.is_contract, "model_share: asset is no contract"
    assert issuer_.is_contract, "model_share: issuer is no contract"
    self.name = name_
    self.symbol = symbol_
    asset = asset_
    run_id = run_id_
    issuer = issuer_


# --- shares -----------------------------------------------------------------------------------------------------------


@external
def post(epoch: uint256, root: bytes32, shares: uint256):
    """
    @notice Admit an epoch of work. Only the issuer can.
    @param epoch The next one: each epoch comes exactly once, in order.
    @param root Merkle root over the leaves of all contributors.
    @param shares The sum of all leaves; zero for an epoch in which nobody's work was verified.
    """
    assert msg.sender == issuer, "model_share: not the issuer"
    totals: uint256 = self.totals
    assert epoch == totals // SCALE, "model_share: not the next epoch"
    assert shares <= MAX_SUPPLY - totals % SCALE, "model_share: too many shares"
    self.totals = totals + SCALE + shares
    self.epochs[epoch] = Epoch(root=root, unredeemed=shares, index=accrual.index)
    log Posted(epoch=epoch, root=root, shares=shares)


@external
def redeem(epoch: uint256, holder: address, shares: uint256, proof: DynArray[bytes32, MAX_DEPTH]):
    """
    @notice Turn a leaf into a balance, with all it has earned since its epoch was posted. Anyone may send it.
    @param proof The siblings from the leaf up to the root.
    """
    assert holder not in [empty(address), self], "model_share: bad holder"
    leaf: bytes32 = keccak256(keccak256(abi_encode(epoch, holder, shares)))
    assert not self.counted[leaf], "model_share: already redeemed"
    assert self._fold(leaf, proof) == self.epochs[epoch].root, "model_share: bad proof"
    assert shares <= self.epochs[epoch].unredeemed, "model_share: epoch exhausted"
    self.counted[leaf] = True
    self.epochs[epoch].unredeemed -= shares
    accrual._settle(holder, self.balanceOf[holder])
    accrual._credit(holder, shares, self.epochs[epoch].index)
    self.balanceOf[holder] += shares
    log Transfer(sender=empty(address), receiver=holder, value=shares)
    log Redeemed(epoch=epoch, holder=holder, shares=shares)


# --- income -----------------------------------------------------------------------------------------------------------


@external
def distribute() -> uint256:
    """
    @notice Spread what has arrived since the last time over all shares. Anyone may send it.
    @return What was spread; zero while there are no shares, and the money waits.
    """
    income: uint256 = self._arrived()
    supply: uint256 = self.totals % SCALE
    if income == 0 or supply == 0:
        return 0
    assert self.held + income <= MAX_HELD, "model_share: too much income"
    self.held += income
    accrual._accrue(income, supply)
    log Distributed(income=income, index=accrual.index)
    return income


@external
def claim(holder: address = msg.sender) -> uint256:
    """
    @notice Pay `holder`, and nobody else, what its shares have earned. Anyone may send it.
    @return What was paid: whole units, rounded down; the fraction stays credited.
    """
    accrual._settle(holder, self.balanceOf[holder])
    amount: uint256 = accrual._take(holder)
    if amount > 0:
        self.held -= amount
        log Claimed(holder=holder, amount=amount)
        assert extcall asset.transfer(holder, amount, default_return_value=True), "model_share: transfer failed"
    return amount


@external
@view
def claimable(holder: address) -> uint256:
    """
    @notice What `claim` would pay now.
    """
    return accrual._earned(holder, self.balanceOf[holder]) // SCALE


@external
@view
def accrued(holder: address) -> uint256:
    """
    @notice What `holder` is owed, in 1/2**128 of the asset's smallest unit.
    """
    return accrual._earned(holder, self.balanceOf[holder])


@external
@view
def pending(epoch: uint256) -> uint256:
    """
    @notice What the unredeemed shares of an epoch have earned, in 1/2**128 of the asset's smallest unit.
    """
    return accrual._growth(self.epochs[epoch].unredeemed, self.epochs[epoch].index)


@external
@view
def undistributed() -> uint256:
    """
    @notice What has arrived and waits for `distribute`.
    """
    return self._arrived()


@external
@view
def epoch_count() -> uint256:
    """
    @notice How many epochs have been posted: the number of the next one.
    """
    return self.totals // SCALE


# --- ERC-20 -----------------------------------------------------------------------------------------------------------


@external
@view
def totalSupply() -> uint256:
    """
    @notice All shares: balances, and what is posted and not yet redeemed.
    """
    return self.totals % SCALE


@external
def transfer(receiver: address, amount: uint256) -> bool:
    """
    @notice Hand over shares. What they have earned so far stays with the sender.
    """
    self._move(msg.sender, receiver, amount)
    return True


@external
def transferFrom(owner: address, receiver: address, amount: uint256) -> bool:
    """
    @notice Hand over shares of an owner who has approved it.
    """
    allowed: uint256 = self.allowance[owner][msg.sender]
    if allowed != max_value(uint256):
        assert amount <= allowed, "model_share: allowance too small"
        self.allowance[owner][msg.sender] = allowed - amount
    self._move(owner, receiver, amount)
    return True


@external
def approve(spender: address, amount: uint256) -> bool:
    """
    @notice Let `spender` move up to `amount` of the caller's shares; the maximum means no limit.
    """
    self.allowance[msg.sender][spender] = amount
    log Approval(owner=msg.sender, spender=spender, value=amount)
    return True


# --- inside -----------------------------------------------------------------------------------------------------------


@internal
def _move(sender: address, receiver: address, amount: uint256):
    assert receiver not in [empty(address), self], "model_share: bad receiver"
    assert amount <= self.balanceOf[sender], "model_share: balance too small"
    accrual._settle(sender, self.balanceOf[sender])
    accrual._settle(receiver, self.balanceOf[receiver])
    self.balanceOf[sender] -= amount
    self.balanceOf[receiver] += amount
    log Transfer(sender=sender, receiver=receiver, value=amount)


@internal
@view
def _arrived() -> uint256:
    return staticcall asset.balanceOf(self) - self.held


@internal
@pure
def _fold(leaf: bytes32, proof: DynArray[bytes32, MAX_DEPTH]) -> bytes32:
    node: bytes32 = leaf
    for sibling: bytes32 in proof:
        if convert(node, uint256) < convert(sibling, uint256):
            node = keccak256(concat(node, sibling))
        else:
            node = keccak256(concat(sibling, node))
    return node

# pragma version 0.4.3
# pragma nonreentrancy on
"""
@title Model share
@license Apache-2.0
@notice Ownership of one jointly trained model, as an ERC-20 that earns.

        Shares come into being only through `post`: an epoch of verified work, as the Merkle root over every
        contributor's shares, signed by more than two thirds of the run's workers. A posted epoch counts in
        `totalSupply` and earns from that moment; each contributor's leaf is turned into a balance by `redeem`,
        whenever anybody likes, and loses nothing by waiting.

        Workers come and go by `change`, signed in the same way by those who are present: who joins signs from then on,
        who leaves signs no more, and what he has earned stays his. Which part of the model a worker holds is no matter
        of this contract.

        Income is whatever arrives in `asset`: a plain transfer, an x402 payment, an escrow's release. Anyone may call
        `distribute` to spread what has arrived; holders pull their part with `claim`.

        What cannot happen:
        - a share without the signatures, an epoch posted twice or out of order, a leaf redeemed twice, or more shares
          redeemed from an epoch than were posted;
        - a change of workers without the signatures of more than two thirds of the present ones, a change made twice
          or out of order, one account in two places, or a contract without workers;
        - a contract that owes more than it holds: held >= sum of everything claimable, and asset balance >= held;
        - income paid to anybody but the holder who earned it.

        The books balance to the last unit. With S = 2**128, over all holders and all epochs,

            S * held = sum of accrued(holder) + sum of pending(epoch) + remainder

        so that what `held` exceeds the whole units of all claims by (the dust) is at most one unit for each holder
        and each epoch not fully redeemed, plus the whole units of `remainder`, which takes ages to reach one.
@dev    Nobody owns the contract; there is no mint, no pause and no upgrade. A leaf is
        keccak256(keccak256(abi_encode(epoch, holder, shares))): hashed twice, because a node of the tree is hashed
        once and must never pass for a leaf. `asset` must be a plain ERC-20: no fee on transfer, no rebasing.
@custom:kill Nobody can stop the contract. Workers end new issuance by not signing; claims stay open for ever.
"""

from ethereum.ercs import IERC20
from ethereum.ercs import IERC20Detailed

from modules import accrual
from modules import typed_data

implements: IERC20
implements: IERC20Detailed

initializes: accrual

exports: (accrual.index, accrual.remainder)

MAX_WORKERS: constant(uint256) = 128
MAX_DEPTH: constant(uint256) = 32
MAX_SUPPLY: constant(uint256) = 2**128 - 1  # keeps `accrual` free of overflow
MAX_HELD: constant(uint256) = 2**128 - 1
SCALE: constant(uint256) = 2**128
DOMAIN_NAME: constant(String[19]) = "Tessera model share"
DOMAIN_VERSION: constant(String[1]) = "1"
EPOCH_TYPE: constant(bytes32) = keccak256("Epoch(bytes32 runId,uint256 epoch,bytes32 root,uint256 shares)")
CHANGE_TYPE: constant(bytes32) = keccak256("Change(bytes32 runId,uint256 number,address joiner,address leaver)")

decimals: public(constant(uint8)) = 18

asset: public(immutable(IERC20))
run_id: public(immutable(bytes32))


struct Epoch:
    root: bytes32
    unredeemed: uint256  # shares posted and not yet redeemed
    index: uint256  # accrual index when the epoch was posted


struct Change:
    joiner: address  # nobody when empty
    leaver: address  # nobody when empty


name: public(String[64])
symbol: public(String[16])
workers: public(DynArray[address, MAX_WORKERS])  # the present ones, in no lasting order
is_worker: public(HashMap[address, bool])
totalSupply: public(uint256)  # balances and unredeemed shares
balanceOf: public(HashMap[address, uint256])
allowance: public(HashMap[address, HashMap[address, uint256]])
change_count: public(uint256)
changes: public(HashMap[uint256, Change])
epoch_count: public(uint256)
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

event Changed:
    number: indexed(uint256)
    joiner: indexed(address)
    leaver: indexed(address)

event Posted:
    epoch: indexed(uint256)
    root: bytes32
    shares: uint256
    signers: uint256

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
def __init__(
    name_: String[64], symbol_: String[16], asset_: IERC20, run_id_: bytes32, workers_: DynArray[address, MAX_WORKERS]
):
    """
    @param asset_ The ERC-20 in which the model earns.
    @param run_id_ The hash of the run's manifest.
    @param workers_ The accounts whose signatures admit an epoch: at least one, none twice.
    """
    assert len(workers_) > 0, "model_share: no workers"
    assert asset_.address.is_contract, "model_share: asset is no contract"
    for worker: address in workers_:
        self._admit(worker)
    self.name = name_
    self.symbol = symbol_
    asset = asset_
    run_id = run_id_


# --- shares -----------------------------------------------------------------------------------------------------------


@external
def post(epoch: uint256, root: bytes32, shares: uint256, signatures: DynArray[Bytes[65], MAX_WORKERS]):
    """
    @notice Admit an epoch of work. Anyone may send it; the signatures decide.
    @param epoch The next one: each epoch comes exactly once, in order.
    @param root Merkle root over the leaves of all contributors.
    @param shares The sum of all leaves.
    @param signatures 65 bytes r, s, v over `digest`, by ascending signer, from more than two thirds of the workers.
    """
    assert epoch == self.epoch_count, "model_share: not the next epoch"
    assert shares > 0, "model_share: empty epoch"
    assert shares <= MAX_SUPPLY - self.totalSupply, "model_share: too many shares"
    self._check_signatures(self._digest(epoch, root, shares), signatures)
    self.epochs[epoch] = Epoch(root=root, unredeemed=shares, index=accrual.index)
    self.epoch_count = epoch + 1
    self.totalSupply += shares
    log Posted(epoch=epoch, root=root, shares=shares, signers=len(signatures))


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


@external
def change(number: uint256, joiner: address, leaver: address, signatures: DynArray[Bytes[65], MAX_WORKERS]):
    """
    @notice Admit `joiner`, remove `leaver`, or both. Anyone may send it; the signatures decide.
    @param number The next one: each change comes exactly once, in order, so that no signature serves twice.
    @param joiner An account that is no worker; empty when nobody joins.
    @param leaver A worker, but not the last one; empty when nobody leaves.
    @param signatures Over `change_digest`, as for `post`, from the workers before the change.
    """
    assert number == self.change_count, "model_share: not the next change"
    assert joiner != leaver, "model_share: empty change"
    self._check_signatures(self._change_digest(number, joiner, leaver), signatures)
    if joiner != empty(address):
        self._admit(joiner)
    if leaver != empty(address):
        self._remove(leaver)
    self.changes[number] = Change(joiner=joiner, leaver=leaver)
    self.change_count = number + 1
    log Changed(number=number, joiner=joiner, leaver=leaver)


@external
@view
def worker_count() -> uint256:
    """
    @notice How many workers there are now: more than two thirds of them decide.
    """
    return len(self.workers)


@external
@view
def change_digest(number: uint256, joiner: address, leaver: address) -> bytes32:
    """
    @notice The EIP-712 digest that workers sign to let somebody in or out.
    """
    return self._change_digest(number, joiner, leaver)


@external
@view
def digest(epoch: uint256, root: bytes32, shares: uint256) -> bytes32:
    """
    @notice The EIP-712 digest that workers sign to admit an epoch.
    """
    return self._digest(epoch, root, shares)


@external
@view
def DOMAIN_SEPARATOR() -> bytes32:
    """
    @notice The EIP-712 domain of this contract.
    """
    return self._domain()


# --- income -----------------------------------------------------------------------------------------------------------


@external
def distribute() -> uint256:
    """
    @notice Spread what has arrived since the last time over all shares. Anyone may send it.
    @return What was spread; zero while there are no shares, and the money waits.
    """
    income: uint256 = self._arrived()
    if income == 0 or self.totalSupply == 0:
        return 0
    assert self.held + income <= MAX_HELD, "model_share: too much income"
    self.held += income
    accrual._accrue(income, self.totalSupply)
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


# --- ERC-20 -----------------------------------------------------------------------------------------------------------


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
def _admit(worker: address):
    assert worker != empty(address), "model_share: bad worker"
    assert not self.is_worker[worker], "model_share: worker named twice"
    assert len(self.workers) < MAX_WORKERS, "model_share: too many workers"
    self.is_worker[worker] = True
    self.workers.append(worker)


@internal
def _remove(worker: address):
    """
    @dev The last of the list takes the empty place.
    """
    assert self.is_worker[worker], "model_share: no such worker"
    assert len(self.workers) > 1, "model_share: last worker"
    self.is_worker[worker] = False
    last: address = self.workers.pop()
    if last == worker:
        return
    for i: uint256 in range(len(self.workers), bound=MAX_WORKERS):
        if self.workers[i] == worker:
            self.workers[i] = last
            return


@internal
@view
def _arrived() -> uint256:
    return staticcall asset.balanceOf(self) - self.held


@internal
@view
def _check_signatures(digest: bytes32, signatures: DynArray[Bytes[65], MAX_WORKERS]):
    """
    @dev More than two thirds of the workers, strictly ascending: that none counts twice costs one comparison each.
    """
    assert 3 * len(signatures) > 2 * len(self.workers), "model_share: too few signatures"
    last: address = empty(address)
    for signature: Bytes[65] in signatures:
        signer: address = typed_data._signer_of(digest, signature)
        assert self.is_worker[signer], "model_share: not a worker's signature"
        assert convert(signer, uint160) > convert(last, uint160), "model_share: signers not ascending"
        last = signer


@internal
@view
def _digest(epoch: uint256, root: bytes32, shares: uint256) -> bytes32:
    return typed_data._digest(self._domain(), keccak256(abi_encode(EPOCH_TYPE, run_id, epoch, root, shares)))


@internal
@view
def _change_digest(number: uint256, joiner: address, leaver: address) -> bytes32:
    fields: bytes32 = keccak256(abi_encode(CHANGE_TYPE, run_id, number, joiner, leaver))
    return typed_data._digest(self._domain(), fields)


@internal
@view
def _domain() -> bytes32:
    return typed_data._domain(keccak256(DOMAIN_NAME), keccak256(DOMAIN_VERSION))


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

# pragma version 0.4.3
# pragma nonreentrancy on
"""
@title Income split
@license Apache-2.0
@notice Where buyers pay when those who serve a model earn beside those who own it. A run's manifest names this contract
        as the payee; what arrives here, by whatever road, is split between the model's shares and its workers.

        `distribute` divides all that has ever arrived: `workers_bps` of it is the workers' part, rounded down, and the
        rest goes to the share contract, whose holders claim it there. The workers' part is given out by tallies: a
        Merkle root over what each worker has earned since the tally before, by receipts that his neighbours have
        signed. Like an epoch, a tally takes the signatures of more than two thirds of the run's workers, and waits out
        the run's challenge window, in which a third of them strikes it out. From then on its leaves are claimed.

        What cannot happen:
        - a worker paid without a tally of more than two thirds of the run's workers, before its window is over, or from
          a struck one;
        - a leaf paid twice, to anybody but its worker, or more paid from a tally than was posted;
        - tallies of more than the workers' part, by whatever signatures, or a tally that takes from an earlier one;
        - shares that get less than their part, or a division that depends on how often `distribute` is called;
        - a signature that serves twice, for another split, or on another chain.

        The books: received = passed to the shares + claimed + held, where held is the coins that stay here, and

            held = unclaimed of all tallies + what no tally has given out yet + what is still to be passed on

        with nothing to be passed on after any `distribute`.
@dev    The creator names the run, once, because the run's id follows from the manifest, and that names this contract.
        Workers look whether it was theirs before they work. A leaf is that of `model_share`, with the tally's number
        for the epoch's. `asset` must be a plain ERC-20: no fee on transfer, no rebasing.
@custom:kill Nobody can stop the contract. Workers end new tallies by not signing; claims stay open for ever, and so
        does the way of the shares' part. Without workers, what no tally has given out stays here.
"""

from ethereum.ercs import IERC20

from modules import typed_data

MAX_WORKERS: constant(uint256) = 128
MAX_DEPTH: constant(uint256) = 32
MAX_RECEIVED: constant(uint256) = 2**128 - 1
BPS: constant(uint256) = 10_000
NOTHING: constant(bytes32) = keccak256("nothing waits")  # not zero: a slot that is never empty is cheaper to fill
DOMAIN_NAME: constant(String[20]) = "Tessera income split"
DOMAIN_VERSION: constant(String[1]) = "1"
TALLY_TYPE: constant(bytes32) = keccak256(
    "Tally(bytes32 runId,uint256 tally,uint256 attempt,bytes32 root,uint256 amount)"
)
STRIKE_TYPE: constant(bytes32) = keccak256(
    "Strike(bytes32 runId,uint256 tally,uint256 attempt,bytes32 evidence)"
)


struct Terms:
    stages: uint256
    most: uint256
    stake: uint256
    window_s: uint256
    delay_s: uint256
    reward_bps: uint256
    epochs: uint256
    early_bps: uint256
    epoch_shares: uint256
    invited: bool


interface IRun:
    def asset() -> address: view
    def run_id() -> bytes32: view
    def share() -> address: view
    def terms() -> Terms: view
    def is_worker(account: address) -> bool: view
    def worker_count() -> uint256: view


struct Tally:
    root: bytes32
    unclaimed: uint256


asset: public(immutable(IERC20))
workers_bps: public(immutable(uint256))
creator: public(immutable(address))

run: public(IRun)  # empty before `begin`
run_id: public(bytes32)
share: public(address)
window_s: public(uint256)
received: public(uint256)  # all income that was divided
passed: public(uint256)  # to the shares
assigned: public(uint256)  # to workers, by all posted tallies
claimed: public(uint256)
tallies: public(HashMap[uint256, Tally])
tally_count: public(uint256)
counted: public(HashMap[bytes32, bool])  # leaves already paid
attempt: public(uint256)  # tallies struck, over all numbers
waiting: bytes32  # hash of the tally that waits out its window, or NOTHING


event Began:
    run: indexed(address)
    share: indexed(address)

event Distributed:
    income: uint256
    to_shares: uint256

event Proposed:
    tally: indexed(uint256)
    attempt: uint256
    root: bytes32
    amount: uint256
    opens_at: uint256
    signers: uint256

event Struck:
    tally: indexed(uint256)
    attempt: uint256
    evidence: bytes32
    signers: uint256

event Posted:
    tally: indexed(uint256)
    root: bytes32
    amount: uint256

event Claimed:
    tally: indexed(uint256)
    worker: indexed(address)
    amount: uint256


@deploy
def __init__(asset_: IERC20, workers_bps_: uint256):
    """
    @param asset_ The ERC-20 in which the model earns.
    @param workers_bps_ The part of the workers who serve, in 10,000; the shares get the rest.
    """
    assert asset_.address.is_contract, "income_split: asset is no contract"
    assert workers_bps_ > 0 and workers_bps_ < BPS, "income_split: bad part"
    asset = asset_
    workers_bps = workers_bps_
    creator = msg.sender
    self.waiting = NOTHING


@external
def begin(run_: IRun):
    """
    @notice Name the run whose workers serve and whose shares own. Once, by the creator, when the run has begun.
    """
    assert msg.sender == creator, "income_split: not the creator"
    assert self.run.address == empty(address), "income_split: has begun"
    assert staticcall run_.asset() == asset.address, "income_split: a run in another asset"
    share: address = staticcall run_.share()
    assert share != empty(address), "income_split: the run has not begun"
    self.run = run_
    self.share = share
    self.run_id = staticcall run_.run_id()
    self.window_s = (staticcall run_.terms()).window_s
    log Began(run=run_.address, share=share)


# --- income -----------------------------------------------------------------------------------------------------------


@external
def distribute() -> uint256:
    """
    @notice Divide what has arrived, and pass the shares' part on. Anyone may send it; before `begin` the money waits.
    @return What had arrived.
    """
    income: uint256 = self._arrived()
    if income == 0 or self.share == empty(address):
        return 0
    received: uint256 = self.received + income
    assert received <= MAX_RECEIVED, "income_split: too much income"
    self.received = received
    due: uint256 = received - self._part(received) - self.passed
    self.passed += due
    log Distributed(income=income, to_shares=due)
    if due > 0:
        self._pay(self.share, due)
    return income


@external
def claim(tally: uint256, worker: address, amount: uint256, proof: DynArray[bytes32, MAX_DEPTH]) -> uint256:
    """
    @notice Pay a worker what a tally gives him. Anyone may send it; the money goes to the worker alone.
    @param proof The siblings from the leaf up to the root.
    @return What was paid.
    """
    assert worker not in [empty(address), self], "income_split: bad worker"
    leaf: bytes32 = keccak256(keccak256(abi_encode(tally, worker, amount)))
    assert not self.counted[leaf], "income_split: already paid"
    assert self._fold(leaf, proof) == self.tallies[tally].root, "income_split: bad proof"
    assert amount <= self.tallies[tally].unclaimed, "income_split: tally exhausted"
    self.counted[leaf] = True
    self.tallies[tally].unclaimed -= amount
    self.claimed += amount
    log Claimed(tally=tally, worker=worker, amount=amount)
    self._pay(worker, amount)
    return amount


# --- tallies ----------------------------------------------------------------------------------------------------------


@external
def propose(tally: uint256, root: bytes32, amount: uint256, signatures: DynArray[Bytes[65], MAX_WORKERS]):
    """
    @notice Propose who is paid what. Anyone may send it; the signatures decide.
    @param tally The next one.
    @param root Merkle root over the leaves of all workers who served.
    @param amount The sum of all leaves, at most `unassigned`.
    @param signatures 65 bytes r, s, v over `tally_digest` with the present `attempt`, by ascending signer.
    """
    assert self.run.address != empty(address), "income_split: has not begun"
    assert self.waiting == NOTHING, "income_split: a tally is waiting"
    assert tally == self.tally_count, "income_split: not the next tally"
    assert amount > 0 and amount <= self._unassigned(), "income_split: more than the workers' part"
    attempt: uint256 = self.attempt
    digest: bytes32 = self._tally_digest(tally, attempt, root, amount)
    last: address = empty(address)
    for signature: Bytes[65] in signatures:
        last = self._next_signer(digest, signature, last)
    assert 3 * len(signatures) > 2 * staticcall self.run.worker_count(), "income_split: too few signatures"
    opens_at: uint256 = block.timestamp + self.window_s
    self.waiting = self._proposal(tally, root, amount, opens_at)
    log Proposed(
        tally=tally, attempt=attempt, root=root, amount=amount, opens_at=opens_at, signers=len(signatures)
    )


@external
def strike(
    tally: uint256,
    root: bytes32,
    amount: uint256,
    opens_at: uint256,
    evidence: bytes32,
    signatures: DynArray[Bytes[65], MAX_WORKERS],
):
    """
    @notice Strike out a waiting tally. A third of the workers is enough: it costs nothing but another tally.
    @param evidence The hash of what speaks against it.
    @param signatures Over `strike_digest` with the present `attempt`, as for `propose`.
    """
    assert self.waiting == self._proposal(tally, root, amount, opens_at), "income_split: not the waiting tally"
    assert block.timestamp < opens_at, "income_split: challenge window is over"
    attempt: uint256 = self.attempt
    digest: bytes32 = self._strike_digest(tally, attempt, evidence)
    last: address = empty(address)
    for signature: Bytes[65] in signatures:
        last = self._next_signer(digest, signature, last)
    enough: bool = 3 * len(signatures) >= staticcall self.run.worker_count()
    assert last != empty(address) and enough, "income_split: too few signatures"
    self.waiting = NOTHING
    self.attempt = attempt + 1
    log Struck(tally=tally, attempt=attempt, evidence=evidence, signers=len(signatures))


@external
def post(tally: uint256, root: bytes32, amount: uint256, opens_at: uint256):
    """
    @notice Make the tally whose challenge window is over claimable. Anyone may send it.
    """
    assert self.waiting == self._proposal(tally, root, amount, opens_at), "income_split: not the waiting tally"
    assert block.timestamp >= opens_at, "income_split: challenge window is open"
    self.waiting = NOTHING
    self.tally_count = tally + 1
    self.assigned += amount
    self.tallies[tally] = Tally(root=root, unclaimed=amount)
    log Posted(tally=tally, root=root, amount=amount)


# --- reading ----------------------------------------------------------------------------------------------------------


@external
@view
def undistributed() -> uint256:
    """
    @notice What has arrived and waits for `distribute`.
    """
    return self._arrived()


@external
@view
def unassigned() -> uint256:
    """
    @notice Of the workers' part, what no posted tally has given out: the most that the next one can.
    """
    return self._unassigned()


@external
@view
def pending() -> bytes32:
    """
    @notice The hash of the tally that waits out its window: of its number, root, amount and the time when it can be
            posted. Empty when nothing waits.
    """
    return empty(bytes32) if self.waiting == NOTHING else self.waiting


@external
@view
def tally_digest(tally: uint256, attempt: uint256, root: bytes32, amount: uint256) -> bytes32:
    """
    @notice The EIP-712 digest that workers sign to propose a tally.
    """
    return self._tally_digest(tally, attempt, root, amount)


@external
@view
def strike_digest(tally: uint256, attempt: uint256, evidence: bytes32) -> bytes32:
    """
    @notice The EIP-712 digest that workers sign to strike a tally.
    """
    return self._strike_digest(tally, attempt, evidence)


@external
@view
def DOMAIN_SEPARATOR() -> bytes32:
    """
    @notice The EIP-712 domain of this contract.
    """
    return self._domain()


# --- inside -----------------------------------------------------------------------------------------------------------


@internal
@view
def _part(received: uint256) -> uint256:
    """
    @dev The workers' part of all income ever, rounded down: of the sum, so that small pieces lose nothing.
    """
    return received * workers_bps // BPS


@internal
@view
def _unassigned() -> uint256:
    return self._part(self.received) - self.assigned


@internal
@view
def _arrived() -> uint256:
    return staticcall asset.balanceOf(self) + self.passed + self.claimed - self.received


@internal
def _pay(receiver: address, amount: uint256):
    assert extcall asset.transfer(receiver, amount, default_return_value=True), "income_split: transfer failed"


@internal
@view
def _next_signer(digest: bytes32, signature: Bytes[65], last: address) -> address:
    """
    @dev A present worker's signature, by somebody above `last`: that nobody counts twice costs one comparison.
    """
    signer: address = typed_data._signer_of(digest, signature)
    assert staticcall self.run.is_worker(signer), "income_split: not a worker's signature"
    assert convert(signer, uint160) > convert(last, uint160), "income_split: signers not ascending"
    return signer


@internal
@pure
def _proposal(tally: uint256, root: bytes32, amount: uint256, opens_at: uint256) -> bytes32:
    return keccak256(abi_encode(tally, root, amount, opens_at))


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


@internal
@view
def _tally_digest(tally: uint256, attempt: uint256, root: bytes32, amount: uint256) -> bytes32:
    return self._digest(keccak256(abi_encode(TALLY_TYPE, self.run_id, tally, attempt, root, amount)))


@internal
@view
def _strike_digest(tally: uint256, attempt: uint256, evidence: bytes32) -> bytes32:
    return self._digest(keccak256(abi_encode(STRIKE_TYPE, self.run_id, tally, attempt, evidence)))


@internal
@view
def _digest(fields: bytes32) -> bytes32:
    return typed_data._digest(self._domain(), fields)


@internal
@view
def _domain() -> bytes32:
    return typed_data._domain(keccak256(DOMAIN_NAME), keccak256(DOMAIN_VERSION))

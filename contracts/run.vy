# pragma version 0.4.3
# pragma nonreentrancy on
"""
@title Run
@license Apache-2.0
@notice Who trains one model together, what they risk for it, and which epochs of their work become shares.

        A candidate bonds the stake, and the hash of the block that took it draws his stage among the least served
        ones. The workers look whether he is there and can do it; signed by more than two thirds of them he is one of
        them. Leaving is announced, and the bond stays for a delay that outlasts every challenge window.

        The bond is the same for everybody, and whoever loses it is no worker any more: one worker is one part of the
        bonded stake, and more than two thirds of the workers are more than two thirds of it.

        An epoch is proposed with their signatures, waits out the challenge window, and is then posted: shares exist
        from there. While it waits, a third of the workers strikes it out, and it is proposed anew. Who contradicts
        himself under his own signature loses his bond to anybody's proof; who failed an audit loses it to a verdict
        of more than two thirds of the others. A part goes to whoever proved it, the rest is income of the shares.

        What cannot happen:
        - shares without the signatures, before the window is over, beyond the epoch's cap, from a struck proposal,
          or twice for one epoch;
        - a worker without a bond, one account or one peer in two places or once more, a stage of one's own choice;
        - a bond paid to anybody but who bonded it, before its delay, twice, or after it was slashed;
        - a signature that serves twice: changes are numbered, proposals too, and a bond is lost once.

        The books: asset balance >= bonded = sum of the bonds of all members. A member's status only moves forward.
@dev    The creator chooses the founders and, in an invited run, who may bond; after `begin` he decides nothing else.
        The draw is as unpredictable as the block: who makes blocks, or can foresee the next one on a chain that makes
        one for each transaction, can choose among the least served stages.
@custom:kill Nobody can stop the contract. Workers end new issuance by not signing; bonds are withdrawn after leaving.
"""

from ethereum.ercs import IERC20

from modules import typed_data

MAX_WORKERS: constant(uint256) = 128
MAX_REWARD: constant(uint256) = 5_000  # bps: who proves his own fault must not get most of it back
BPS: constant(uint256) = 10_000
DAY: constant(uint256) = 86_400
MAX_EPOCHS: constant(uint256) = 2**24
MAX_EPOCH_SHARES: constant(uint256) = 2**96  # all epochs at 100 times the weight stay below the 2**128 of `model_share`
CANDIDATE_S: constant(uint256) = 3_600  # how long the workers have to take a candidate in
NOTHING: constant(bytes32) = keccak256("nothing waits")  # not zero: a slot that is never empty is cheaper to fill
DOMAIN_NAME: constant(String[11]) = "Tessera run"
DOMAIN_VERSION: constant(String[1]) = "1"
EPOCH_TYPE: constant(bytes32) = keccak256(
    "Epoch(bytes32 runId,uint256 epoch,uint256 attempt,bytes32 root,uint256 shares)"
)
STRIKE_TYPE: constant(bytes32) = keccak256(
    "Strike(bytes32 runId,uint256 epoch,uint256 attempt,bytes32 evidence)"
)
CHANGE_TYPE: constant(bytes32) = keccak256("Change(bytes32 runId,uint256 number,address joiner,address leaver)")
SLASH_TYPE: constant(bytes32) = keccak256("Slash(bytes32 runId,address worker,bytes32 evidence,address challenger)")
RECEIPT_TYPE: constant(bytes32) = keccak256("Receipt(bytes32 runId,bytes32 subject,bytes32 content)")


interface IAsset:
    def receiveWithAuthorization(
        owner: address, receiver: address, amount: uint256, valid_after: uint256, valid_before: uint256,
        nonce: bytes32, v: uint8, r: bytes32, s: bytes32
    ): nonpayable


interface IShare:
    def issuer() -> address: view
    def asset() -> address: view
    def run_id() -> bytes32: view
    def epoch_count() -> uint256: view
    def post(epoch: uint256, root: bytes32, shares: uint256): nonpayable


# In the order in which a member may pass through them; slashed can follow on each that holds a bond.
flag Status:
    BONDED  # waits for the draw
    DRAWN  # has a stage, and waits for the workers
    WORKER
    LEAVING  # a worker still, whose stage looks for another
    LEFT  # the bond waits out its delay
    WITHDRAWN
    SLASHED


struct Terms:
    stages: uint256
    most: uint256  # workers of one stage
    stake: uint256  # of each worker, smallest unit of the asset; 0 = none
    window_s: uint256  # a proposal's challenge window
    delay_s: uint256  # from leaving to the bond, and from announcing to leaving without the others
    reward_bps: uint256  # of a slashed bond, to who proved the fault
    epochs: uint256  # over which the weight of work falls to 10,000 bps
    early_bps: uint256  # weight of the first epoch's work
    epoch_shares: uint256  # an epoch's cap at weight 10,000
    invited: bool  # only whom the creator brings may bond


struct Member:
    status: Status
    stage: uint256
    peer: bytes32  # the ed25519 key under which he is found
    bond: uint256
    since: uint256  # DRAWN, LEAVING: when that began. LEFT: when the bond is free. Seconds
    beacon: uint256  # the block whose hash draws


struct Change:
    joiner: address  # nobody when empty
    leaver: address  # nobody when empty


asset: public(immutable(IERC20))
run_id: public(immutable(bytes32))
creator: public(immutable(address))
terms: public(immutable(Terms))

share: public(IShare)  # empty before `begin`
members: public(HashMap[address, Member])
peers: public(HashMap[bytes32, address])  # of workers, past ones too: one peer, one account
served: public(HashMap[uint256, uint256])  # by stage: who is there, or on his way there, and stays
workers: public(DynArray[address, MAX_WORKERS])  # the present ones, in no lasting order
bonded: public(uint256)
change_count: public(uint256)
changes: public(HashMap[uint256, Change])
attempt: public(uint256)  # proposals struck, over all epochs
waiting: bytes32  # hash of the proposal that waits out its window, or NOTHING


event Bonded:
    account: indexed(address)
    peer: indexed(bytes32)
    amount: uint256

event Drawn:
    account: indexed(address)
    stage: indexed(uint256)

event Began:
    share: indexed(address)
    workers: uint256

event Changed:
    number: indexed(uint256)
    joiner: indexed(address)
    leaver: indexed(address)

event Leaving:
    account: indexed(address)

event Left:
    account: indexed(address)
    free_at: uint256

event Withdrawn:
    account: indexed(address)
    amount: uint256

event Proposed:
    epoch: indexed(uint256)
    attempt: uint256
    root: bytes32
    shares: uint256
    opens_at: uint256
    signers: uint256

event Struck:
    epoch: indexed(uint256)
    attempt: uint256
    evidence: bytes32
    signers: uint256

event Slashed:
    worker: indexed(address)
    challenger: indexed(address)
    evidence: bytes32
    amount: uint256
    reward: uint256


@deploy
def __init__(asset_: IERC20, run_id_: bytes32, terms_: Terms):
    """
    @param asset_ What is bonded: a plain ERC-20 with EIP-3009, no fee on transfer, no rebasing.
    @param run_id_ The hash of the run's manifest, from which the terms follow.
    """
    assert asset_.address.is_contract, "run: asset is no contract"
    assert terms_.stages > 0 and terms_.most > 0 and terms_.stages <= MAX_WORKERS, "run: bad stages"
    assert terms_.delay_s > terms_.window_s, "run: bonds must outlast the challenge window"
    assert terms_.delay_s <= 365 * DAY, "run: delay above a year"
    assert terms_.reward_bps <= MAX_REWARD, "run: reward above half"
    assert terms_.early_bps >= BPS and terms_.early_bps <= 100 * BPS, "run: bad early weight"
    assert terms_.epochs > 0 and terms_.epochs <= MAX_EPOCHS, "run: bad schedule"
    assert terms_.epoch_shares <= MAX_EPOCH_SHARES, "run: bad schedule"
    assert terms_.invited or terms_.stake > 0, "run: open to all without a stake"
    asset = asset_
    run_id = run_id_
    creator = msg.sender
    terms = terms_
    self.waiting = NOTHING


# --- coming -----------------------------------------------------------------------------------------------------------


@external
def bond(worker: address, peer: bytes32, valid_after: uint256, valid_before: uint256, v: uint8, r: bytes32, s: bytes32):
    """
    @notice Become a candidate. The stake comes by the worker's EIP-3009 authorization, so that he needs no gas.
    @dev The authorization's nonce is `bond_nonce`, and only its receiver, which is this contract, can use it: whoever
         sees it first can do nothing with it but this. Without a stake only the creator calls, because such a run is
         invited, and the authorization is not looked at.
    @param peer The ed25519 key of the worker's node. Somebody else may name it too, for nothing: the workers take in
           the account that the peer itself names.
    """
    assert not terms.invited or msg.sender == creator, "run: only by invitation"
    assert self.members[worker].status == empty(Status) and worker != empty(address), "run: account had a seat"
    assert self.peers[peer] == empty(address) and peer != empty(bytes32), "run: peer had a seat"
    amount: uint256 = terms.stake
    self.members[worker] = Member(
        status=Status.BONDED, stage=0, peer=peer, bond=amount, since=block.timestamp, beacon=block.number
    )
    self.bonded += amount
    log Bonded(account=worker, peer=peer, amount=amount)
    if amount > 0:
        self._collect(worker, peer, amount, valid_after, valid_before, v, r, s)


@external
def draw(account: address):
    """
    @notice Give a candidate his stage: one of the least served, by the hash of the block that took his bond. Anyone may
            send it, from the next block on. When that hash is out of reach (after 256 blocks) a later one draws.
    """
    member: Member = self.members[account]
    assert member.status == Status.BONDED, "run: no candidate without a stage"
    assert block.number > member.beacon, "run: too early to draw"
    if block.number - member.beacon > 256:
        self.members[account].beacon = block.number
        return
    seed: bytes32 = keccak256(concat(blockhash(member.beacon), convert(account, bytes20)))
    stage: uint256 = self._pick(convert(seed, uint256))
    self.served[stage] += 1
    self.members[account].status = Status.DRAWN
    self.members[account].stage = stage
    self.members[account].since = block.timestamp
    log Drawn(account=account, stage=stage)


@external
def begin(share_: IShare, founders: DynArray[address, MAX_WORKERS]):
    """
    @notice Start with these candidates, who serve every stage. Once, by the creator.
    @param share_ The model share that this contract issues.
    """
    assert msg.sender == creator, "run: not the creator"
    assert self.share.address == empty(address), "run: has begun"
    assert staticcall share_.issuer() == self, "run: another contract issues that share"
    assert staticcall share_.run_id() == run_id, "run: a share of another run"
    assert staticcall share_.asset() == asset.address, "run: a share that earns in another asset"
    served: uint256 = 0
    for founder: address in founders:
        self._admit(founder)
        served |= 1 << self.members[founder].stage
    assert served == (1 << terms.stages) - 1, "run: a stage without a worker"
    self.share = share_
    log Began(share=share_.address, workers=len(founders))


@external
def change(number: uint256, joiner: address, leaver: address, signatures: DynArray[Bytes[65], MAX_WORKERS]):
    """
    @notice Admit `joiner`, let `leaver` go, or both. Anyone may send it; the signatures decide.
    @param number The next one: each change comes exactly once, in order, so that no signature serves twice.
    @param joiner A candidate with a stage; empty when nobody joins.
    @param leaver A worker; empty when nobody leaves. The last one goes by `exit`.
    @param signatures 65 bytes r, s, v over `change_digest`, by ascending signer, from more than two thirds of the
           workers before the change.
    """
    assert number == self.change_count, "run: not the next change"
    assert joiner != leaver, "run: empty change"
    digest: bytes32 = self._change_digest(number, joiner, leaver)
    last: address = empty(address)
    for signature: Bytes[65] in signatures:
        last = self._next_signer(digest, signature, last, empty(address))
    assert 3 * len(signatures) > 2 * len(self.workers), "run: too few signatures"
    if leaver != empty(address):
        self._remove(leaver)
        self._release(leaver)
    if joiner != empty(address):
        self._admit(joiner)
    assert len(self.workers) > 0, "run: last worker"
    self._record(joiner, leaver)


@external
def expire(candidate: address):
    """
    @notice Give up a candidate whom the workers have not taken in within an hour of his draw, or who was never drawn.
            His bond is free after the delay. Anyone may send it; before `begin`, when candidates wait for each other,
            only he or the creator.
    """
    member: Member = self.members[candidate]
    assert member.status in (Status.BONDED | Status.DRAWN), "run: no candidate"
    assert block.timestamp > member.since + CANDIDATE_S, "run: candidate may still be taken in"
    assert self.share.address != empty(address) or msg.sender in [candidate, creator], "run: has not begun"
    if member.status == Status.DRAWN:
        self.served[member.stage] -= 1
    self._release(candidate)


# --- going ------------------------------------------------------------------------------------------------------------


@external
def leave():
    """
    @notice Say that one wants to leave: the next candidates are drawn to the caller's stage. He goes on working until
            the others let him go by `change`, or until the delay is over and he goes by `exit`.
    """
    assert self.members[msg.sender].status == Status.WORKER, "run: not a worker"
    self.members[msg.sender].status = Status.LEAVING
    self.members[msg.sender].since = block.timestamp
    self.served[self.members[msg.sender].stage] -= 1
    log Leaving(account=msg.sender)


@external
def exit():
    """
    @notice Go without the others' signatures, a delay after `leave`. The bond is free after another delay. When the
            last worker goes, the run is over: nothing can be proposed any more, and what has been posted goes on.
    """
    member: Member = self.members[msg.sender]
    assert member.status == Status.LEAVING, "run: has not announced to leave"
    assert block.timestamp >= member.since + terms.delay_s, "run: too early to leave alone"
    self._remove(msg.sender)
    self._release(msg.sender)
    self._record(empty(address), msg.sender)


@external
def withdraw(account: address) -> uint256:
    """
    @notice Pay back the bond of who has left, to himself, when the delay is over. Anyone may send it.
    @return What was paid.
    """
    member: Member = self.members[account]
    assert member.status == Status.LEFT, "run: nothing to withdraw"
    assert block.timestamp >= member.since, "run: bond is still at risk"
    self.members[account].status = Status.WITHDRAWN
    self.members[account].bond = 0
    self.bonded -= member.bond
    log Withdrawn(account=account, amount=member.bond)
    self._pay(account, member.bond)
    return member.bond


# --- epochs -----------------------------------------------------------------------------------------------------------


@external
def propose(epoch: uint256, root: bytes32, shares: uint256, signatures: DynArray[Bytes[65], MAX_WORKERS]):
    """
    @notice Propose an epoch of work. Anyone may send it; the signatures decide.
    @param epoch The share's next one.
    @param root Merkle root over the leaves of all contributors; empty with no shares, when nobody's work was verified.
    @param shares The sum of all leaves, at most `cap(epoch)`.
    @param signatures Over `epoch_digest` with the present `attempt`, as for `change`.
    """
    assert self.share.address != empty(address), "run: has not begun"
    assert self.waiting == NOTHING, "run: a proposal is waiting"
    assert epoch == staticcall self.share.epoch_count(), "run: not the next epoch"
    assert shares <= self._cap(epoch), "run: too many shares"
    attempt: uint256 = self.attempt
    digest: bytes32 = self._epoch_digest(epoch, attempt, root, shares)
    last: address = empty(address)
    for signature: Bytes[65] in signatures:
        last = self._next_signer(digest, signature, last, empty(address))
    assert 3 * len(signatures) > 2 * len(self.workers), "run: too few signatures"
    opens_at: uint256 = block.timestamp + terms.window_s
    self.waiting = self._proposal(epoch, root, shares, opens_at)
    log Proposed(
        epoch=epoch, attempt=attempt, root=root, shares=shares, opens_at=opens_at, signers=len(signatures)
    )


@external
def strike(
    epoch: uint256,
    root: bytes32,
    shares: uint256,
    opens_at: uint256,
    evidence: bytes32,
    signatures: DynArray[Bytes[65], MAX_WORKERS],
):
    """
    @notice Strike out a waiting proposal. A third of the workers is enough: it costs nothing but another proposal.
    @param evidence The hash of what speaks against it.
    @param signatures Over `strike_digest` with the present `attempt`, as for `change`.
    """
    assert self.waiting == self._proposal(epoch, root, shares, opens_at), "run: not the waiting proposal"
    assert block.timestamp < opens_at, "run: challenge window is over"
    attempt: uint256 = self.attempt
    digest: bytes32 = self._strike_digest(epoch, attempt, evidence)
    last: address = empty(address)
    for signature: Bytes[65] in signatures:
        last = self._next_signer(digest, signature, last, empty(address))
    assert last != empty(address) and 3 * len(signatures) >= len(self.workers), "run: too few signatures"
    self.waiting = NOTHING
    self.attempt = attempt + 1
    log Struck(epoch=epoch, attempt=attempt, evidence=evidence, signers=len(signatures))


@external
def post(epoch: uint256, root: bytes32, shares: uint256, opens_at: uint256):
    """
    @notice Make shares of the proposal whose challenge window is over. Anyone may send it.
    """
    assert self.waiting == self._proposal(epoch, root, shares, opens_at), "run: not the waiting proposal"
    assert block.timestamp >= opens_at, "run: challenge window is open"
    self.waiting = NOTHING
    extcall self.share.post(epoch, root, shares)


# --- disputes ---------------------------------------------------------------------------------------------------------


@external
def slash(
    worker: address, evidence: bytes32, challenger: address, signatures: DynArray[Bytes[65], MAX_WORKERS]
):
    """
    @notice Take the bond of who failed an audit, or signed what is false: by more than two thirds of the other workers,
            and never by one alone, who would name himself as challenger.
    @param evidence The hash of the evidence, which the signers have checked.
    @param challenger Who brought it, and is rewarded.
    @param signatures Over `slash_digest`, as for `change`. The accused has no voice.
    """
    digest: bytes32 = self._slash_digest(worker, evidence, challenger)
    last: address = empty(address)
    for signature: Bytes[65] in signatures:
        last = self._next_signer(digest, signature, last, worker)
    others: uint256 = len(self.workers) - convert(self._is_worker(worker), uint256)
    assert len(signatures) > 1 and 3 * len(signatures) > 2 * others, "run: too few signatures"
    self._slash(worker, evidence, challenger)


@external
def contradict(
    worker: address,
    subject: bytes32,
    content: bytes32,
    signature: Bytes[65],
    other: bytes32,
    other_signature: Bytes[65],
):
    """
    @notice Take the bond of who signed two receipts that contradict each other: one subject, two contents. Anyone may
            send it, and is rewarded; no worker's consent is needed.
    @param subject What the receipts are about: run, epoch, step, neighbour and direction, hashed.
    """
    assert content != other, "run: receipts agree"
    assert typed_data._signer_of(self._receipt_digest(subject, content), signature) == worker, "run: not his receipt"
    assert typed_data._signer_of(self._receipt_digest(subject, other), other_signature) == worker, "run: not his receipt"
    self._slash(worker, subject, msg.sender)


# --- reading ----------------------------------------------------------------------------------------------------------


@external
@view
def worker_count() -> uint256:
    """
    @notice How many workers there are now: more than two thirds of them decide.
    """
    return len(self.workers)


@external
@view
def is_worker(account: address) -> bool:
    """
    @notice Whether `account` is one of them: also while he looks for another in his place.
    """
    return self._is_worker(account)


@external
@view
def pending() -> bytes32:
    """
    @notice The hash of the proposal that waits out its window: of its number, root, shares and the time when it can be
            posted. Empty when nothing waits.
    """
    return empty(bytes32) if self.waiting == NOTHING else self.waiting


@external
@view
def cap(epoch: uint256) -> uint256:
    """
    @notice The most shares that an epoch can become.
    """
    return self._cap(epoch)


@external
@view
def bond_nonce(worker: address, peer: bytes32) -> bytes32:
    """
    @notice The nonce of the EIP-3009 authorization that pays a worker's stake.
    """
    return self._bond_nonce(worker, peer)


@external
@view
def epoch_digest(epoch: uint256, attempt: uint256, root: bytes32, shares: uint256) -> bytes32:
    """
    @notice The EIP-712 digest that workers sign to propose an epoch.
    """
    return self._epoch_digest(epoch, attempt, root, shares)


@external
@view
def strike_digest(epoch: uint256, attempt: uint256, evidence: bytes32) -> bytes32:
    """
    @notice The EIP-712 digest that workers sign to strike a proposal.
    """
    return self._strike_digest(epoch, attempt, evidence)


@external
@view
def change_digest(number: uint256, joiner: address, leaver: address) -> bytes32:
    """
    @notice The EIP-712 digest that workers sign to let somebody in or out.
    """
    return self._change_digest(number, joiner, leaver)


@external
@view
def slash_digest(worker: address, evidence: bytes32, challenger: address) -> bytes32:
    """
    @notice The EIP-712 digest that workers sign to take a bond.
    """
    return self._slash_digest(worker, evidence, challenger)


@external
@view
def receipt_digest(subject: bytes32, content: bytes32) -> bytes32:
    """
    @notice The EIP-712 digest of a receipt that can be held against its signer here.
    """
    return self._receipt_digest(subject, content)


@external
@view
def DOMAIN_SEPARATOR() -> bytes32:
    """
    @notice The EIP-712 domain of this contract.
    """
    return self._domain()


# --- inside -----------------------------------------------------------------------------------------------------------


@internal
def _collect(
    worker: address, peer: bytes32, amount: uint256, valid_after: uint256, valid_before: uint256,
    v: uint8, r: bytes32, s: bytes32
):
    """
    @dev An asset without EIP-3009 may take the call for something else and answer nothing: the balance is looked at.
    """
    before: uint256 = staticcall asset.balanceOf(self)
    nonce: bytes32 = self._bond_nonce(worker, peer)
    extcall IAsset(asset.address).receiveWithAuthorization(
        worker, self, amount, valid_after, valid_before, nonce, v, r, s
    )
    assert staticcall asset.balanceOf(self) == before + amount, "run: stake did not arrive"


@internal
@view
def _is_worker(account: address) -> bool:
    return self.members[account].status in (Status.WORKER | Status.LEAVING)


@internal
def _admit(account: address):
    assert self.members[account].status == Status.DRAWN, "run: no candidate with a stage"
    assert len(self.workers) < MAX_WORKERS, "run: too many workers"
    peer: bytes32 = self.members[account].peer
    assert self.peers[peer] == empty(address), "run: peer had a seat"
    self.peers[peer] = account
    self.members[account].status = Status.WORKER
    self.workers.append(account)


@internal
def _remove(account: address):
    """
    @dev Off the list of workers: the last of it takes the empty place. The status is the caller's to set.
    """
    assert self._is_worker(account), "run: not a worker"
    if self.members[account].status == Status.WORKER:
        self.served[self.members[account].stage] -= 1
    last: address = self.workers.pop()
    if last == account:
        return
    for i: uint256 in range(len(self.workers), bound=MAX_WORKERS):
        if self.workers[i] == account:
            self.workers[i] = last
            return


@internal
def _release(account: address):
    self.members[account].status = Status.LEFT
    self.members[account].since = block.timestamp + terms.delay_s
    log Left(account=account, free_at=block.timestamp + terms.delay_s)


@internal
def _record(joiner: address, leaver: address):
    number: uint256 = self.change_count
    self.changes[number] = Change(joiner=joiner, leaver=leaver)
    self.change_count = number + 1
    log Changed(number=number, joiner=joiner, leaver=leaver)


@internal
def _slash(worker: address, evidence: bytes32, challenger: address):
    member: Member = self.members[worker]
    assert member.status in (Status.WORKER | Status.LEAVING | Status.LEFT), "run: no bond to take"
    assert challenger not in [empty(address), self], "run: bad challenger"
    if self._is_worker(worker):
        self._remove(worker)
        self._record(empty(address), worker)
    self.members[worker].status = Status.SLASHED
    self.members[worker].bond = 0
    self.bonded -= member.bond
    reward: uint256 = member.bond * terms.reward_bps // BPS
    log Slashed(worker=worker, challenger=challenger, evidence=evidence, amount=member.bond, reward=reward)
    self._pay(challenger, reward)
    self._pay(self.share.address, member.bond - reward)


@internal
def _pay(receiver: address, amount: uint256):
    if amount > 0:
        assert extcall asset.transfer(receiver, amount, default_return_value=True), "run: transfer failed"


@internal
@view
def _pick(seed: uint256) -> uint256:
    """
    @dev One of the least served stages that have room. Two passes: the least, then the one that the seed names.
    """
    least: uint256 = terms.most
    count: uint256 = 0
    for stage: uint256 in range(terms.stages, bound=MAX_WORKERS):
        here: uint256 = self.served[stage]
        if here < least:
            least = here
            count = 0
        if here == least and here < terms.most:
            count += 1
    assert count > 0, "run: every stage is full"
    left: uint256 = seed % count
    for stage: uint256 in range(terms.stages, bound=MAX_WORKERS):
        if self.served[stage] == least:
            if left == 0:
                return stage
            left -= 1
    raise  # `count` stages were counted above


@internal
@view
def _cap(epoch: uint256) -> uint256:
    """
    @dev The weight falls in equal steps from `early_bps` in the first epoch to 10,000 in the last. Then nothing is paid.
    """
    if epoch >= terms.epochs:
        return 0
    extra: uint256 = (terms.early_bps - BPS) * (terms.epochs - 1 - epoch) // max(terms.epochs - 1, 1)
    return terms.epoch_shares * (BPS + extra) // BPS


@internal
@view
def _next_signer(digest: bytes32, signature: Bytes[65], last: address, without: address) -> address:
    """
    @dev A worker's signature, by somebody above `last`: that nobody counts twice costs one comparison. The loop over
         all is in each caller, because a list that is handed on is copied, for 120 gas a signature and 3,700 besides.
    """
    signer: address = typed_data._signer_of(digest, signature)
    assert self._is_worker(signer) and signer != without, "run: not a worker's signature"
    assert convert(signer, uint160) > convert(last, uint160), "run: signers not ascending"
    return signer


@internal
@pure
def _proposal(epoch: uint256, root: bytes32, shares: uint256, opens_at: uint256) -> bytes32:
    return keccak256(abi_encode(epoch, root, shares, opens_at))


@internal
@view
def _bond_nonce(worker: address, peer: bytes32) -> bytes32:
    return keccak256(abi_encode(self, run_id, worker, peer))


@internal
@view
def _epoch_digest(epoch: uint256, attempt: uint256, root: bytes32, shares: uint256) -> bytes32:
    return self._digest(keccak256(abi_encode(EPOCH_TYPE, run_id, epoch, attempt, root, shares)))


@internal
@view
def _strike_digest(epoch: uint256, attempt: uint256, evidence: bytes32) -> bytes32:
    return self._digest(keccak256(abi_encode(STRIKE_TYPE, run_id, epoch, attempt, evidence)))


@internal
@view
def _change_digest(number: uint256, joiner: address, leaver: address) -> bytes32:
    return self._digest(keccak256(abi_encode(CHANGE_TYPE, run_id, number, joiner, leaver)))


@internal
@view
def _slash_digest(worker: address, evidence: bytes32, challenger: address) -> bytes32:
    return self._digest(keccak256(abi_encode(SLASH_TYPE, run_id, worker, evidence, challenger)))


@internal
@view
def _receipt_digest(subject: bytes32, content: bytes32) -> bytes32:
    return self._digest(keccak256(abi_encode(RECEIPT_TYPE, run_id, subject, content)))


@internal
@view
def _digest(fields: bytes32) -> bytes32:
    return typed_data._digest(self._domain(), fields)


@internal
@view
def _domain() -> bytes32:
    return typed_data._domain(keccak256(DOMAIN_NAME), keccak256(DOMAIN_VERSION))

# pragma version 0.4.3
# pragma nonreentrancy on
"""
@title Job escrow
@license Apache-2.0
@notice Paid work between strangers, with the states and calls of ERC-8183: a client locks a budget, a provider submits
        work, an evaluator says whether it is paid for.

            Open -> Funded -> Submitted -> Completed | Rejected | Expired

        Terms are fixed at creation, and three of them go beyond the standard:
        - `on_silence`, the provider's part of the budget in 1/10,000 when the evaluator says nothing about submitted
          work until `expiredAt` + `grace`: 0 refunds the client, 10,000 pays the provider, in between splits.
        - `bond`, which the evaluator locks before the job is funded. Who judges gets it back, whatever he says; who is
          silent loses it: each party gets the part of the bond that it did not get of the budget, because that is what
          silence may have cost it. Nobody gains by silence what the evaluator could not have given by judging: with
          either party he shares budget and bond at most, as much as `complete` or `reject` gives the two of them.
        - `hook`, a contract that hears of each action. It may refuse as long as the job is Open. Once money is at stake
          it is told and not asked: with limited gas, and whatever it does the action goes on. Otherwise a client's hook
          could silence the evaluator, and take his bond and the provider's pay.

        What cannot happen:
        - a payment of a job's money twice, to anybody but its parties, or by the terms of another job;
        - a status that goes back, or a second end of a job;
        - a job that nobody can close: after `expiredAt` (Submitted: + `grace`) anybody can, and neither hook, evaluator
          nor a payee that cannot be paid stops it (his money waits for `withdraw`);
        - a contract that owes more than it holds: sum of budgets and bonds of live jobs + sum of `owed` <= balance;
        - an authorization by signature used for another job, other terms or another budget.
@dev    A record takes three words, four with a hook: amounts have 96 bits, times 40. `asset` must be a plain ERC-20: no
        fee on transfer, no rebasing. What arrives by a plain transfer is nobody's. Where the standard lets `claimRefund`
        take a submitted job at `expiredAt`, here it waits for `grace`, and where it lets a hook refuse any action, here
        it cannot once the job is funded.
@custom:kill Nobody can stop the contract. Clients end it by creating no more jobs; each job ends by its own clock.
"""

from ethereum.ercs import IERC20


interface Payments:
    def receiveWithAuthorization(
        sender: address,
        receiver: address,
        amount: uint256,
        valid_after: uint256,
        valid_before: uint256,
        nonce: bytes32,
        v: uint8,
        r: bytes32,
        s: bytes32,
    ): nonpayable


OPEN: constant(uint256) = 0
FUNDED: constant(uint256) = 1
SUBMITTED: constant(uint256) = 2
COMPLETED: constant(uint256) = 3
REJECTED: constant(uint256) = 4
EXPIRED: constant(uint256) = 5

WHOLE: constant(uint256) = 10_000
MAX_AMOUNT: constant(uint256) = 2**96 - 1
MAX_TIME: constant(uint256) = 2**40 - 1
MAX_GRACE: constant(uint256) = 30 * 86_400
MAX_DESCRIPTION: constant(uint256) = 2_048
MAX_PARAMS: constant(uint256) = 1_024
HOOK_GAS: constant(uint256) = 150_000
HOOK_ROOM: constant(uint256) = HOOK_GAS + HOOK_GAS // 32 + 10_000  # a call passes on 63/64 of what is left
ACCOUNT: constant(uint256) = 2**160 - 1
BEFORE: constant(Bytes[4]) = method_id("beforeAction(uint256,bytes4,bytes)")
AFTER: constant(Bytes[4]) = method_id("afterAction(uint256,bytes4,bytes)")
SET_PROVIDER: constant(bytes4) = method_id("setProvider(uint256,address,bytes)", output_type=bytes4)
SET_BUDGET: constant(bytes4) = method_id("setBudget(uint256,uint256,bytes)", output_type=bytes4)
FUND: constant(bytes4) = method_id("fund(uint256,uint256,bytes)", output_type=bytes4)
SUBMIT: constant(bytes4) = method_id("submit(uint256,bytes32,bytes)", output_type=bytes4)
COMPLETE: constant(bytes4) = method_id("complete(uint256,bytes32,bytes)", output_type=bytes4)
REJECT: constant(bytes4) = method_id("reject(uint256,bytes32,bytes)", output_type=bytes4)

asset: public(immutable(IERC20))
grace: public(immutable(uint256))  # seconds that an evaluator has at least


struct Job:
    client: address
    provider: address  # empty until it is set
    evaluator: address
    hook: address  # empty for none
    budget: uint256
    bond: uint256
    expiredAt: uint256  # seconds since 1970
    on_silence: uint256  # the provider's part, in 1/10,000
    status: uint256
    bonded: bool  # the bond came, and was not taken back from the open job


struct Record:
    head: uint256  # client, expiredAt << 160, status << 200, on_silence << 208, bonded << 224, has a hook << 232
    offer: uint256  # provider, budget << 160
    judge: uint256  # evaluator, bond << 160
    hook: address


job_count: public(uint256)  # ids begin at 1
records: HashMap[uint256, Record]
owed: public(HashMap[address, uint256])  # payments that failed


event JobCreated:
    jobId: indexed(uint256)
    client: indexed(address)
    provider: indexed(address)
    evaluator: address
    expiredAt: uint256

event JobTerms:
    jobId: indexed(uint256)
    description: String[MAX_DESCRIPTION]
    hook: address
    on_silence: uint256
    bond: uint256

event ProviderSet:
    jobId: indexed(uint256)
    provider: indexed(address)

event BudgetSet:
    jobId: indexed(uint256)
    amount: uint256

event BondPosted:
    jobId: indexed(uint256)
    evaluator: indexed(address)
    amount: uint256

event BondReturned:
    jobId: indexed(uint256)
    evaluator: indexed(address)
    amount: uint256

event EvaluatorSlashed:
    jobId: indexed(uint256)
    evaluator: indexed(address)
    to_client: uint256
    to_provider: uint256

event JobFunded:
    jobId: indexed(uint256)
    client: indexed(address)
    amount: uint256

event JobSubmitted:
    jobId: indexed(uint256)
    provider: indexed(address)
    deliverable: bytes32

event JobCompleted:
    jobId: indexed(uint256)
    evaluator: indexed(address)
    reason: bytes32

event JobRejected:
    jobId: indexed(uint256)
    rejector: indexed(address)
    reason: bytes32

event JobExpired:
    jobId: indexed(uint256)

event PaymentReleased:
    jobId: indexed(uint256)
    provider: indexed(address)
    amount: uint256

event Refunded:
    jobId: indexed(uint256)
    client: indexed(address)
    amount: uint256

event HookFailed:
    jobId: indexed(uint256)
    selector: bytes4

event PaymentFailed:
    payee: indexed(address)
    amount: uint256

event Withdrawn:
    payee: indexed(address)
    amount: uint256


@deploy
def __init__(asset_: IERC20, grace_: uint256):
    """
    @param asset_ The ERC-20 of all budgets and bonds.
    @param grace_ Seconds that an evaluator has after a job's deadline: at most 30 days.
    """
    assert asset_.address.is_contract, "job_escrow: asset is no contract"
    assert grace_ <= MAX_GRACE, "job_escrow: grace too long"
    asset = asset_
    grace = grace_


# --- an open job ------------------------------------------------------------------------------------------------------


@external
def createJob(
    provider: address,
    evaluator: address,
    expiredAt: uint256,
    description: String[MAX_DESCRIPTION],
    hook: address = empty(address),
    on_silence: uint256 = 0,
    bond: uint256 = 0,
) -> uint256:
    """
    @notice Offer a job. The caller is its client.
    @param provider Who shall do it; empty to say so later with `setProvider`.
    @param evaluator Who judges the work: the client himself or somebody else, but not the provider.
    @param expiredAt Until when work may be submitted, in seconds since 1970.
    @param hook A contract with `beforeAction` and `afterAction`, or empty.
    @param on_silence The provider's part of the budget when the evaluator is silent, in 1/10,000.
    @param bond What the evaluator must lock before the job is funded, and loses by silence.
    @return The job's id.
    """
    assert evaluator not in [empty(address), self], "job_escrow: bad evaluator"
    assert block.timestamp < expiredAt and expiredAt <= MAX_TIME, "job_escrow: bad deadline"
    assert hook == empty(address) or hook.is_contract, "job_escrow: hook is no contract"
    assert on_silence <= WHOLE, "job_escrow: bad part"
    assert bond <= MAX_AMOUNT, "job_escrow: bond too large"
    if provider != empty(address):
        self._check_provider(provider, msg.sender, evaluator)
    id: uint256 = self.job_count + 1
    self.job_count = id
    self._create(id, provider, evaluator, expiredAt, hook, on_silence, bond)
    log JobCreated(jobId=id, client=msg.sender, provider=provider, evaluator=evaluator, expiredAt=expiredAt)
    log JobTerms(jobId=id, description=description, hook=hook, on_silence=on_silence, bond=bond)
    return id


@external
def setProvider(jobId: uint256, provider: address, optParams: Bytes[MAX_PARAMS] = b""):
    """
    @notice The client names the provider of a job that has none.
    @param optParams Whatever the hook understands; so in all other calls.
    """
    job: Job = self._open(jobId)
    assert msg.sender == job.client, "job_escrow: not the client"
    assert job.provider == empty(address), "job_escrow: provider is set"
    self._check_provider(provider, job.client, job.evaluator)
    data: Bytes[MAX_PARAMS + 160] = abi_encode(provider, optParams)
    self._ask(BEFORE, jobId, job.hook, SET_PROVIDER, data)
    self.records[jobId].offer = self._pair(provider, job.budget)
    log ProviderSet(jobId=jobId, provider=provider)
    self._ask(AFTER, jobId, job.hook, SET_PROVIDER, data)


@external
def setBudget(jobId: uint256, amount: uint256, optParams: Bytes[MAX_PARAMS] = b""):
    """
    @notice Client or provider proposes a price. The last one counts, and `fund` names it.
    """
    job: Job = self._open(jobId)
    assert msg.sender in [job.client, job.provider], "job_escrow: neither client nor provider"
    assert amount <= MAX_AMOUNT, "job_escrow: budget too large"
    data: Bytes[MAX_PARAMS + 160] = abi_encode(amount, optParams)
    self._ask(BEFORE, jobId, job.hook, SET_BUDGET, data)
    self.records[jobId].offer = self._pair(job.provider, amount)
    log BudgetSet(jobId=jobId, amount=amount)
    self._ask(AFTER, jobId, job.hook, SET_BUDGET, data)


@external
def postBond(jobId: uint256):
    """
    @notice The evaluator takes the job on: he locks its bond, from his allowance.
    """
    job: Job = self._open(jobId)
    assert msg.sender == job.evaluator, "job_escrow: not the evaluator"
    assert job.bond > 0 and not job.bonded, "job_escrow: no bond to post"
    job.bonded = True
    self._write(jobId, job)
    log BondPosted(jobId=jobId, evaluator=job.evaluator, amount=job.bond)
    self._pull(job.evaluator, job.bond)


@external
def withdrawBond(jobId: uint256):
    """
    @notice The evaluator takes his bond back from a job that is not funded.
    """
    job: Job = self._open(jobId)
    assert msg.sender == job.evaluator, "job_escrow: not the evaluator"
    assert job.bonded, "job_escrow: no bond here"
    job.bonded = False
    self._write(jobId, job)
    log BondReturned(jobId=jobId, evaluator=job.evaluator, amount=job.bond)
    self._pay(job.evaluator, job.bond)


@external
def fund(jobId: uint256, expectedBudget: uint256, optParams: Bytes[MAX_PARAMS] = b""):
    """
    @notice The client locks the budget, from his allowance.
    @param expectedBudget What the client agreed to: a price changed a moment ago makes the call fail.
    """
    job: Job = self._fundable(jobId, expectedBudget)
    assert msg.sender == job.client, "job_escrow: not the client"
    self._ask(BEFORE, jobId, job.hook, FUND, optParams)
    self._funded(jobId, job)
    self._pull(job.client, job.budget)
    self._ask(AFTER, jobId, job.hook, FUND, optParams)


@external
def fundWithAuthorization(
    jobId: uint256,
    expectedBudget: uint256,
    validAfter: uint256,
    validBefore: uint256,
    v: uint8,
    r: bytes32,
    s: bytes32,
):
    """
    @notice The same by an EIP-3009 `ReceiveWithAuthorization` that the client has signed. Anyone may send it.
    @dev    It must pay this contract with `funding_nonce` as its nonce: nobody else can use it, and only as meant.
            Whoever runs ahead does the client's own bidding. No `optParams`, because nobody has signed them.
    """
    job: Job = self._fundable(jobId, expectedBudget)
    self._ask(BEFORE, jobId, job.hook, FUND, b"")
    self._funded(jobId, job)
    due: uint256 = staticcall asset.balanceOf(self) + job.budget
    nonce: bytes32 = self._funding_nonce(jobId, job)
    extcall Payments(asset.address).receiveWithAuthorization(
        job.client, self, job.budget, validAfter, validBefore, nonce, v, r, s
    )
    assert staticcall asset.balanceOf(self) >= due, "job_escrow: nothing arrived"  # an asset may answer any call
    self._ask(AFTER, jobId, job.hook, FUND, b"")


# --- a funded job -----------------------------------------------------------------------------------------------------


@external
def submit(jobId: uint256, deliverable: bytes32, optParams: Bytes[MAX_PARAMS] = b""):
    """
    @notice The provider hands in his work, before the deadline.
    @param deliverable Which work: the hash of a file, for one.
    """
    job: Job = self._load(jobId)
    assert job.status == FUNDED, "job_escrow: not funded"
    assert msg.sender == job.provider, "job_escrow: not the provider"
    assert block.timestamp < job.expiredAt, "job_escrow: too late"
    data: Bytes[MAX_PARAMS + 160] = abi_encode(deliverable, optParams)
    self._tell(BEFORE, jobId, job.hook, SUBMIT, data)
    self._move(jobId, job, SUBMITTED)
    log JobSubmitted(jobId=jobId, provider=job.provider, deliverable=deliverable)
    self._tell(AFTER, jobId, job.hook, SUBMIT, data)


@external
def complete(jobId: uint256, reason: bytes32, optParams: Bytes[MAX_PARAMS] = b""):
    """
    @notice The evaluator accepts the work: the provider is paid.
    @param reason Why: the hash of a report, for one.
    """
    job: Job = self._load(jobId)
    assert job.status == SUBMITTED, "job_escrow: not submitted"
    self._check_evaluator(job)
    data: Bytes[MAX_PARAMS + 160] = abi_encode(reason, optParams)
    self._tell(BEFORE, jobId, job.hook, COMPLETE, data)
    self._move(jobId, job, COMPLETED)
    log JobCompleted(jobId=jobId, evaluator=job.evaluator, reason=reason)
    log PaymentReleased(jobId=jobId, provider=job.provider, amount=job.budget)
    self._pay(job.provider, job.budget)
    self._return_bond(jobId, job)
    self._tell(AFTER, jobId, job.hook, COMPLETE, data)


@external
def reject(jobId: uint256, reason: bytes32, optParams: Bytes[MAX_PARAMS] = b""):
    """
    @notice The client takes an open job back, or the evaluator refuses the work: the client gets his money back.
    """
    job: Job = self._load(jobId)
    assert job.status <= SUBMITTED, "job_escrow: closed already"
    if job.status == OPEN:
        assert msg.sender == job.client, "job_escrow: not the client"
    else:
        self._check_evaluator(job)
    data: Bytes[MAX_PARAMS + 160] = abi_encode(reason, optParams)
    self._tell(BEFORE, jobId, job.hook, REJECT, data)
    self._move(jobId, job, REJECTED)
    log JobRejected(jobId=jobId, rejector=msg.sender, reason=reason)
    if job.status != OPEN:
        self._refund(jobId, job.client, job.budget)
    self._return_bond(jobId, job)
    self._tell(AFTER, jobId, job.hook, REJECT, data)


@external
def claimRefund(jobId: uint256):
    """
    @notice Close a job whose time is over. Anyone may send it, and no hook hears of it.
    @dev    Work that was not submitted is not paid, and the evaluator had nothing to judge. For submitted work the
            evaluator was silent: see `on_silence` and `bond` above.
    """
    job: Job = self._load(jobId)
    assert job.status in [FUNDED, SUBMITTED], "job_escrow: nothing to refund"
    if job.status == FUNDED:
        assert block.timestamp >= job.expiredAt, "job_escrow: not expired"
        self._expire(jobId, job)
        self._refund(jobId, job.client, job.budget)
        self._return_bond(jobId, job)
    else:
        assert block.timestamp >= job.expiredAt + grace, "job_escrow: not expired"
        self._expire(jobId, job)
        self._settle_silence(jobId, job)


@external
def withdraw(payee: address) -> uint256:
    """
    @notice Pay `payee`, and nobody else, what could not be paid when its job ended. Anyone may send it.
    @return What was paid.
    """
    amount: uint256 = self.owed[payee]
    assert amount > 0, "job_escrow: nothing owed"
    self.owed[payee] = 0
    log Withdrawn(payee=payee, amount=amount)
    assert extcall asset.transfer(payee, amount, default_return_value=True), "job_escrow: transfer failed"
    return amount


@external
@view
@reentrant
def jobs(jobId: uint256) -> Job:
    """
    @notice All of a job. A hook may ask, too: what it reads is the job before its action, or after it.
    """
    return self._load(jobId)


@external
@view
def funding_nonce(jobId: uint256) -> bytes32:
    """
    @notice The nonce of the authorization with which the client would fund the job as it stands now.
    """
    return self._funding_nonce(jobId, self._load(jobId))


# --- inside: the record -----------------------------------------------------------------------------------------------


@internal
def _create(
    id: uint256, provider: address, evaluator: address, expires: uint256, hook: address, on_silence: uint256, bond: uint256
):
    job: Job = empty(Job)
    job.client = msg.sender
    job.hook = hook
    job.expiredAt = expires
    job.on_silence = on_silence
    self._write(id, job)
    if provider != empty(address):
        self.records[id].offer = self._pair(provider, 0)
    self.records[id].judge = self._pair(evaluator, bond)
    if hook != empty(address):
        self.records[id].hook = hook


@internal
@view
def _load(id: uint256) -> Job:
    head: uint256 = self.records[id].head
    assert head != 0, "job_escrow: no such job"
    offer: uint256 = self.records[id].offer
    judge: uint256 = self.records[id].judge
    hook: address = empty(address)
    if head >> 232 != 0:
        hook = self.records[id].hook
    return Job(
        client=self._account(head),
        provider=self._account(offer),
        evaluator=self._account(judge),
        hook=hook,
        budget=offer >> 160,
        bond=judge >> 160,
        expiredAt=(head >> 160) & MAX_TIME,
        on_silence=(head >> 208) & 65_535,
        status=(head >> 200) & 255,
        bonded=(head >> 224) & 1 == 1,
    )


@internal
def _write(id: uint256, job: Job):
    """
    @dev The first word of the record; the others hold what is seldom changed.
    """
    head: uint256 = convert(job.client, uint256) | (job.expiredAt << 160) | (job.status << 200) | (job.on_silence << 208)
    if job.bonded:
        head |= 1 << 224
    if job.hook != empty(address):
        head |= 1 << 232
    self.records[id].head = head


@internal
def _move(id: uint256, job: Job, status: uint256):
    """
    @dev Forward only: the callers have checked the old status, and `job` keeps it.
    """
    moved: Job = job
    moved.status = status
    self._write(id, moved)


@internal
@pure
def _pair(account: address, amount: uint256) -> uint256:
    return convert(account, uint256) | (amount << 160)


@internal
@pure
def _account(word: uint256) -> address:
    return convert(word & ACCOUNT, address)


# --- inside: the rules ------------------------------------------------------------------------------------------------


@internal
@view
def _open(id: uint256) -> Job:
    job: Job = self._load(id)
    assert job.status == OPEN, "job_escrow: not open"
    return job


@internal
@view
def _fundable(id: uint256, expected: uint256) -> Job:
    job: Job = self._open(id)
    assert job.provider != empty(address), "job_escrow: no provider"
    assert job.budget == expected, "job_escrow: another budget"
    assert job.budget > 0, "job_escrow: no budget"
    assert job.bonded or job.bond == 0, "job_escrow: no bond here"
    assert block.timestamp < job.expiredAt, "job_escrow: too late"
    return job


@internal
@view
def _check_provider(provider: address, client: address, evaluator: address):
    assert provider not in [empty(address), self, client, evaluator], "job_escrow: bad provider"


@internal
@view
def _check_evaluator(job: Job):
    assert msg.sender == job.evaluator, "job_escrow: not the evaluator"
    assert block.timestamp < job.expiredAt + grace, "job_escrow: too late"


@internal
@view
def _funding_nonce(id: uint256, job: Job) -> bytes32:
    """
    @dev The token's own signature binds chain, token, client, this contract and the amount; this binds the rest.
    """
    return keccak256(
        abi_encode(
            id, job.client, job.provider, job.evaluator, job.hook, job.budget, job.bond, job.expiredAt, job.on_silence
        )
    )


@internal
def _funded(id: uint256, job: Job):
    self._move(id, job, FUNDED)
    log JobFunded(jobId=id, client=job.client, amount=job.budget)


@internal
def _expire(id: uint256, job: Job):
    self._move(id, job, EXPIRED)
    log JobExpired(jobId=id)


@internal
def _settle_silence(id: uint256, job: Job):
    """
    @dev What does not divide goes to the client of the budget, and to the provider of the bond.
    """
    pay: uint256 = job.budget * job.on_silence // WHOLE
    solace: uint256 = job.bond * job.on_silence // WHOLE
    if job.bond > 0:
        log EvaluatorSlashed(jobId=id, evaluator=job.evaluator, to_client=solace, to_provider=job.bond - solace)
    log PaymentReleased(jobId=id, provider=job.provider, amount=pay)
    log Refunded(jobId=id, client=job.client, amount=job.budget - pay)
    self._pay(job.provider, pay + job.bond - solace)
    self._pay(job.client, job.budget - pay + solace)


# --- inside: money and hooks ------------------------------------------------------------------------------------------


@internal
def _refund(id: uint256, client: address, amount: uint256):
    log Refunded(jobId=id, client=client, amount=amount)
    self._pay(client, amount)


@internal
def _return_bond(id: uint256, job: Job):
    """
    @dev `job` as loaded: a funded one has its bond here.
    """
    if job.bond > 0 and (job.bonded or job.status != OPEN):
        log BondReturned(jobId=id, evaluator=job.evaluator, amount=job.bond)
        self._pay(job.evaluator, job.bond)


@internal
def _pull(payer: address, amount: uint256):
    assert extcall asset.transferFrom(payer, self, amount, default_return_value=True), "job_escrow: transfer failed"


@internal
def _pay(payee: address, amount: uint256):
    """
    @dev A payee that cannot be paid (a frozen account, for one) must not keep the other party from its money.
    """
    if amount == 0:
        return
    call: Bytes[68] = abi_encode(payee, amount, method_id=method_id("transfer(address,uint256)"))
    success: bool = False
    answer: Bytes[32] = b""
    success, answer = raw_call(asset.address, call, max_outsize=32, revert_on_failure=False)
    if success and (len(answer) == 0 or convert(answer, uint256) == 1):
        return
    self.owed[payee] += amount
    log PaymentFailed(payee=payee, amount=amount)


@internal
def _call_hook(moment: Bytes[4], id: uint256, hook: address, selector: bytes4, data: Bytes[MAX_PARAMS + 160]) -> bool:
    """
    @dev With gas that nobody can take from it or add to it, and no answer: long ones cost their reader.
    """
    assert msg.gas >= HOOK_ROOM, "job_escrow: too little gas for the hook"
    return raw_call(
        hook, concat(moment, abi_encode(id, selector, data)), gas=HOOK_GAS, revert_on_failure=False
    )


@internal
def _ask(moment: Bytes[4], id: uint256, hook: address, selector: bytes4, data: Bytes[MAX_PARAMS + 160]):
    if hook != empty(address):
        assert self._call_hook(moment, id, hook, selector, data), "job_escrow: hook refused"


@internal
def _tell(moment: Bytes[4], id: uint256, hook: address, selector: bytes4, data: Bytes[MAX_PARAMS + 160]):
    if hook != empty(address) and not self._call_hook(moment, id, hook, selector, data):
        log HookFailed(jobId=id, selector=selector)

# pragma version 0.4.3
# pragma nonreentrancy on
"""
@title Spend policy
@license Apache-2.0
@notice Spending mandates: how much of an owner's money an agent may pay, to whom and until when.

        The money stays in the owner's account. The owner approves this contract at the asset, for as much as all
        mandates together may ever take, and opens a mandate for an agent. The agent signs payments, and anybody may
        send them: they go from the owner straight to the payee. The contract itself never holds anything.

        An agent may hand down a part of its mandate to another agent, two levels deep. A payment must satisfy the
        mandate it is made under and every one above it, and counts against them all: whatever a child's own limits say,
        it can do no more than its parent.

        Three keys, three powers. The owner's account holds the money, opens mandates, and stays in a drawer. The
        operator's key is the one in a dashboard: it tightens, revokes and proposes, but a looser limit comes into force
        only after the mandate's `delay`, in which the owner may revoke. The agent's key pays within the limits. A
        co-signer, if there is one, must sign too what is above `cosign_above`.

        What cannot happen, whatever agent, operator, co-signer and senders do together, and until a proposal of the
        operator has waited its delay in the open:
        - a payment to anybody who is not on the list of the mandate and of each above it;
        - more than `per_payment` at once, or more than `per_period` within any `period`, wherever that begins;
        - more than `cosign_above` at once without the co-signer;
        - two payments for one intent, under one mandate and all its children;
        - a payment while the mandate, or one above it, is expired or revoked; nothing brings back a revoked one;
        - a payment from anybody but the owner who opened the mandate, or of anything but its asset.
@dev    Periods slide. Time is cut in ticks of a sixth of the period, and a payment counts in its own tick and the six
        that follow, so that no window of one period ever exceeds the cap, at no edge; the price is that a unit comes
        back up to one tick late. Seven slots for each mandate, however many payments: dust cannot fill anything.

        x402 `exact` pays by EIP-3009, where the payer signs. A contract could do so where the asset asks ERC-1271, but
        that question is a static call about a digest: nothing can be counted in it, so no cap over time would hold.
        This contract therefore never answers it. Instead list the agent's purse, an account of its own that signs x402
        payments, as a payee and let mandates fill it: what a thief can take is then the purse and the caps.

        Splitting a payment avoids the co-signer, but not `per_period`: choose that cap as what may be lost.
        `asset` must be a plain ERC-20; where it takes fees, payees receive less, and owners pay what was signed.
        A mandate's id is a hash over its owner: the signatures of an agent that serves two owners fit one of them.
@custom:kill Anyone who may: `revoke`, at once and for good, by owner, operator, the agent itself or an agent above it,
             as a sender or by signature. The owner can also set the allowance at the asset to zero.
"""

from ethereum.ercs import IERC20

from modules import typed_data

LEVELS: constant(uint256) = 3
MAX_PAYEES: constant(uint256) = 32  # in one call
MAX_CAP: constant(uint256) = 2**128 - 1  # keeps sums free of overflow, and a tick and its amount in one slot
TICKS: constant(uint256) = 6  # in a period
SLOTS: constant(uint256) = TICKS + 1
MIN_PERIOD: constant(uint256) = 60
MIN_DELAY: constant(uint256) = 3_600
MAX_TIME: constant(uint256) = 366 * 86_400  # of a period or a delay
PROPOSAL_LIFE: constant(uint256) = 7 * 86_400  # from when it is due: what was forgotten does not come into force
DOMAIN_NAME: constant(String[20]) = "Tessera spend policy"
DOMAIN_VERSION: constant(String[1]) = "1"
SPEND_TYPE: constant(bytes32) = keccak256(
    "Spend(bytes32 mandate,address payee,uint256 amount,bytes32 intent,bytes32 purpose,uint256 validAfter,uint256 validBefore)"
)
COSIGN_TYPE: constant(bytes32) = keccak256(
    "Cosign(bytes32 mandate,address payee,uint256 amount,bytes32 intent,bytes32 purpose,uint256 validAfter,uint256 validBefore)"
)
REVOKE_TYPE: constant(bytes32) = keccak256("Revoke(bytes32 mandate)")


struct Terms:
    agent: address  # signs payments
    operator: address  # tightens, revokes, proposes; empty when nobody but the owner does
    cosigner: address  # when empty, nothing above `cosign_above` can be paid
    asset: address
    period: uint256  # seconds
    delay: uint256  # seconds that a looser limit waits


struct Limits:
    per_payment: uint256
    per_period: uint256
    cosign_above: uint256
    expires_at: uint256  # seconds since 1970, exclusive
    any_payee: bool  # otherwise only those on the list, and with an empty list nobody


struct Payment:
    mandate: bytes32
    payee: address
    amount: uint256
    intent: bytes32  # what is paid for; the same intent is never paid twice
    purpose: bytes32  # a hash of the reason, for the books
    valid_after: uint256  # seconds since 1970, exclusive
    valid_before: uint256  # seconds since 1970, exclusive


struct Mandate:
    owner: address
    agent: address
    operator: address
    cosigner: address
    asset: address
    period: uint256
    delay: uint256
    parent: bytes32  # empty for what the owner has opened
    root: bytes32
    level: uint256


struct Proposal:
    digest: bytes32  # over the limits and payees
    due: uint256


mandates: public(HashMap[bytes32, Mandate])
limits: public(HashMap[bytes32, Limits])
payees: public(HashMap[bytes32, HashMap[address, bool]])
revoked: public(HashMap[bytes32, bool])
paid: public(HashMap[bytes32, HashMap[bytes32, bool]])  # by root and intent
proposals: public(HashMap[bytes32, Proposal])
meters: HashMap[bytes32, uint256[SLOTS]]  # a ring of (tick << 128) + amount


event Opened:
    mandate: indexed(bytes32)
    owner: indexed(address)
    agent: indexed(address)
    parent: bytes32
    operator: address
    cosigner: address
    asset: address
    period: uint256
    delay: uint256

event Limited:
    mandate: indexed(bytes32)
    per_payment: uint256
    per_period: uint256
    cosign_above: uint256
    expires_at: uint256
    any_payee: bool

event Listed:
    mandate: indexed(bytes32)
    payee: indexed(address)
    allowed: bool

event Proposed:
    mandate: indexed(bytes32)
    due: uint256
    per_payment: uint256
    per_period: uint256
    cosign_above: uint256
    expires_at: uint256
    any_payee: bool
    payees: DynArray[address, MAX_PAYEES]

event Spent:
    mandate: indexed(bytes32)
    intent: indexed(bytes32)
    payee: indexed(address)
    amount: uint256
    purpose: bytes32

event Revoked:
    mandate: indexed(bytes32)
    sender: indexed(address)


@deploy
def __init__():
    pass


# --- paying -----------------------------------------------------------------------------------------------------------


@external
def spend(payment: Payment, signature: Bytes[65], cosignature: Bytes[65] = b""):
    """
    @notice Pay as the mandate's agent has signed. Anyone may send it.
    @param signature 65 bytes r, s, v by the agent over `digest`.
    @param cosignature By the co-signer over `cosign_digest`, where the amount asks for it.
    """
    assert block.timestamp > payment.valid_after, "spend_policy: payment is not yet valid"
    assert block.timestamp < payment.valid_before, "spend_policy: payment is expired"
    self._check_payment(payment, signature)
    root: bytes32 = self.mandates[payment.mandate].root
    assert not self.paid[root][payment.intent], "spend_policy: intent is already paid"
    self.paid[root][payment.intent] = True
    if self._count(payment):
        self._check_cosigner(payment, cosignature)
    log Spent(
        mandate=payment.mandate,
        intent=payment.intent,
        payee=payment.payee,
        amount=payment.amount,
        purpose=payment.purpose,
    )
    self._pay(self.mandates[payment.mandate].asset, self.mandates[payment.mandate].owner, payment)


@external
@view
def available(mandate: bytes32) -> uint256:
    """
    @notice The largest payment that the limits allow now, here and above; owner's funds and co-signer not considered.
    """
    assert self.mandates[mandate].owner != empty(address), "spend_policy: no such mandate"
    room: uint256 = max_value(uint256)
    node: bytes32 = mandate
    for _: uint256 in range(LEVELS):
        limits: Limits = self.limits[node]
        if self.revoked[node] or block.timestamp >= limits.expires_at:
            return 0
        spent: uint256 = min(self._spent(node), limits.per_period)
        room = min(room, min(limits.per_payment, limits.per_period - spent))
        node = self.mandates[node].parent
        if node == empty(bytes32):
            break
    return room


@external
@view
def spent(mandate: bytes32) -> uint256:
    """
    @notice What counts against `per_period` now.
    """
    assert self.mandates[mandate].owner != empty(address), "spend_policy: no such mandate"
    return self._spent(mandate)


@external
@view
def digest(payment: Payment) -> bytes32:
    """
    @notice The EIP-712 digest that the agent signs.
    """
    return self._payment_digest(SPEND_TYPE, payment)


@external
@view
def cosign_digest(payment: Payment) -> bytes32:
    """
    @notice The EIP-712 digest that the co-signer signs.
    """
    return self._payment_digest(COSIGN_TYPE, payment)


@external
@view
def revoke_digest(mandate: bytes32) -> bytes32:
    """
    @notice The EIP-712 digest that revokes a mandate, signed by anyone who may.
    """
    return self._revoke_digest(mandate)


@external
@view
def DOMAIN_SEPARATOR() -> bytes32:
    """
    @notice The EIP-712 domain of this contract.
    """
    return self._domain()


# --- mandates ---------------------------------------------------------------------------------------------------------


@external
def open(label: bytes32, terms: Terms, limits: Limits, payees: DynArray[address, MAX_PAYEES]) -> bytes32:
    """
    @notice Give an agent a mandate over the caller's money.
    @param label Chosen by the owner, each once: for example the hash of the mandate's text.
    @return The mandate's id, keccak256(abi_encode(owner, label)).
    """
    assert terms.asset.is_contract, "spend_policy: asset is no contract"
    assert MIN_DELAY <= terms.delay and terms.delay <= MAX_TIME, "spend_policy: bad delay"
    mandate: bytes32 = keccak256(abi_encode(msg.sender, label))
    node: Mandate = Mandate(
        owner=msg.sender,
        agent=terms.agent,
        operator=terms.operator,
        cosigner=terms.cosigner,
        asset=terms.asset,
        period=terms.period,
        delay=terms.delay,
        parent=empty(bytes32),
        root=mandate,
        level=0,
    )
    self._create(mandate, node, limits, payees)
    return mandate


@external
def delegate(
    parent: bytes32,
    label: bytes32,
    agent: address,
    period: uint256,
    limits: Limits,
    payees: DynArray[address, MAX_PAYEES],
) -> bytes32:
    """
    @notice Hand down a part of the caller's mandate. Both must allow what the child pays: owner, operator, co-signer,
            asset and delay are the parent's, and the child's looser limits have no effect.
    @return The child's id, keccak256(abi_encode(parent, label)).
    """
    node: Mandate = self.mandates[parent]
    assert msg.sender == node.agent, "spend_policy: not the agent"
    assert node.level + 1 < LEVELS, "spend_policy: too many levels"
    mandate: bytes32 = keccak256(abi_encode(parent, label))
    node.agent = agent
    node.period = period
    node.parent = parent
    node.level += 1
    self._create(mandate, node, limits, payees)
    return mandate


@external
def revoke(mandate: bytes32, signature: Bytes[65] = b""):
    """
    @notice End a mandate and all its children, at once and for good.
    @param signature By somebody who may, over `revoke_digest`; empty when the sender is such.
    """
    who: address = msg.sender
    if len(signature) > 0:
        who = typed_data._signer_of(self._revoke_digest(mandate), signature)
    self._check_power(mandate, who)
    self.revoked[mandate] = True
    log Revoked(mandate=mandate, sender=who)


@external
def tighten(mandate: bytes32, limits: Limits, dropped: DynArray[address, MAX_PAYEES]):
    """
    @notice Narrow a mandate at once, by whoever may revoke it. Also drops the pending proposal, so that what waits can
            never undo it.
    @param limits None looser than now.
    @param dropped Payees to take off the list.
    """
    self._check_power(mandate, msg.sender)
    now: Limits = self.limits[mandate]
    narrower: bool = limits.per_payment <= now.per_payment and limits.per_period <= now.per_period
    narrower = narrower and limits.cosign_above <= now.cosign_above and limits.expires_at <= now.expires_at
    assert narrower and (now.any_payee or not limits.any_payee), "spend_policy: looser limits must be proposed"
    self.proposals[mandate] = empty(Proposal)
    self._set_limits(mandate, limits)
    self._list(mandate, dropped, False)


@external
def propose(mandate: bytes32, limits: Limits, payees: DynArray[address, MAX_PAYEES]):
    """
    @notice Announce other limits and more payees for a mandate that an owner has opened, by owner or operator. Takes
            the place of an earlier proposal.
    """
    node: Mandate = self.mandates[mandate]
    assert msg.sender in [node.owner, node.operator], "spend_policy: not owner or operator"
    assert node.parent == empty(bytes32), "spend_policy: a child cannot be loosened"
    due: uint256 = block.timestamp + node.delay
    self.proposals[mandate] = Proposal(digest=keccak256(abi_encode(limits, payees)), due=due)
    log Proposed(
        mandate=mandate,
        due=due,
        per_payment=limits.per_payment,
        per_period=limits.per_period,
        cosign_above=limits.cosign_above,
        expires_at=limits.expires_at,
        any_payee=limits.any_payee,
        payees=payees,
    )


@external
def loosen(mandate: bytes32, limits: Limits, payees: DynArray[address, MAX_PAYEES]):
    """
    @notice Put a proposal into force after its delay. Anyone may send it; within a week, or it lapses.
    """
    proposal: Proposal = self.proposals[mandate]
    assert proposal.digest == keccak256(abi_encode(limits, payees)), "spend_policy: no such proposal"
    assert block.timestamp >= proposal.due, "spend_policy: proposal is not yet due"
    assert block.timestamp < proposal.due + PROPOSAL_LIFE, "spend_policy: proposal has lapsed"
    self.proposals[mandate] = empty(Proposal)
    self._set_limits(mandate, limits)
    self._list(mandate, payees, True)


# --- inside -----------------------------------------------------------------------------------------------------------


@internal
def _create(mandate: bytes32, node: Mandate, limits: Limits, payees: DynArray[address, MAX_PAYEES]):
    assert self.mandates[mandate].owner == empty(address), "spend_policy: label is taken"
    others: address[4] = [empty(address), node.owner, node.operator, node.cosigner]
    assert node.agent not in others, "spend_policy: bad agent"
    assert MIN_PERIOD <= node.period and node.period <= MAX_TIME, "spend_policy: bad period"
    self.mandates[mandate] = node
    log Opened(
        mandate=mandate,
        owner=node.owner,
        agent=node.agent,
        parent=node.parent,
        operator=node.operator,
        cosigner=node.cosigner,
        asset=node.asset,
        period=node.period,
        delay=node.delay,
    )
    self._set_limits(mandate, limits)
    self._list(mandate, payees, True)


@internal
def _set_limits(mandate: bytes32, limits: Limits):
    assert max(limits.per_payment, limits.per_period) <= MAX_CAP, "spend_policy: cap too large"
    self.limits[mandate] = limits
    log Limited(
        mandate=mandate,
        per_payment=limits.per_payment,
        per_period=limits.per_period,
        cosign_above=limits.cosign_above,
        expires_at=limits.expires_at,
        any_payee=limits.any_payee,
    )


@internal
def _list(mandate: bytes32, payees: DynArray[address, MAX_PAYEES], allowed: bool):
    for payee: address in payees:
        self.payees[mandate][payee] = allowed
        log Listed(mandate=mandate, payee=payee, allowed=allowed)


@internal
def _count(payment: Payment) -> bool:
    """
    @notice Check a payment against its mandate and each above it, and count it against them all.
    @return Whether one of them asks for the co-signer.
    """
    cosigned: bool = False
    node: bytes32 = payment.mandate
    for _: uint256 in range(LEVELS):
        limits: Limits = self.limits[node]
        assert not self.revoked[node], "spend_policy: mandate is revoked"
        assert block.timestamp < limits.expires_at, "spend_policy: mandate is expired"
        assert limits.any_payee or self.payees[node][payment.payee], "spend_policy: payee is not listed"
        assert payment.amount <= limits.per_payment, "spend_policy: above the cap per payment"
        assert self._spent(node) + payment.amount <= limits.per_period, "spend_policy: above the cap per period"
        self._add(node, payment.amount)
        cosigned = cosigned or payment.amount > limits.cosign_above
        node = self.mandates[node].parent
        if node == empty(bytes32):
            break
    return cosigned


@internal
def _add(mandate: bytes32, amount: uint256):
    """
    @dev `amount` fits: the caller has compared the sum with a cap below 2**128.
    """
    tick: uint256 = self._tick(mandate)
    slot: uint256 = self.meters[mandate][tick % SLOTS]
    if slot >> 128 != tick:
        slot = tick << 128
    self.meters[mandate][tick % SLOTS] = slot + amount


@internal
@view
def _spent(mandate: bytes32) -> uint256:
    """
    @dev Two payments less than a period apart lie at most TICKS ticks apart, wherever the ticks begin.
    """
    tick: uint256 = self._tick(mandate)
    total: uint256 = 0
    for i: uint256 in range(SLOTS):
        slot: uint256 = self.meters[mandate][i]
        if (slot >> 128) + TICKS >= tick:
            total += slot & MAX_CAP
    return total


@internal
@view
def _tick(mandate: bytes32) -> uint256:
    """
    @dev A tick is a sixth of the period, rounded up.
    """
    return block.timestamp // ((self.mandates[mandate].period + TICKS - 1) // TICKS)


@internal
def _pay(asset: address, owner: address, payment: Payment):
    moved: bool = extcall IERC20(asset).transferFrom(
        owner, payment.payee, payment.amount, default_return_value=True
    )
    assert moved, "spend_policy: transfer failed"


@internal
@view
def _check_payment(payment: Payment, signature: Bytes[65]):
    agent: address = self.mandates[payment.mandate].agent
    assert agent != empty(address), "spend_policy: no such mandate"
    assert payment.payee not in [empty(address), self], "spend_policy: bad payee"
    assert payment.amount > 0, "spend_policy: nothing to pay"
    signer: address = typed_data._signer_of(self._payment_digest(SPEND_TYPE, payment), signature)
    assert signer == agent, "spend_policy: not the agent's signature"


@internal
@view
def _check_cosigner(payment: Payment, signature: Bytes[65]):
    cosigner: address = self.mandates[payment.mandate].cosigner
    signer: address = typed_data._signer_of(self._payment_digest(COSIGN_TYPE, payment), signature)
    assert cosigner != empty(address) and signer == cosigner, "spend_policy: needs the co-signer"


@internal
@view
def _check_power(mandate: bytes32, who: address):
    """
    @notice Whether `who` may end the mandate: its owner, operator or agent, or an agent above.
    @dev A malformed signature's signer is empty, and so may be the operator.
    """
    assert who != empty(address), "spend_policy: may not stop this"
    powerful: bool = who in [self.mandates[mandate].owner, self.mandates[mandate].operator]
    node: bytes32 = mandate
    for _: uint256 in range(LEVELS):
        powerful = powerful or who == self.mandates[node].agent
        node = self.mandates[node].parent
    assert powerful, "spend_policy: may not stop this"


@internal
@view
def _payment_digest(kind: bytes32, payment: Payment) -> bytes32:
    return typed_data._digest(self._domain(), keccak256(abi_encode(kind, payment)))


@internal
@view
def _revoke_digest(mandate: bytes32) -> bytes32:
    return typed_data._digest(self._domain(), keccak256(abi_encode(REVOKE_TYPE, mandate)))


@internal
@view
def _domain() -> bytes32:
    return typed_data._domain(keccak256(DOMAIN_NAME), keccak256(DOMAIN_VERSION))

"""Mandates: how much of a payer's money an agent may pay, to whom, for what and until when.

The payer's account signs a mandate (EIP-712), so whoever holds the agent's key, its process or its dashboard cannot
write themselves a better one. An agent may hand down a part of its mandate; the child is signed with the agent's key.

Invariants: a child is nowhere wider than its parent; a payment must satisfy the mandate it is made under and each one
above it, and counts against them all. Amounts are integers of one asset, named with its chain and contract, so that
coins of two chains never mix. Periods slide as in `contracts/spend_policy.vy`: time is cut in ticks of a sixth of the
period, and a payment counts in its own tick and the six that follow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tessera.core import encoding
from tessera.core.amount import Amount
from tessera.core.errors import Invalid, Refused
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey, recover_account
from tessera.core.typed_data import domain, typed_digest

__all__ = ["ANY_PURPOSE", "LEVELS", "NOBODY", "Mandate", "SignedMandate", "Spent", "asset_id", "check_payment",
           "parse_asset", "sign_mandate", "tick_of", "verify_chain"]  # fmt: skip

NOBODY = Account("0x" + "00" * 20)
ANY_PURPOSE = "*"
LEVELS = 3  # a mandate, its children and their children
TICKS = 6  # a payment counts in its own tick and this many more
MAX_CAP = 2**128 - 1
MAX_NAMES = 32  # payees, and purposes
MIN_PERIOD_S, MAX_PERIOD_S = 60, 366 * 86_400
FULL_BPS = 10_000
MANDATE_LIMIT = 32_768  # bytes

_ASSET = re.compile(r"eip155:([1-9][0-9]{0,17})/(0x[0-9a-fA-F]{40})")
_PURPOSE = re.compile(r"[a-z0-9][a-z0-9 _.:/-]{0,63}|\*")
_TYPE = (
    "Mandate(address payer,address agent,address approver,uint256 perPayment,uint256 perPeriod,uint256 period,"
    "uint256 approveAbove,uint256 balanceBps,address[] payees,bool anyPayee,string[] purposes,uint256 expiresAt,"
    "bytes32 parent,bytes32 salt)"
)


def asset_id(chain_id: int, contract: Account) -> str:
    """The name of a coin as `Amount` carries it.

    >>> asset_id(8453, Account("0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913"))
    'eip155:8453/0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913'
    """
    if type(chain_id) is not int or chain_id <= 0:
        raise Invalid(f"a chain id is a positive int, not {chain_id!r}")
    return f"eip155:{chain_id}/{parse_account(contract)}"


def parse_asset(asset: str) -> tuple[int, Account]:
    """Chain id and contract. Raises: Invalid for any other spelling, since a name is compared as text."""
    match = _ASSET.fullmatch(asset)
    if match is None or asset_id(int(match[1]), parse_account(match[2])) != asset:
        raise Invalid(f"an asset is eip155:CHAIN/CONTRACT with a checksum, not {asset[:80]!r}")
    return int(match[1]), Account(match[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Mandate:
    """What one agent may pay. All amounts are of one asset.

    Args:
        payer: whose money it is; signs a mandate that has no parent.
        agent: whose key signs payments, and child mandates. Its account is the purse that x402 payments leave from.
        approver: whose signature is asked above `approve_above`: a key that no dashboard holds. NOBODY: nothing above.
        per_payment, per_period: caps; `period_s` is the length of the sliding period.
        approve_above: payments above it need the approver.
        balance_bps: at most this part, in 1/10,000, of the paying account's balance within a period; 10,000 = no cap.
        payees: who may be paid; `any_payee` lifts the list.
        purposes: what may be paid for; "*" is any.
        expires_at: seconds since 1970, exclusive.
        parent: digest of the mandate above, in hex; "" at the root.
        salt: 64 hex digits, which tell apart two mandates that are otherwise alike.
    """

    payer: Account
    agent: Account
    per_payment: Amount
    per_period: Amount
    expires_at: int
    approve_above: Amount
    period_s: int = 86_400
    approver: Account = NOBODY
    balance_bps: int = FULL_BPS
    payees: tuple[Account, ...] = ()
    any_payee: bool = False
    purposes: tuple[str, ...] = (ANY_PURPOSE,)
    parent: str = ""
    salt: str = "00" * 32
    id: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("payer", "agent", "approver"):
            object.__setattr__(self, name, parse_account(getattr(self, name)))
        object.__setattr__(self, "payees", tuple(sorted({parse_account(payee) for payee in self.payees})))
        object.__setattr__(self, "purposes", tuple(sorted(set(self.purposes))))
        self._check()
        object.__setattr__(self, "id", self.digest().hex())

    @property
    def asset(self) -> str:
        return self.per_payment.asset

    def digest(self) -> bytes:
        """The 32 bytes that are signed; their hex is the mandate's id."""
        chain_id, contract = parse_asset(self.asset)
        values = (
            self.payer, self.agent, self.approver, self.per_payment.units, self.per_period.units, self.period_s,
            self.approve_above.units, self.balance_bps, self.payees, self.any_payee, self.purposes, self.expires_at,
            bytes.fromhex(self.parent or "00" * 32), bytes.fromhex(self.salt),
        )  # fmt: skip
        return typed_digest(domain("Tessera mandate", "1", chain_id, contract), _TYPE, values)

    def to_dict(self) -> dict[str, Any]:
        return {
            "payer": self.payer, "agent": self.agent, "approver": self.approver, "asset": self.asset,
            "per_payment": self.per_payment.units, "per_period": self.per_period.units, "period_s": self.period_s,
            "approve_above": self.approve_above.units, "balance_bps": self.balance_bps, "payees": list(self.payees),
            "any_payee": self.any_payee, "purposes": list(self.purposes), "expires_at": self.expires_at,
            "parent": self.parent, "salt": self.salt,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any) -> Mandate:
        """Raises: Invalid for anything that `to_dict` does not make."""
        try:
            data = dict(data)
            asset = data.pop("asset")
            for name in ("per_payment", "per_period", "approve_above"):
                data[name] = Amount(data[name], asset)
            for name in ("payees", "purposes"):
                data[name] = tuple(data[name])
            return cls(**data)
        except (TypeError, KeyError, ValueError) as error:
            raise Invalid(f"this is no mandate: {error}") from error

    def check_within(self, parent: Mandate) -> None:
        """Raises: Refused, with what is wider than in `parent` as its rule."""
        wider = {
            "parent": self.parent != parent.id,
            "payer": self.payer != parent.payer,
            "approver": self.approver != parent.approver,
            "asset": self.asset != parent.asset,
            "per_payment": self.per_payment.units > parent.per_payment.units,
            "per_period": self.per_period.units > parent.per_period.units or self.period_s < parent.period_s,
            "approve_above": self.approve_above.units > parent.approve_above.units,
            "balance_bps": self.balance_bps > parent.balance_bps,
            "payees": not parent.any_payee and (self.any_payee or not set(self.payees) <= set(parent.payees)),
            "purposes": ANY_PURPOSE not in parent.purposes and not set(self.purposes) <= set(parent.purposes),
            "expires_at": self.expires_at > parent.expires_at,
        }
        for rule, is_wider in wider.items():
            if is_wider:
                raise Refused(f"the child mandate does not lie within its parent: {rule}", rule=f"child_{rule}")

    def _check(self) -> None:
        parse_asset(self.asset)
        for amount in (self.per_payment, self.per_period, self.approve_above):
            if self.per_payment.asset != amount.asset:
                raise Invalid(f"a mandate has one asset, not {self.asset} and {amount.asset}")
        if max(self.per_payment.units, self.per_period.units, self.approve_above.units) > MAX_CAP:
            raise Invalid("a cap is at most 2**128 - 1 units")
        if self.agent in (NOBODY, self.payer, self.approver) or self.payer == NOBODY:
            raise Invalid("payer, agent and approver are three accounts: one stolen key must not have two powers")
        if self.approver == self.payer:
            raise Invalid("the approver is a key of its own: the payer's stays in a drawer")
        if not MIN_PERIOD_S <= _int("period_s", self.period_s) <= MAX_PERIOD_S:
            raise Invalid(f"a period is {MIN_PERIOD_S} to {MAX_PERIOD_S} s, not {self.period_s}")
        if not 0 <= _int("balance_bps", self.balance_bps) <= FULL_BPS:
            raise Invalid(f"balance_bps is 0 to {FULL_BPS}, not {self.balance_bps}")
        if not 0 < _int("expires_at", self.expires_at) < 2**64:
            raise Invalid(f"expires_at is in seconds since 1970, not {self.expires_at}")
        if type(self.any_payee) is not bool or NOBODY in self.payees:
            raise Invalid("any_payee is a bool, and nobody is no payee")
        if len(self.payees) > MAX_NAMES or len(self.purposes) > MAX_NAMES:
            raise Invalid(f"at most {MAX_NAMES} payees and purposes")
        if not all(isinstance(name, str) and _PURPOSE.fullmatch(name) for name in self.purposes):
            raise Invalid(f"a purpose is a short lower-case name or *, not {self.purposes!r:.200}")
        for digits in (self.parent or self.salt, self.salt):
            if not isinstance(digits, str) or re.fullmatch(r"[0-9a-f]{64}", digits) is None:
                raise Invalid("parent and salt are 64 lower-case hex digits")


@dataclass(frozen=True, slots=True)
class SignedMandate:
    """A mandate as it travels and is kept."""

    mandate: Mandate
    signature: bytes

    def encode(self) -> bytes:
        return encoding.encode({"mandate": self.mandate.to_dict(), "signature": self.signature.hex()})

    @classmethod
    def decode(cls, data: bytes) -> SignedMandate:
        value = encoding.decode(data, MANDATE_LIMIT)
        try:
            return cls(Mandate.from_dict(value["mandate"]), bytes.fromhex(value["signature"]))
        except (TypeError, KeyError, ValueError) as error:
            raise Invalid("this is no signed mandate") from error


def sign_mandate(mandate: Mandate, key: AccountKey) -> SignedMandate:
    """Sign as the payer, or a child as the parent's agent. Whether that is who `key` is, `verify_chain` says."""
    return SignedMandate(mandate, key.sign_digest(mandate.digest()))


def verify_chain(chain: Sequence[SignedMandate]) -> None:
    """Check a mandate and those above it, the root last: signatures, order, and that each lies within the next.

    Raises: Invalid for a wrong signature or order; Refused for a child that is wider than its parent.
    """
    if not 1 <= len(chain) <= LEVELS:
        raise Invalid(f"a mandate has at most {LEVELS - 1} above it, not {len(chain) - 1}")
    for signed, above in zip(chain, [*chain[1:], None], strict=True):
        mandate = signed.mandate
        if (above is None) != (mandate.parent == ""):
            raise Invalid("the chain of mandates does not end at its root")
        wanted = mandate.payer if above is None else above.mandate.agent
        signer = recover_account(mandate.digest(), signed.signature)
        if signer != wanted:
            raise Invalid(f"mandate {mandate.id[:16]}… is signed by {signer}, expected {wanted}")
        if above is not None:
            mandate.check_within(above.mandate)


def tick_of(seconds: float, period_s: int) -> int:
    """Which sixth of a period an instant lies in, counted since 1970."""
    return int(seconds) // -(-period_s // TICKS)


@dataclass(frozen=True, slots=True)
class Spent:
    """What counts under one mandate now, in units: paid within the period, and set aside for payments under way."""

    paid: int = 0
    pending: int = 0

    @property
    def units(self) -> int:
        return self.paid + self.pending


def check_payment(
    mandate: Mandate,
    payee: Account,
    amount: Amount,
    purpose: str,
    *,
    spent: Spent,
    now: float,
    balance: Amount | None = None,
    approved: bool = False,
) -> None:
    """Whether this one mandate allows a payment; call it for each mandate above, too.

    Args:
        balance: of the account that pays; needed where the mandate caps the share of it. What was paid in the period
            counts as if it were still there, so that a payment in two halves is no cheaper than in one.
        approved: the mandate's approver has signed this very payment.

    Raises: Refused, with the limit as its rule; UnitMismatch; Invalid.
    """
    _require(now < mandate.expires_at, "mandate_expired", f"the mandate ended at {mandate.expires_at}")
    if amount.units == 0:
        raise Invalid("nothing to pay")
    _require(mandate.any_payee or payee in mandate.payees, "payee", f"{payee} is not on the mandate's list")
    known = ANY_PURPOSE in mandate.purposes or purpose in mandate.purposes
    _require(known, "purpose", f"the mandate does not pay for {purpose[:80]!r}")
    cap = mandate.per_payment
    _require(amount <= cap, "per_payment", f"{amount.units} units, at most {cap.units} at once")
    left = mandate.per_period.units - spent.units
    _require(amount.units <= left, "per_period", f"{amount.units} units, {max(left, 0)} are left in this period")
    if mandate.balance_bps < FULL_BPS:
        if balance is None:
            raise Invalid("this mandate caps the share of the balance: say the balance")
        most = (balance + Amount(spent.paid, balance.asset)).part_down(mandate.balance_bps, FULL_BPS)
        within = Amount(spent.units, amount.asset) + amount <= most
        _require(within, "balance", f"{amount.units} units are too large a part of the balance")
    if amount > mandate.approve_above:
        _require(approved and mandate.approver != NOBODY, "approval", f"{amount.units} units need the approver")


def _require(holds: bool, rule: str, message: str) -> None:
    if not holds:
        raise Refused(message, rule=rule)


def _int(name: str, value: object) -> int:
    if type(value) is not int:
        raise Invalid(f"{name} is an int, not {value!r}")
    return value

"""Intents: a purchase with a name. However often it is signed, sent or resumed, it is one payment.

The nonce of its EIP-3009 authorization is computed from the intent and its terms:

    nonce = keccak256(abi.encode(intent, payer, payee, keccak256(resource), amount))

where `payer` is the account that the coins leave from, the agent's purse. So two signatures for one purchase are the
same authorization, and the asset's contract itself refuses the second. A seller that computes the nonce too knows that
the payment is for this resource and no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eth_abi.abi import encode as abi_encode
from eth_abi.exceptions import EncodingError

from tessera.agents.mandates import parse_asset
from tessera.core import encoding
from tessera.core.amount import Amount
from tessera.core.errors import Invalid
from tessera.core.hashing import keccak, sha256
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey
from tessera.core.typed_data import domain, typed_digest

__all__ = ["Authorization", "Coin", "Intent", "authorize", "intent_id", "is_for", "job_resource",
           "payment_nonce", "resource_name"]  # fmt: skip

RESOURCE_LIMIT = 4_096  # characters
_JOB = re.compile(r"JOB [0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]{64}")
_TYPE = (
    "TransferWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,"
    "bytes32 nonce)"
)


@dataclass(frozen=True, slots=True)
class Coin:
    """An asset that speaks EIP-3009. Name and version are those of its EIP-712 domain; a seller's word is not asked."""

    asset: str  # as `asset_id` makes it
    name: str
    version: str


def intent_id(*parts: str | int) -> str:
    """An id from whatever names the purchase: a run, a step of it, a call.

    >>> intent_id("run-7", "step", 3) == intent_id("run-7", "step", 3)
    True
    """
    return keccak(b"tessera/intent\0" + encoding.encode(list(parts))).hex()


def resource_name(method: str, url: str, body: bytes = b"") -> str:
    """What is bought over HTTP, exactly: the method, the address, and the body's hash when there is a body."""
    return f"{method.upper()} {url}" + (f" sha256:{sha256(body).hex()}" if body else "")


def job_resource(terms: str) -> str:
    """What is bought when a job is funded: the terms, by their digest. The escrow is the payee."""
    return f"JOB {terms}"


def payment_nonce(intent: str, payer: Account, payee: Account, resource: str, units: int) -> bytes:
    """32 bytes; see the module's text."""
    words = [bytes.fromhex(intent), payer, payee, keccak(resource.encode()), units]
    return keccak(abi_encode(["bytes32", "address", "address", "bytes32", "uint256"], words))


def is_for(payment: Mapping[str, Any], resource: str) -> bool:
    """For sellers: whether an x402 payment (decoded) was signed for this resource, and for no other of the same price.

    Needs the intent's id, which our buyers send as x402's `payment-identifier`.
    """
    try:
        terms = payment["payload"]["authorization"]
        intent = payment["extensions"]["payment-identifier"]["info"]["id"]
        payer, payee = parse_account(terms["from"]), parse_account(terms["to"])
        nonce = payment_nonce(intent, payer, payee, resource, int(terms["value"]))
    except (TypeError, KeyError, ValueError, Invalid, EncodingError):
        return False
    return "0x" + nonce.hex() == str(terms["nonce"]).lower()


@dataclass(frozen=True, slots=True)
class Intent:
    """One purchase under one mandate. Two with the same id must be alike in everything."""

    id: str
    mandate: str  # its id
    payee: Account
    amount: Amount
    resource: str
    purpose: str = ""

    def __post_init__(self) -> None:
        if any(_HEX.fullmatch(text) is None for text in (self.id, self.mandate)):
            raise Invalid("intent and mandate are named by 64 lower-case hex digits; see `intent_id`")
        object.__setattr__(self, "payee", parse_account(self.payee))
        parse_asset(self.amount.asset)
        if self.amount.units == 0:
            raise Invalid("nothing to pay")
        if not 0 < len(self.resource) <= RESOURCE_LIMIT or len(self.purpose) > 64:
            raise Invalid(f"a resource has 1 to {RESOURCE_LIMIT} characters, a purpose at most 64")

    @property
    def is_job(self) -> bool:
        """Paid by funding a job in escrow, whose own nonce binds it, and not by a transfer to the payee."""
        return _JOB.fullmatch(self.resource) is not None

    def nonce(self, payer: Account) -> bytes:
        return payment_nonce(self.id, payer, self.payee, self.resource, self.amount.units)

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "mandate": self.mandate, "payee": self.payee, "units": self.amount.units,
                "asset": self.amount.asset, "resource": self.resource, "purpose": self.purpose}  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Intent:
        amount = Amount(data["units"], data["asset"])
        return cls(data["id"], data["mandate"], data["payee"], amount, data["resource"], data["purpose"])


@dataclass(frozen=True, slots=True)
class Authorization:
    """A signed EIP-3009 transfer: money in the hands of whoever has it."""

    payer: Account
    payee: Account
    units: int
    valid_before: int  # seconds since 1970, exclusive
    nonce: bytes
    signature: bytes

    def to_x402(self) -> dict[str, Any]:
        """The payload of x402's `exact` scheme."""
        return {
            "signature": "0x" + self.signature.hex(),
            "authorization": {
                "from": self.payer, "to": self.payee, "value": str(self.units), "validAfter": "0",
                "validBefore": str(self.valid_before), "nonce": "0x" + self.nonce.hex(),
            },
        }  # fmt: skip


def authorize(intent: Intent, coin: Coin, key: AccountKey, valid_before: int) -> Authorization:
    """Sign the payment of `intent`. The same arguments give the same bytes.

    `key` is the account that holds the coins (EIP-3009): a purse, which a mandate on chain may fill.
    """
    if coin.asset != intent.amount.asset:
        raise Invalid(f"the intent is in {intent.amount.asset}, the coin is {coin.asset}")
    nonce, units = intent.nonce(key.account), intent.amount.units
    chain_id, contract = parse_asset(coin.asset)
    separator = domain(coin.name, coin.version, chain_id, contract)
    values = (key.account, intent.payee, units, 0, valid_before, nonce)
    signature = key.sign_digest(typed_digest(separator, _TYPE, values))
    return Authorization(key.account, intent.payee, units, valid_before, nonce, signature)

"""x402 v2 on the wire: the offer in a 402, and the payment that a buyer sends back.

An offer is one scheme (`exact` or `upto`), one network, one asset, one payee, one amount. A payment is checked field by
field against it before any signature is looked at.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tessera.core.errors import Invalid, PaymentRequired
from tessera.core.ids import Account
from tessera.serving.paying.ledger import PaymentName

__all__ = ["Offer", "Payment", "Scheme", "encode_header", "parse_payment", "refuse"]

Scheme = Literal["exact", "upto"]

HEADER_LIMIT = 16_384  # characters of a PAYMENT-SIGNATURE header
SIGNATURE_LIMIT = 8_192  # hex digits: a smart wallet's may be long
REASONS = {
    "invalid_exact_evm_nonce_already_used": "this authorization has been used",
    "invalid_exact_evm_insufficient_balance": "the payer's balance is too small",
    "invalid_exact_evm_payload_authorization_valid_before": "the authorization has expired, or will within seconds",
    "invalid_exact_evm_payload_authorization_valid_after": "the authorization is not valid yet",
    "invalid_exact_evm_payload_authorization_value_mismatch": "the authorized amount is not the price",
    "invalid_exact_evm_payload_recipient_mismatch": "the authorization pays somebody else",
    "invalid_exact_evm_payload_signature": "the signature is not the payer's",
    "permit2_allowance_required": "Permit2 may not move the payer's coins: approve it at the coin's contract once",
    "permit2_invalid_nonce": "this authorization has been used",
    "permit2_deadline_expired": "the authorization has expired, or will within seconds",
    "permit2_insufficient_balance": "the payer's balance is too small",
    "insufficient_credit": "the credit is too small for this request: buy more at /v1/credit, or pay for this one",
    "debt": "an earlier answer of this payer is not paid for yet",
    "settlement_pending": "the settlement is not confirmed yet; send the same payment again",
}

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_NONCE = re.compile(r"0x[0-9a-fA-F]{64}")
_UINT = re.compile(r"[0-9]{1,78}")
_HEX = re.compile(r"0x(?:[0-9a-fA-F]{2})+")


@dataclass(frozen=True, slots=True)
class Offer:
    """What one request costs, or can cost at most. `units` in the asset's smallest unit."""

    network: str  # CAIP-2, such as eip155:8453
    asset: Account
    asset_name: str  # the EIP-712 domain of the asset's contract
    asset_version: str
    units: int
    pay_to: Account
    timeout_s: int
    description: str = ""
    facilitator: Account | None = None  # who may settle less than `units`, by x402's `upto`; None = `exact`

    def __post_init__(self) -> None:
        if type(self.units) is not int or self.units <= 0:
            raise Invalid(f"a price is a positive integer of the asset's smallest unit, not {self.units!r}")

    @property
    def scheme(self) -> Scheme:
        return "exact" if self.facilitator is None else "upto"

    def requirements(self) -> dict[str, Any]:
        metered = {} if self.facilitator is None else {"facilitatorAddress": self.facilitator}
        return {
            "scheme": self.scheme,
            "network": self.network,
            "asset": self.asset,
            "amount": str(self.units),
            "payTo": self.pay_to,
            "maxTimeoutSeconds": self.timeout_s,
            "extra": {"name": self.asset_name, "version": self.asset_version} | metered,
        }

    def mismatch(self, accepted: dict[str, Any]) -> str | None:
        """Which term of the offer the buyer did not accept; None when all agree."""
        wanted = self.requirements()
        terms = {"scheme": "unsupported_scheme", "network": "network_mismatch", "asset": "asset_mismatch",
                 "payTo": "recipient_mismatch", "amount": "amount_mismatch"}  # fmt: skip
        given = ((accepted.get(term), wanted[term]) for term in terms)
        same = (isinstance(a, str) and a.lower() == str(b).lower() for a, b in given)
        return next((reason for reason, agrees in zip(terms.values(), same, strict=True) if not agrees), None)


def refuse(
    offers: Sequence[Offer], url: str, reason: str | None = None, headers: dict[str, str] | None = None
) -> PaymentRequired:
    """The 402 for `url`: what to pay, in the order that we prefer, and why what came was not enough."""
    message = "payment required" if reason is None else f"payment refused: {REASONS.get(reason, reason)}"
    resource = {"url": url, "description": offers[0].description, "mimeType": "application/json"}
    offer = {"x402Version": 2, "resource": resource, "accepts": [offer.requirements() for offer in offers]}
    header = encode_header(offer | {"error": message})
    return PaymentRequired(
        message,
        reason=reason or "payment_required",
        offer=offer,
        headers={"PAYMENT-REQUIRED": header, **(headers or {})},
    )


def encode_header(data: dict[str, Any]) -> str:
    return base64.b64encode(json.dumps(data, separators=(",", ":")).encode()).decode()


@dataclass(frozen=True, slots=True)
class Payment:
    """A payment that a buyer sent, reduced to the fields that we checked."""

    scheme: Scheme
    accepted: dict[str, Any]  # the terms, still to be compared with the offer
    payload: dict[str, Any]  # what was signed, and its signature
    name: PaymentName


def parse_payment(header: str) -> Payment:
    """The payment in a PAYMENT-SIGNATURE header: an EIP-3009 authorization, or one through Permit2. Raises: Invalid."""
    if len(header) > HEADER_LIMIT:
        raise Invalid(f"a payment of {len(header)} characters, at most {HEADER_LIMIT} expected")
    try:
        data = json.loads(base64.b64decode(header, validate=True))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise Invalid("the payment is not base64 of JSON") from error
    if not isinstance(data, dict) or data.get("x402Version") != 2 or not isinstance(data.get("accepted"), dict):
        raise Invalid("the payment is no x402 version 2 payment")
    payload = data.get("payload")
    if not isinstance(payload, dict):
        raise Invalid("the payment has no payload")
    signature = payload.get("signature")
    if not isinstance(signature, str) or len(signature) > SIGNATURE_LIMIT or _HEX.fullmatch(signature) is None:
        raise Invalid("the payment's signature is not hex")
    scheme: Scheme = "exact" if "authorization" in payload else "upto"
    kind = "authorization" if scheme == "exact" else "permit2Authorization"
    signed = _checked(payload.get(kind), _FIELDS[scheme], kind)
    nonce = signed["nonce"].lower() if scheme == "exact" else f"permit2:{int(signed['nonce'])}"
    name = PaymentName(signed["from"].lower(), nonce)
    return Payment(scheme, data["accepted"], {kind: signed, "signature": signature}, name)


_FIELDS: dict[Scheme, dict[str, Any]] = {
    "exact": {
        "from": _ADDRESS, "to": _ADDRESS, "value": _UINT, "validAfter": _UINT, "validBefore": _UINT, "nonce": _NONCE,
    },
    "upto": {
        "from": _ADDRESS, "permitted": {"token": _ADDRESS, "amount": _UINT}, "spender": _ADDRESS, "nonce": _UINT,
        "deadline": _UINT, "witness": {"to": _ADDRESS, "facilitator": _ADDRESS, "validAfter": _UINT},
    },
}  # fmt: skip


def _checked(data: object, fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Only the fields that we know, each a text of its form."""
    if not isinstance(data, dict):
        raise Invalid(f"the payment holds no {where}")
    found: dict[str, Any] = {}
    for name, form in fields.items():
        value = data.get(name)
        if isinstance(form, dict):
            found[name] = _checked(value, form, name)
        elif not isinstance(value, str) or form.fullmatch(value) is None or (form is _UINT and int(value) >> 256):
            raise Invalid(f"the payment's {where} has a malformed {name}")
        else:
            found[name] = value
    return found

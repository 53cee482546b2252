"""x402 v2 on the wire: the offer in a 402, and the payment that a buyer sends back.

The offer is the whole price list: one scheme (`exact`), one network, one asset, one payee, one amount. A payment is
checked field by field against it before any signature is looked at.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Any

from tessera.core.errors import Invalid, PaymentRequired
from tessera.core.ids import Account
from tessera.serving.ledger import PaymentName

__all__ = ["Offer", "Payment", "encode_header", "parse_payment"]

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
    "settlement_pending": "the settlement is not confirmed yet; send the same payment again",
}

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_NONCE = re.compile(r"0x[0-9a-fA-F]{64}")
_UINT = re.compile(r"[0-9]{1,78}")
_HEX = re.compile(r"0x(?:[0-9a-fA-F]{2})+")


@dataclass(frozen=True, slots=True)
class Offer:
    """What one request costs. `units` in the asset's smallest unit."""

    network: str  # CAIP-2, such as eip155:8453
    asset: Account
    asset_name: str  # the EIP-712 domain of the asset's contract
    asset_version: str
    units: int
    pay_to: Account
    timeout_s: int
    description: str = ""

    def __post_init__(self) -> None:
        if type(self.units) is not int or self.units <= 0:
            raise Invalid(f"a price is a positive integer of the asset's smallest unit, not {self.units!r}")

    def requirements(self) -> dict[str, Any]:
        return {
            "scheme": "exact",
            "network": self.network,
            "asset": self.asset,
            "amount": str(self.units),
            "payTo": self.pay_to,
            "maxTimeoutSeconds": self.timeout_s,
            "extra": {"name": self.asset_name, "version": self.asset_version},
        }

    def refuse(self, url: str, reason: str | None = None, headers: dict[str, str] | None = None) -> PaymentRequired:
        """The 402 for `url`: what to pay, and why what came was not enough."""
        message = "payment required" if reason is None else f"payment refused: {REASONS.get(reason, reason)}"
        resource = {"url": url, "description": self.description, "mimeType": "application/json"}
        offer = {"x402Version": 2, "resource": resource, "accepts": [self.requirements()]}
        header = encode_header(offer | {"error": message})
        return PaymentRequired(
            message,
            reason=reason or "payment_required",
            offer=offer,
            headers={"PAYMENT-REQUIRED": header, **(headers or {})},
        )

    def mismatch(self, accepted: dict[str, Any]) -> str | None:
        """Which term of the offer the buyer did not accept; None when all agree."""
        wanted = self.requirements()
        terms = {"scheme": "unsupported_scheme", "network": "network_mismatch", "asset": "asset_mismatch",
                 "payTo": "recipient_mismatch", "amount": "amount_mismatch"}  # fmt: skip
        given = ((accepted.get(term), wanted[term]) for term in terms)
        same = (isinstance(a, str) and a.lower() == str(b).lower() for a, b in given)
        return next((reason for reason, agrees in zip(terms.values(), same, strict=True) if not agrees), None)


def encode_header(data: dict[str, Any]) -> str:
    return base64.b64encode(json.dumps(data, separators=(",", ":")).encode()).decode()


@dataclass(frozen=True, slots=True)
class Payment:
    """A payment that a buyer sent, reduced to the fields that we checked."""

    accepted: dict[str, Any]  # the terms, still to be compared with the offer
    payload: dict[str, Any]  # an EIP-3009 authorization and its signature
    name: PaymentName


def parse_payment(header: str) -> Payment:
    """The payment in a PAYMENT-SIGNATURE header. Raises: Invalid for anything but an EIP-3009 one."""
    if len(header) > HEADER_LIMIT:
        raise Invalid(f"a payment of {len(header)} characters, at most {HEADER_LIMIT} expected")
    try:
        data = json.loads(base64.b64decode(header, validate=True))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise Invalid("the payment is not base64 of JSON") from error
    if not isinstance(data, dict) or data.get("x402Version") != 2 or not isinstance(data.get("accepted"), dict):
        raise Invalid("the payment is no x402 version 2 payment")
    payload = data.get("payload")
    authorization = payload.get("authorization") if isinstance(payload, dict) else None
    if not isinstance(payload, dict) or not isinstance(authorization, dict):
        raise Invalid("the payment holds no EIP-3009 authorization")
    _check(authorization)
    signature = payload.get("signature")
    if not isinstance(signature, str) or len(signature) > SIGNATURE_LIMIT or _HEX.fullmatch(signature) is None:
        raise Invalid("the payment's signature is not hex")
    plain = {"authorization": {name: authorization[name] for name in _FIELDS}, "signature": signature}
    return Payment(data["accepted"], plain, PaymentName(authorization["from"].lower(), authorization["nonce"].lower()))


_FIELDS = {"from": _ADDRESS, "to": _ADDRESS, "value": _UINT, "validAfter": _UINT, "validBefore": _UINT, "nonce": _NONCE}


def _check(authorization: dict[str, Any]) -> None:
    for name, pattern in _FIELDS.items():
        value = authorization.get(name)
        if not isinstance(value, str) or pattern.fullmatch(value) is None:
            raise Invalid(f"the authorization's {name} is malformed")

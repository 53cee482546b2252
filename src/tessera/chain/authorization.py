"""EIP-3009 payments by signature: what a payer signs so that the payee, and nobody else, can pull the money."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tessera.chain.faces import Coin
from tessera.core.errors import Invalid
from tessera.core.ids import Account
from tessera.core.signing import AccountKey
from tessera.core.typed_data import domain, typed_digest

__all__ = ["RECEIVE", "Authorization", "authorize"]

RECEIVE = (
    "ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,"
    "bytes32 nonce)"
)


@dataclass(frozen=True, slots=True)
class Authorization:
    """A signed payment, valid until `valid_before`, seconds since 1970."""

    valid_before: int
    signature: bytes  # 65 bytes r, s, v

    @property
    def vrs(self) -> tuple[int, bytes, bytes]:
        return self.signature[64], self.signature[:32], self.signature[32:64]

    def to_value(self) -> dict[str, Any]:
        return {"valid_before": self.valid_before, "signature": self.signature.hex()}

    @classmethod
    def from_value(cls, value: object) -> Authorization:
        """Raises `Invalid`. Whether it pays is the coin's to say."""
        if not isinstance(value, dict) or value.keys() != {"valid_before", "signature"}:
            raise Invalid("an authorization has the fields signature and valid_before")
        before, text = value["valid_before"], value["signature"]
        if type(before) is not int or not 0 <= before < 2**53:
            raise Invalid(f"valid_before is a time in seconds, not {str(before)[:40]!r}")
        try:
            signature = bytes.fromhex(text) if isinstance(text, str) else b""
        except ValueError as error:
            raise Invalid("an authorization's signature is hex") from error
        if len(signature) != 65:
            raise Invalid(f"an authorization's signature has 65 bytes, not {len(signature)}")
        return cls(before, signature)


async def authorize(
    coin: Coin, key: AccountKey, receiver: Account, amount: int, *, valid_before: int, nonce: bytes
) -> Authorization:
    """Let `receiver` pull `amount` from `key`'s account.  Cost: three requests, for the coin's own domain."""
    separator = domain(await coin.name(), await coin.version(), await coin.chain.chain_id(), coin.address)
    values = (key.account, receiver, amount, 0, valid_before, nonce)
    return Authorization(valid_before, key.sign_digest(typed_digest(separator, RECEIVE, values)))

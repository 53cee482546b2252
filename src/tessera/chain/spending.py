"""What the agent, the co-signer and whoever revokes sign for `contracts/spend_policy.vy`, computed beside the chain.

Each digest equals what the contract says, and is computed here, because a signer must not ask others what it signs. The
structs themselves stand in `incentives.spend_twin`, which also says what the contract would refuse.
"""

from __future__ import annotations

from tessera.chain import abi
from tessera.core.hashing import keccak
from tessera.core.ids import Account, parse_account
from tessera.incentives.spend_twin import Payment

__all__ = ["child_id", "cosign_digest", "mandate_id", "revoke_digest", "spend_digest"]

_FIELDS = (
    b"(bytes32 mandate,address payee,uint256 amount,bytes32 intent,bytes32 purpose,uint256 validAfter,"
    b"uint256 validBefore)"
)
_SPEND_TYPE, _COSIGN_TYPE = keccak(b"Spend" + _FIELDS), keccak(b"Cosign" + _FIELDS)
_REVOKE_TYPE = keccak(b"Revoke(bytes32 mandate)")
_DOMAIN_TYPE = keccak(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)")
_NAME, _VERSION = keccak(b"Tessera spend policy"), keccak(b"1")
_PAYMENT_TYPES = ("bytes32", "address", "uint256", "bytes32", "bytes32", "uint256", "uint256")


def mandate_id(owner: Account, label: bytes) -> bytes:
    """The id of what `owner` opens under `label` (32 bytes), known before it is opened."""
    return keccak(abi.encode(("address", "bytes32"), (owner, label)))


def child_id(parent: bytes, label: bytes) -> bytes:
    """The id of what the agent of `parent` hands down under `label`."""
    return keccak(abi.encode(("bytes32", "bytes32"), (parent, label)))


def spend_digest(chain_id: int, policy: Account, payment: Payment) -> bytes:
    """The 32 bytes that the agent signs: EIP-712, bound to this chain, this contract and one mandate.

    Raises `Invalid` for a value that its field cannot hold.
    """
    return _digest(chain_id, policy, _SPEND_TYPE, abi.encode(_PAYMENT_TYPES, payment))


def cosign_digest(chain_id: int, policy: Account, payment: Payment) -> bytes:
    """The 32 bytes that the co-signer signs for the same payment."""
    return _digest(chain_id, policy, _COSIGN_TYPE, abi.encode(_PAYMENT_TYPES, payment))


def revoke_digest(chain_id: int, policy: Account, mandate: bytes) -> bytes:
    """The 32 bytes by which owner, operator or agent end a mandate without sending a transaction."""
    return _digest(chain_id, policy, _REVOKE_TYPE, abi.encode(("bytes32",), (mandate,)))


def _digest(chain_id: int, policy: Account, kind: bytes, fields: bytes) -> bytes:
    bound = abi.encode(("uint256", "address"), (chain_id, parse_account(policy)))
    domain = keccak(_DOMAIN_TYPE + _NAME + _VERSION + bound)
    return keccak(b"\x19\x01" + domain + keccak(kind + fields))

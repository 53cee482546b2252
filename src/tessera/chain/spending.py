"""What the agent, the co-signer and whoever revokes sign for `contracts/spend_policy.vy`, computed beside the chain.

Each digest equals what the contract says, and is computed here, because a signer must not ask others what it signs. The
structs themselves stand in `incentives.spend_twin`, which also says what the contract would refuse.
"""

from __future__ import annotations

from tessera.chain import abi
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.typed_data import domain, typed_digest
from tessera.incentives.spend_twin import Payment

__all__ = ["child_id", "cosign_digest", "mandate_id", "revoke_digest", "spend_digest"]

_FIELDS = (
    "(bytes32 mandate,address payee,uint256 amount,bytes32 intent,bytes32 purpose,uint256 validAfter,"
    "uint256 validBefore)"
)


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
    return typed_digest(_domain(chain_id, policy), f"Spend{_FIELDS}", payment)


def cosign_digest(chain_id: int, policy: Account, payment: Payment) -> bytes:
    """The 32 bytes that the co-signer signs for the same payment."""
    return typed_digest(_domain(chain_id, policy), f"Cosign{_FIELDS}", payment)


def revoke_digest(chain_id: int, policy: Account, mandate: bytes) -> bytes:
    """The 32 bytes by which owner, operator or agent end a mandate without sending a transaction."""
    return typed_digest(_domain(chain_id, policy), "Revoke(bytes32 mandate)", (mandate,))


def _domain(chain_id: int, policy: Account) -> bytes:
    return domain("Tessera spend policy", "1", chain_id, policy)

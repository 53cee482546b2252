"""Agents' registries (ERC-8004) from Python: where the deployed ones are, and what is computed beside the chain.

`IdentityRegistry`, `ReputationRegistry` and `ValidationRegistry` in `faces` speak the deployed contracts' ABI, so that
the same code works on a public chain with these addresses, and on LocalChain with contracts of our own. The proof that
our reputation registry demands travels in `endpoint`; the deployed one keeps it in its event for whoever checks it.
"""

from __future__ import annotations

import re

from tessera.chain import abi
from tessera.core.errors import Invalid
from tessera.core.hashing import keccak
from tessera.core.ids import Account, parse_account

__all__ = ["IDENTITY", "IDENTITY_TEST", "REPUTATION", "REPUTATION_TEST", "job_proof", "proven_job", "wallet_digest"]

# The same on each public network that has them; there is no validation registry yet. erc-8004-contracts, August 2026.
IDENTITY = Account("0x8004A169FB4a3325136EB29fA0ceB6D2e539a432")
REPUTATION = Account("0x8004BAa17C55a88189AE136b182e5fdA19dE9b63")
IDENTITY_TEST = Account("0x8004A818BFB912233c491871b3d84c89A494BD9e")
REPUTATION_TEST = Account("0x8004B663056A597Dffe9eCcC1965A193B7388713")

_DOMAIN_TYPE = keccak(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)")
_WALLET_TYPE = keccak(b"AgentWalletSet(uint256 agentId,address newWallet,address owner,uint256 deadline)")
_NAME, _VERSION = keccak(b"ERC8004IdentityRegistry"), keccak(b"1")


def wallet_digest(
    chain_id: int, registry: Account, agent_id: int, wallet: Account, owner: Account, deadline: int
) -> bytes:
    """The 32 bytes that `wallet` signs to become the wallet of `owner`'s agent, at the latest at `deadline`."""
    head = (_DOMAIN_TYPE, _NAME, _VERSION, chain_id, parse_account(registry))
    domain = keccak(abi.encode(["bytes32", "bytes32", "bytes32", "uint256", "address"], head))
    fields = (_WALLET_TYPE, agent_id, parse_account(wallet), parse_account(owner), deadline)
    return keccak(
        b"\x19\x01" + domain + keccak(abi.encode(["bytes32", "uint256", "address", "address", "uint256"], fields))
    )


def job_proof(job_id: int) -> str:
    """The `endpoint` of a feedback about a completed job.

    >>> job_proof(17)
    'job:17'
    """
    if not 0 < job_id < 10**20:
        raise Invalid(f"a job's number is between 1 and 10^20, not {job_id}")
    return f"job:{job_id}"


def proven_job(endpoint: str) -> int | None:
    """The job that a feedback's `endpoint` names, read as our registry reads it.

    >>> proven_job("job:17"), proven_job("https://example.org"), proven_job("job:1 7")
    (17, None, None)
    """
    found = re.fullmatch("job:([0-9]{1,20})", endpoint)
    return int(found[1]) if found else None

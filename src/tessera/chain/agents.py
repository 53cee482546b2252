"""Agents' registries (ERC-8004) from Python: where the deployed ones are, and what is computed beside the chain.

`IdentityRegistry`, `ReputationRegistry` and `ValidationRegistry` in `faces` speak the deployed contracts' ABI, so that
the same code works on a public chain with these addresses, and on LocalChain with contracts of our own. The proof that
our reputation registry demands travels in `endpoint`; the deployed one keeps it in its event for whoever checks it.
"""

from __future__ import annotations

import re

from tessera.core.errors import Invalid
from tessera.core.ids import Account
from tessera.core.typed_data import domain, typed_digest

__all__ = ["IDENTITY", "IDENTITY_TEST", "REPUTATION", "REPUTATION_TEST", "job_proof", "proven_job", "wallet_digest"]

# The same on each public network that has them; there is no validation registry yet. erc-8004-contracts, August 2026.
IDENTITY = Account("0x8004A169FB4a3325136EB29fA0ceB6D2e539a432")
REPUTATION = Account("0x8004BAa17C55a88189AE136b182e5fdA19dE9b63")
IDENTITY_TEST = Account("0x8004A818BFB912233c491871b3d84c89A494BD9e")
REPUTATION_TEST = Account("0x8004B663056A597Dffe9eCcC1965A193B7388713")


def wallet_digest(
    chain_id: int, registry: Account, agent_id: int, wallet: Account, owner: Account, deadline: int
) -> bytes:
    """The 32 bytes that `wallet` signs to become the wallet of `owner`'s agent, at the latest at `deadline`."""
    separator = domain("ERC8004IdentityRegistry", "1", chain_id, registry)
    definition = "AgentWalletSet(uint256 agentId,address newWallet,address owner,uint256 deadline)"
    return typed_digest(separator, definition, (agent_id, wallet, owner, deadline))


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

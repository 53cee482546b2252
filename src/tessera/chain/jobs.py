"""Jobs in escrow, computed beside the chain: the signature with which a client funds one.

A client funds a job by allowance and `fund`, or signs an EIP-3009 `ReceiveWithAuthorization` that anybody may carry to
`fundWithAuthorization`. Its nonce is a hash of the job's terms: the signature funds that job as the client has seen it,
or nothing.
"""

from __future__ import annotations

from tessera.chain import abi
from tessera.chain.authorization import RECEIVE
from tessera.chain.faces import JobEscrow
from tessera.core.errors import Invalid
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.typed_data import domain, typed_digest

__all__ = ["PAY", "REFUND", "funding_digest", "funding_nonce"]

REFUND, PAY = 0, 10_000  # `on_silence`: the provider's part in 1/10,000; anything between splits


def funding_nonce(job_id: int, job: JobEscrow.Job) -> bytes:
    """The authorization's nonce: equal to the contract's `funding_nonce(job_id)`, computed from what the signer saw."""
    terms = (
        job_id, job.client, job.provider, job.evaluator, job.hook, job.budget, job.bond, job.expiredAt, job.on_silence
    )  # fmt: skip
    return keccak(abi.encode(["uint256", *["address"] * 4, *["uint256"] * 4], terms))


def funding_digest(
    chain_id: int,
    asset: Account,
    escrow: Account,
    job_id: int,
    job: JobEscrow.Job,
    valid_after: int,
    valid_before: int,
    *,
    asset_name: str = "Test USD",
    asset_version: str = "2",
) -> bytes:
    """The 32 bytes that a client signs to fund `job` with its budget.

    Args:
        valid_after, valid_before: seconds since 1970, both exclusive, as EIP-3009 has them.
        asset_name, asset_version: of the asset's EIP-712 domain; USDC's are "USD Coin" and "2".

    Raises: `Invalid` for a job without provider or budget: there is nothing to agree to yet.
    """
    if job.budget == 0 or int(job.provider, 16) == 0:
        raise Invalid(f"job {job_id} has no {'budget' if job.budget == 0 else 'provider'} yet: nothing to sign")
    separator = domain(asset_name, asset_version, chain_id, asset)
    payment = (job.client, escrow, job.budget, valid_after, valid_before, funding_nonce(job_id, job))
    return typed_digest(separator, RECEIVE, payment)

"""What waits out the run contract's challenge window: the contract keeps a hash, its events tell the rest."""

from __future__ import annotations

from tessera.chain import abi
from tessera.chain.faces import ModelShare, Run
from tessera.core.hashing import keccak

__all__ = ["find_proposal", "proposal_hash"]

NOTHING = bytes(32)
CHUNK_BLOCKS = 5_000  # looked through at once, the newest first


def proposal_hash(proposal: Run.Proposed) -> bytes:
    """As the contract's `pending`."""
    fields = (proposal.epoch, proposal.root, proposal.shares, proposal.opens_at)
    return keccak(abi.encode(("uint256", "bytes32", "uint256", "uint256"), fields))


async def find_proposal(run: Run, epoch: int) -> Run.Proposed | None:
    """The proposal of `epoch` that waits now; None when none does.  Cost: two requests, one more in 5,000 blocks."""
    pending = await run.pending()
    last = -1 if pending == NOTHING else await run.chain.block_number()
    while last >= 0:
        first = max(0, last - CHUNK_BLOCKS + 1)
        for proposal in reversed(await run.events(Run.Proposed, first, last, [epoch.to_bytes(32, "big")])):
            if proposal_hash(proposal) == pending:
                return proposal
        if await ModelShare(run.chain, await run.share()).epoch_count() != epoch:
            return None  # it was posted while we looked, and the next one waits
        last = first - 1
    return None

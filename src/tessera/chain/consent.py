"""What the workers of a run sign for its contract: EIP-712 digests, bound to one chain, one contract and one run.

Each equals what the contract's view of the same name answers. They are computed here because a signer must not ask
others what it signs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.chain import abi
from tessera.core.hashing import keccak
from tessera.core.ids import Account, RunId, parse_run_id
from tessera.core.typed_data import domain, typed_digest

__all__ = ["NOBODY", "Consent"]

NOBODY = Account("0x" + "00" * 20)  # in a change of workers: nobody joins, or nobody leaves


@dataclass(frozen=True, slots=True)
class Consent:
    """Digests of 32 bytes for the contract `run` of run `run_id`.

    All methods raise `Invalid` for a number outside uint256 or bytes that are not 32.
    """

    chain_id: int
    run: Account
    run_id: RunId

    def epoch(self, epoch: int, attempt: int, root: bytes, shares: int) -> bytes:
        """To propose an epoch. `attempt` is how many proposals were struck before."""
        fields = "bytes32 runId,uint256 epoch,uint256 attempt,bytes32 root,uint256 shares"
        return self._typed(f"Epoch({fields})", epoch, attempt, root, shares)

    def strike(self, epoch: int, attempt: int, evidence: bytes) -> bytes:
        """To strike the waiting proposal."""
        fields = "bytes32 runId,uint256 epoch,uint256 attempt,bytes32 evidence"
        return self._typed(f"Strike({fields})", epoch, attempt, evidence)

    def change(self, number: int, joiner: Account = NOBODY, leaver: Account = NOBODY) -> bytes:
        """To let `joiner` in, or `leaver` out."""
        fields = "bytes32 runId,uint256 number,address joiner,address leaver"
        return self._typed(f"Change({fields})", number, joiner, leaver)

    def slash(self, worker: Account, evidence: bytes, challenger: Account) -> bytes:
        """To take `worker`'s bond; `challenger` brought the evidence."""
        fields = "bytes32 runId,address worker,bytes32 evidence,address challenger"
        return self._typed(f"Slash({fields})", worker, evidence, challenger)

    def receipt(self, subject: bytes, content: bytes) -> bytes:
        """A receipt that can be held against its signer: about `subject` he says `content`, and never anything else."""
        return self._typed("Receipt(bytes32 runId,bytes32 subject,bytes32 content)", subject, content)

    def bond_nonce(self, worker: Account, peer: bytes) -> bytes:
        """The nonce of the EIP-3009 authorization that pays a worker's stake: it can pay for nothing else."""
        kinds = ("address", "bytes32", "address", "bytes32")
        return keccak(abi.encode(kinds, (self.run, bytes.fromhex(self.run_id), worker, peer)))

    def _typed(self, definition: str, *values: object) -> bytes:
        separator = domain("Tessera run", "1", self.chain_id, self.run)
        return typed_digest(separator, definition, (bytes.fromhex(parse_run_id(self.run_id)), *values))

"""What the workers of a run sign for its contracts: EIP-712 digests, bound to one chain, one contract and one run.

Each equals what the contract's view of the same name answers. They are computed here because a signer must not ask
others what it signs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.chain import abi
from tessera.core.hashing import keccak
from tessera.core.ids import Account, RunId, parse_run_id
from tessera.core.typed_data import domain, typed_digest

__all__ = ["NOBODY", "Consent", "TallyConsent"]

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


@dataclass(frozen=True, slots=True)
class TallyConsent:
    """Digests of 32 bytes for the contract `income_split` of run `run_id`; each method raises as those of `Consent`."""

    chain_id: int
    split: Account
    run_id: RunId

    def tally(self, tally: int, attempt: int, root: bytes, amount: int) -> bytes:
        """To propose who is paid what for serving. `attempt` is how many tallies were struck before."""
        fields = "bytes32 runId,uint256 tally,uint256 attempt,bytes32 root,uint256 amount"
        return self._typed(f"Tally({fields})", tally, attempt, root, amount)

    def strike(self, tally: int, attempt: int, evidence: bytes) -> bytes:
        """To strike the waiting tally."""
        fields = "bytes32 runId,uint256 tally,uint256 attempt,bytes32 evidence"
        return self._typed(f"Strike({fields})", tally, attempt, evidence)

    def _typed(self, definition: str, *values: object) -> bytes:
        separator = domain("Tessera income split", "1", self.chain_id, self.split)
        return typed_digest(separator, definition, (bytes.fromhex(parse_run_id(self.run_id)), *values))

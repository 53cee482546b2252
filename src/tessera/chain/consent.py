"""What the workers of a run sign for its contract: EIP-712 digests, bound to one chain, one contract and one run.

Each equals what the contract's view of the same name answers. They are computed here because a signer must not ask
others what it signs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.core.errors import Invalid
from tessera.core.hashing import keccak
from tessera.core.ids import Account, RunId, parse_account, parse_run_id

__all__ = ["NOBODY", "Consent"]

NOBODY = Account("0x" + "00" * 20)  # in a change of workers: nobody joins, or nobody leaves

_DOMAIN_TYPE = keccak(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)")
_NAME, _VERSION = keccak(b"Tessera run"), keccak(b"1")
_EPOCH_TYPE = keccak(b"Epoch(bytes32 runId,uint256 epoch,uint256 attempt,bytes32 root,uint256 shares)")
_STRIKE_TYPE = keccak(b"Strike(bytes32 runId,uint256 epoch,uint256 attempt,bytes32 evidence)")
_CHANGE_TYPE = keccak(b"Change(bytes32 runId,uint256 number,address joiner,address leaver)")
_SLASH_TYPE = keccak(b"Slash(bytes32 runId,address worker,bytes32 evidence,address challenger)")
_RECEIPT_TYPE = keccak(b"Receipt(bytes32 runId,bytes32 subject,bytes32 content)")


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
        return self._typed(_EPOCH_TYPE, _word(epoch) + _word(attempt) + _bytes32(root) + _word(shares))

    def strike(self, epoch: int, attempt: int, evidence: bytes) -> bytes:
        """To strike the waiting proposal."""
        return self._typed(_STRIKE_TYPE, _word(epoch) + _word(attempt) + _bytes32(evidence))

    def change(self, number: int, joiner: Account = NOBODY, leaver: Account = NOBODY) -> bytes:
        """To let `joiner` in, or `leaver` out."""
        return self._typed(_CHANGE_TYPE, _word(number) + _account(joiner) + _account(leaver))

    def slash(self, worker: Account, evidence: bytes, challenger: Account) -> bytes:
        """To take `worker`'s bond; `challenger` brought the evidence."""
        return self._typed(_SLASH_TYPE, _account(worker) + _bytes32(evidence) + _account(challenger))

    def receipt(self, subject: bytes, content: bytes) -> bytes:
        """A receipt that can be held against its signer: about `subject` he says `content`, and never anything else."""
        return self._typed(_RECEIPT_TYPE, _bytes32(subject) + _bytes32(content))

    def bond_nonce(self, worker: Account, peer: bytes) -> bytes:
        """The nonce of the EIP-3009 authorization that pays a worker's stake: it can pay for nothing else."""
        return keccak(_account(self.run) + bytes.fromhex(parse_run_id(self.run_id)) + _account(worker) + _bytes32(peer))

    def _typed(self, kind: bytes, fields: bytes) -> bytes:
        domain = keccak(_DOMAIN_TYPE + _NAME + _VERSION + _word(self.chain_id) + _account(self.run))
        run_id = bytes.fromhex(parse_run_id(self.run_id))
        return keccak(b"\x19\x01" + domain + keccak(kind + run_id + fields))


def _account(account: Account) -> bytes:
    return bytes(12) + bytes.fromhex(parse_account(account)[2:])


def _bytes32(value: bytes) -> bytes:
    if len(value) != 32:
        raise Invalid(f"expected 32 bytes, not {len(value)}")
    return value


def _word(number: int) -> bytes:
    if type(number) is not int or not 0 <= number < 2**256:
        raise Invalid(f"not a uint256: {number!r}")
    return number.to_bytes(32, "big")

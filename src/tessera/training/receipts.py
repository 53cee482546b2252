"""Receipts: signed by a neighbour, they say that a worker's output arrived and was used. Nobody's own word counts.

In a step a worker of stage s sends codes down to workers of s + 1 and gradients up to workers of s - 1. Each of them
signs, after its own optimiser step, which microbatches it received from him. A microbatch is verified for him when
somebody of stage s + 1 has signed it forward, unless s is the last, and somebody of s - 1 has signed it backward,
unless s is the first.

    digest = SHA-256( for each microbatch, ascending: its index, 2 bytes big-endian ‖ SHA-256(payload) )
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.ids import PeerId, RunId, parse_peer_id
from tessera.core.signing import PeerKey, verify_peer

__all__ = [
    "MAX_MICROBATCHES", "NO_VERSION", "RECEIPT_PAYLOAD_BYTES", "Credit", "Direction", "Receipt", "credited",
    "payloads_digest", "why_not",
]  # fmt: skip

Direction = Literal["forward", "backward"]
Credit = dict[PeerId, frozenset[tuple[int, int]]]
"""For each worker the (step, microbatch) pairs that he is paid for."""

DOMAIN = "receipt"
MAX_MICROBATCHES = 1024  # of a step, as in a manifest
NO_VERSION = bytes(32)
RECEIPT_PAYLOAD_BYTES = 32 + 32 + 64 + MAX_MICROBATCHES // 8  # at most

_BITMAP = re.compile(r"[1-9a-f][0-9a-f]{0,255}")
_DOWN: dict[Direction, int] = {"forward": 1, "backward": -1}  # from the worker to the signer


@dataclass(frozen=True, slots=True)
class Receipt:
    """`signer` received `worker`'s output of `microbatches` in `step`, hashing to `digest`.

    Attributes:
        microbatches: ascending, at least one.
        version: the signer's own commitment to the parameters with which it computed this step; zeros when none.
    """

    run_id: RunId
    step: int
    worker: PeerId
    signer: PeerId
    direction: Direction
    microbatches: tuple[int, ...]
    digest: bytes  # 32 bytes, of `payloads_digest`
    version: bytes = NO_VERSION
    signature: bytes = b""

    def message(self) -> bytes:
        return encoding.encode(
            {
                "run_id": self.run_id,
                "step": self.step,
                "worker": self.worker,
                "signer": self.signer,
                "direction": self.direction,
                "microbatches": _to_bitmap(self.microbatches),
                "digest": self.digest.hex(),
                "version": self.version.hex(),
            }
        )

    def signed_by(self, key: PeerKey) -> Receipt:
        mine = replace(self, signer=key.id)
        return replace(mine, signature=key.sign(DOMAIN, mine.message()))

    def check(self) -> None:
        """Raises `Misbehaviour`, with the receipt as evidence, unless the signature is the signer's."""
        try:
            if self.signer == self.worker:
                raise Invalid("a worker cannot sign for himself")
            verify_peer(self.signer, DOMAIN, self.message(), self.signature)
        except Invalid as error:
            raise Misbehaviour(f"a receipt for step {self.step} is forged: {error}", evidence=self.to_row()) from error

    def to_row(self) -> list[Any]:
        """The form that travels: a list without the run id, which both sides know."""
        return [
            self.step,
            self.worker,
            self.signer,
            self.direction,
            _to_bitmap(self.microbatches),
            self.digest.hex(),
            self.version.hex(),
            self.signature.hex(),
        ]

    @classmethod
    def from_row(cls, run_id: RunId, row: object) -> Receipt:
        """Raises `Invalid` for a row of another shape. The signature is not checked here."""
        if not isinstance(row, list) or len(row) != 8:
            raise Invalid("a receipt is a list of 8 fields")
        step, worker, signer, direction, microbatches, digest, version, signature = row
        if type(step) is not int or step < 0:
            raise Invalid(f"a receipt's step is a number from 0, not {str(step)[:40]!r}")
        if direction not in ("forward", "backward"):
            raise Invalid(f"a receipt's direction is forward or backward, not {str(direction)[:20]!r}")
        return cls(
            run_id, step, parse_peer_id(worker), parse_peer_id(signer), direction, _from_bitmap(microbatches),
            encoding.hex_bytes(digest, 32), encoding.hex_bytes(version, 32), encoding.hex_bytes(signature, 64),
        )  # fmt: skip

    def to_payload(self) -> bytes:
        """The form that crosses a boundary link, where both sides know the rest."""
        size = self.microbatches[-1] // 8 + 1
        bitmap = sum(1 << index for index in self.microbatches).to_bytes(size, "big")
        return self.digest + self.version + self.signature + bitmap

    @classmethod
    def from_payload(
        cls, run_id: RunId, step: int, worker: PeerId, signer: PeerId, direction: Direction, payload: bytes
    ) -> Receipt:
        """Raises `Invalid` for bytes that `to_payload` does not write. The signature is not checked here."""
        digest, version, signature, bitmap = payload[:32], payload[32:64], payload[64:128], payload[128:]
        if not bitmap or not bitmap[0] or len(payload) > RECEIPT_PAYLOAD_BYTES:
            raise Invalid(f"a receipt of {len(payload)} bytes")
        bits = int.from_bytes(bitmap, "big")
        microbatches = tuple(index for index in range(bits.bit_length()) if bits >> index & 1)
        return cls(run_id, step, worker, signer, direction, microbatches, digest, version, signature)


def payloads_digest(digests: Mapping[int, bytes]) -> bytes:
    """The digest of a receipt, from the SHA-256 of each microbatch's payload. Raises `Invalid` for another size."""
    whole = hashlib.sha256()
    for index in sorted(digests):
        if not 0 <= index < MAX_MICROBATCHES or len(digests[index]) != 32:
            raise Invalid(f"microbatch {index} with a digest of {len(digests[index])} bytes, 32 expected")
        whole.update(index.to_bytes(2, "big") + digests[index])
    return whole.digest()


def why_not(receipt: Receipt, stage_of: Mapping[PeerId, int], microbatches: int) -> str:
    """Why `receipt` counts for nothing in a run with these workers, past ones included; empty when it counts."""
    worker, signer = stage_of.get(receipt.worker), stage_of.get(receipt.signer)
    if worker is None:
        return "another run's worker"
    if signer != worker + _DOWN[receipt.direction]:
        return "whose signer is no neighbour"
    if receipt.microbatches[-1] >= microbatches:
        return f"for microbatch {receipt.microbatches[-1]}, a step has {microbatches}"
    return ""


def credited(
    receipts: Iterable[Receipt], stage_of: Mapping[PeerId, int], stages: int, steps: range, microbatches: int
) -> Credit:
    """Who is paid for what: each (stage, step, microbatch) goes to one worker at most.

    Where several are verified for the same one, because it was done again after a fault, it goes to whom more workers
    have signed it, then to the lower id; so that everybody who holds the same receipts comes to the same result.
    Receipts that `why_not` rejects, of other steps or repeated ones add nothing. Signatures must have been checked.

    Args:
        stage_of: every worker, those who have left included.

    Cost: O(receipts · microbatches).
    """
    signers: dict[tuple[int, int], dict[PeerId, dict[Direction, set[PeerId]]]] = defaultdict(dict)
    for receipt in receipts:
        if receipt.step in steps and not why_not(receipt, stage_of, microbatches):
            for index in receipt.microbatches:
                of_worker = signers[receipt.step, index].setdefault(
                    receipt.worker, {"forward": set(), "backward": set()}
                )
                of_worker[receipt.direction].add(receipt.signer)
    credit: dict[PeerId, set[tuple[int, int]]] = defaultdict(set)
    for work, workers in signers.items():
        best: dict[int, tuple[int, PeerId]] = {}
        for worker, signed in workers.items():
            stage = stage_of[worker]
            if (signed["forward"] or stage == stages - 1) and (signed["backward"] or stage == 0):
                claim = (-len(signed["forward"]) - len(signed["backward"]), worker)
                best[stage] = min(best.get(stage, claim), claim)
        for _, worker in best.values():
            credit[worker].add(work)
    return {worker: frozenset(work) for worker, work in credit.items()}


def _to_bitmap(microbatches: tuple[int, ...]) -> str:
    """
    >>> _to_bitmap((0, 1, 5))
    '23'
    """
    return format(sum(1 << index for index in microbatches), "x")


def _from_bitmap(text: object) -> tuple[int, ...]:
    """
    >>> _from_bitmap("23")
    (0, 1, 5)
    """
    if not isinstance(text, str) or _BITMAP.fullmatch(text) is None:
        raise Invalid(f"microbatches are up to 256 hex digits that do not begin with 0, not {str(text)[:40]!r}")
    bits = int(text, 16)
    return tuple(index for index in range(bits.bit_length()) if bits >> index & 1)

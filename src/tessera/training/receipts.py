"""Receipts: signed by a neighbour, they say that a worker's output arrived and was used. Nobody's own word counts.

In one step a worker of stage s sends codes down to s + 1 and gradients up to s - 1; each neighbour signs, after its
own optimiser step, what it received from him. A step's tokens are verified when every neighbour has signed them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.ids import PeerId, RunId, parse_peer_id
from tessera.core.signing import PeerKey, verify_peer

__all__ = ["Direction", "Receipt", "expected_receipts", "verified_tokens"]

Direction = Literal["forward", "backward"]
DOMAIN = "receipt"
MAX_TOKENS = 2**40


@dataclass(frozen=True, slots=True)
class Receipt:
    """`signer` received `tokens` tokens' worth of `worker`'s output in `step`, hashing to `digest`."""

    run_id: RunId
    step: int
    worker: PeerId
    signer: PeerId
    direction: Direction
    tokens: int
    digest: bytes  # SHA-256 of the step's payloads in order
    signature: bytes = b""

    def message(self) -> bytes:
        return encoding.encode(
            {
                "run_id": self.run_id,
                "step": self.step,
                "worker": self.worker,
                "signer": self.signer,
                "direction": self.direction,
                "tokens": self.tokens,
                "digest": self.digest.hex(),
            }
        )

    def signed_by(self, key: PeerKey) -> Receipt:
        return Receipt(
            self.run_id, self.step, self.worker, key.id, self.direction, self.tokens, self.digest,
            key.sign(DOMAIN, self.message()),
        )  # fmt: skip

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
            self.tokens,
            self.digest.hex(),
            self.signature.hex(),
        ]

    @classmethod
    def from_row(cls, run_id: RunId, row: object) -> Receipt:
        """Raises `Invalid` for a row of another shape. The signature is not checked here."""
        if not isinstance(row, list) or len(row) != 7:
            raise Invalid("a receipt is a list of 7 fields")
        step, worker, signer, direction, tokens, digest, signature = row
        if type(step) is not int or step < 0 or type(tokens) is not int or not 0 < tokens < MAX_TOKENS:
            raise Invalid(f"a receipt's step and tokens are integers in range, not {step!r} and {tokens!r}")
        if direction not in ("forward", "backward"):
            raise Invalid(f"a receipt's direction is forward or backward, not {str(direction)[:20]!r}")
        return cls(
            run_id, step, parse_peer_id(worker), parse_peer_id(signer), direction, tokens,
            _hex(digest, 32), _hex(signature, 64),
        )  # fmt: skip


def expected_receipts(stages: Sequence[PeerId], stage: int) -> list[tuple[Direction, PeerId]]:
    """Which (direction, signer) pairs must sign each step of the worker that holds `stage`."""
    pairs: list[tuple[Direction, PeerId]] = []
    if stage + 1 < len(stages):
        pairs.append(("forward", stages[stage + 1]))
    if stage > 0:
        pairs.append(("backward", stages[stage - 1]))
    return pairs


def verified_tokens(
    receipts: Iterable[Receipt], stages: Sequence[PeerId], steps: range, tokens_per_step: int
) -> list[int]:
    """Tokens of `steps` that every neighbour signed, one number for each stage.

    A step counts in full or not at all; receipts by others, for other steps, twice, or for more than a step's
    tokens add nothing. Signatures must have been checked before.
    """
    signed = {(r.step, r.worker, r.direction, r.signer) for r in receipts if r.tokens == tokens_per_step}
    totals = []
    for stage, worker in enumerate(stages):
        pairs = expected_receipts(stages, stage)
        complete = sum(all((step, worker, d, signer) in signed for d, signer in pairs) for step in steps)
        totals.append(complete * tokens_per_step if pairs else 0)
    return totals


def _hex(text: object, size: int) -> bytes:
    if not isinstance(text, str) or len(text) != 2 * size:
        raise Invalid(f"expected {size} bytes in hex")
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise Invalid(f"expected {size} bytes in hex") from error

"""Serving receipts: signed by a neighbour, they say how many tokens of a session came from a worker. As in training,
nobody's own word counts.

The last stage's workers get theirs from the gateway, for tokens that it was given; every other worker from the stage
after, for tokens whose codes arrived. The gateway's also bounds all the others of its session, and a voucher bounds the
gateway's: so neighbours cannot make up a session, nor a gateway one that nobody has paid for, and the gateway owes
nothing for tokens that it did not get.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.ids import PeerId, RunId, parse_peer_id
from tessera.core.signing import PeerKey, verify_peer
from tessera.serving.income.vouchers import MAX_TOKENS, SESSION_CHARACTERS, Terms, Voucher

__all__ = ["Receipt", "credited", "overdrawn"]

DOMAIN = "serving receipt"


@dataclass(frozen=True, slots=True)
class Receipt:
    """`signer` got `tokens` of `session` from `worker`, prompt and completion together, all that came until then."""

    run_id: RunId
    session: str
    worker: PeerId
    signer: PeerId
    tokens: int
    signature: bytes = b""

    def message(self) -> bytes:
        return encoding.encode(
            {
                "run_id": self.run_id,
                "session": self.session,
                "worker": self.worker,
                "signer": self.signer,
                "tokens": self.tokens,
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
            raise Misbehaviour(
                f"a receipt for session {self.session[:8]}… is forged: {error}", evidence=self.to_row()
            ) from error

    def to_row(self) -> list[Any]:
        """The form that travels: without the run, which both sides know."""
        return [self.session, self.worker, self.signer, self.tokens, self.signature.hex()]

    @classmethod
    def from_row(cls, run_id: RunId, row: object) -> Receipt:
        """Raises `Invalid` for a row of another shape. The signature is not checked here."""
        if not isinstance(row, list) or len(row) != 5:
            raise Invalid("a serving receipt is a list of 5 fields")
        session, worker, signer, tokens, signature = row
        if not isinstance(session, str) or len(session) != SESSION_CHARACTERS:
            raise Invalid(f"a session's name has {SESSION_CHARACTERS} characters")
        if type(tokens) is not int or not 0 < tokens <= MAX_TOKENS:
            raise Invalid(f"a receipt is for 1 to {MAX_TOKENS} tokens, not {str(tokens)[:40]}")
        sealed = encoding.hex_bytes(signature, 64)
        return cls(run_id, session, parse_peer_id(worker), parse_peer_id(signer), tokens, sealed)


def credited(
    terms: Terms,
    vouchers: Iterable[Voucher],
    receipts: Iterable[Receipt],
    stage_of: Mapping[PeerId, int],
    stages: int,
) -> dict[PeerId, int]:
    """The tokens that each worker is paid for. Signatures must have been checked, and that the purchases are paid.

        delivered = min(sum of what the gateway signed, by worker of the last stage, tokens of the voucher)
        credit_w  = floor(signed_w · min(1, delivered / sum of signed at w's stage) · min(1, bought / drawn))

    where `bought` is what the session's purchase buys, and `drawn` all that was delivered under it. So a purchase that
    was shown to several replicas is paid for once, and whoever holds the same receipts comes to the same result.

    Args:
        stage_of: every worker, those who have left included.

    Cost: O(vouchers + receipts).
    """
    known = {voucher.session: voucher for voucher in vouchers}
    signed: dict[str, dict[int, dict[PeerId, int]]] = defaultdict(lambda: defaultdict(dict))
    for receipt in receipts:
        stage = stage_of.get(receipt.worker)
        if receipt.session not in known or stage is None or not _counts(receipt, stage, known, stage_of, stages):
            continue
        of_stage = signed[receipt.session][stage]
        of_stage[receipt.worker] = max(receipt.tokens, of_stage.get(receipt.worker, 0))
    delivered = {
        session: min(known[session].tokens, sum(by_stage[stages - 1].values())) for session, by_stage in signed.items()
    }
    drawn: dict[str, int] = defaultdict(int)
    for session, tokens in delivered.items():
        drawn[known[session].purchase.name] += tokens
    credit: dict[PeerId, int] = defaultdict(int)
    for session, by_stage in signed.items():
        purchase = known[session].purchase
        bought = purchase.value * terms.price_tokens // terms.price_units
        for workers in by_stage.values():
            here, most = sum(workers.values()), delivered[session]
            for worker, tokens in workers.items():
                given = tokens if here <= most else tokens * most // here
                whole = drawn[purchase.name]
                credit[worker] += given if whole <= bought else given * bought // whole
    return {worker: tokens for worker, tokens in credit.items() if tokens}


def overdrawn(terms: Terms, vouchers: Iterable[Voucher]) -> dict[str, list[Voucher]]:
    """The vouchers, by purchase, that give out more than was bought: evidence under their gateways' signatures."""
    by_purchase: dict[str, dict[str, Voucher]] = defaultdict(dict)
    for voucher in vouchers:
        by_purchase[voucher.purchase.name][voucher.session] = voucher
    found = {}
    for name, drawn in by_purchase.items():
        together = list(drawn.values())
        if terms.cost_up(sum(voucher.tokens for voucher in together)) > together[0].purchase.value:
            found[name] = together
    return found


def _counts(
    receipt: Receipt, stage: int, known: Mapping[str, Voucher], stage_of: Mapping[PeerId, int], stages: int
) -> bool:
    """Whether its signer is whom the worker's output went to."""
    if stage == stages - 1:
        return receipt.signer == known[receipt.session].gateway
    return stage_of.get(receipt.signer) == stage + 1

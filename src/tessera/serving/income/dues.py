"""What a gateway owes the workers: vouchers before they decode, receipts after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tessera.core.clock import Clock
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.serving.income.purse import Purse
from tessera.serving.income.receipt_post import ReceiptPost
from tessera.serving.income.vouchers import PAYER, Terms, Voucher

__all__ = ["Dues", "NoDues", "SignedDues"]

VALID_S = 600  # of a voucher: above the time limit of any answer


class Dues(Protocol):
    """What the engine asks of who pays the workers."""

    def voucher(self, session: str, tokens: int) -> list[Any] | None:
        """For `tokens` of what pays for the request at hand; None where workers want none."""
        ...

    def delivered(self, session: str, tokens: Mapping[PeerId, int]) -> None:
        """The session is over: so many tokens of prompt and completion have come from each worker of the last stage."""
        ...


class NoDues:
    """Of a gateway whose workers serve for nothing."""

    def voucher(self, session: str, tokens: int) -> list[Any] | None:
        return None

    def delivered(self, session: str, tokens: Mapping[PeerId, int]) -> None:
        """Nobody asks."""


class SignedDues:
    """Of the run of `terms`; `key` is the gateway's."""

    def __init__(self, key: PeerKey, terms: Terms, purse: Purse, post: ReceiptPost, clock: Clock) -> None:
        self._key, self._terms, self._purse = key, terms, purse
        self._post, self._clock = post, clock

    def voucher(self, session: str, tokens: int) -> list[Any]:
        """See `Dues.voucher`."""
        purchase = self._purse.take(PAYER.get(), session, tokens)
        expires = int(self._clock.time()) + VALID_S
        run_id, chain_id = self._terms.run_id, self._terms.chain_id
        paper = Voucher(run_id, chain_id, self._key.id, session, tokens, expires, purchase)
        return paper.signed_by(self._key).to_value()

    def delivered(self, session: str, tokens: Mapping[PeerId, int]) -> None:
        """See `Dues.delivered`."""
        self._purse.give_back(session, sum(tokens.values()))
        for worker, count in tokens.items():
            self._post.sign(session, worker, count)

"""Workers who want to be paid for tokens that they did not serve: alone, with a neighbour, or with a gateway."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chain_support import RUN_ID
from gate_world import GATEWAY, TERMS, bought, session, voucher
from tessera.core.errors import Misbehaviour
from tessera.core.signing import PeerKey
from tessera.serving.income.receipts import Receipt, credited

WORKERS = [PeerKey(bytes([number + 50]) * 32) for number in range(3)]  # one for each of three stages
STAGE_OF = {worker.id: stage for stage, worker in enumerate(WORKERS)}
FIRST, MIDDLE, LAST = WORKERS


def receipt(worker: PeerKey, signer: PeerKey, tokens: int, number: int = 0) -> Receipt:
    return Receipt(RUN_ID, session(number), worker.id, signer.id, tokens).signed_by(signer)


def honest(tokens: int = 60, number: int = 0) -> list[Receipt]:
    return [
        receipt(FIRST, MIDDLE, tokens, number), receipt(MIDDLE, LAST, tokens, number),
        receipt(LAST, GATEWAY, tokens, number),
    ]  # fmt: skip


def credit(receipts: list[Receipt], papers: list | None = None) -> list[int]:  # type: ignore[type-arg]
    found = credited(TERMS, papers or [voucher()], receipts, STAGE_OF, 3)
    return [found.get(worker.id, 0) for worker in WORKERS]


def test_everybody_is_paid_for_what_arrived() -> None:
    assert credit(honest()) == [60, 60, 60]


def test_nobodys_own_word_counts() -> None:
    with pytest.raises(Misbehaviour):
        receipt(LAST, LAST, 60).check()
    with pytest.raises(Misbehaviour):
        replace(receipt(LAST, GATEWAY, 60), tokens=61).check()
    assert credit([*honest(), receipt(FIRST, FIRST, 100), receipt(MIDDLE, FIRST, 100)]) == [60, 60, 60]


def test_two_neighbours_cannot_pass_what_the_gateway_got() -> None:
    assert credit([*honest(), receipt(FIRST, MIDDLE, 10_000)]) == [60, 60, 60]


def test_without_the_gateways_word_nobody_earns() -> None:
    assert credit(honest()[:2]) == [0, 0, 0]


def test_a_session_that_no_voucher_names_earns_nothing() -> None:
    assert credit(honest(number=7)) == [0, 0, 0]


def test_a_gateway_cannot_sign_for_more_than_its_voucher_or_the_purchase() -> None:
    assert credit(honest(10_000)) == [100, 100, 100]
    papers = [voucher(number, 100, purchase=bought(1_000)) for number in range(5)]
    receipts = [item for number in range(5) for item in honest(100, number)]
    assert credit(receipts, papers) == [100, 100, 100]  # five sessions on one purchase: paid once


def test_a_stage_that_was_replaced_in_mid_session_is_paid_once_for_the_stage() -> None:
    other = PeerKey(b"\x77" * 32)
    receipts = [*honest(), receipt(other, LAST, 40)]
    found = credited(TERMS, [voucher()], receipts, {**STAGE_OF, other.id: 1}, 3)
    assert (found[MIDDLE.id], found[other.id]) == (36, 24)


def test_another_gateways_signature_does_not_count() -> None:
    assert credit([*honest()[:2], receipt(LAST, PeerKey(b"\x78" * 32), 60)]) == [0, 0, 0]

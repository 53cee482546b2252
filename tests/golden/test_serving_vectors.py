"""Vouchers and serving receipts as they travel, recorded for whoever writes another implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chain_support import RUN_ID
from gate_world import GATEWAY, TERMS, WORKER, session, voucher
from tessera.serving.income.receipts import Receipt


def test_vouchers_and_receipts_are_these_bytes(golden: Callable[[str, Any], None]) -> None:
    paper = voucher(1, 77)
    receipt = Receipt(RUN_ID, session(1), WORKER.id, GATEWAY.id, 77).signed_by(GATEWAY)
    golden(
        "specs/vectors/serving.json",
        {
            "run_id": RUN_ID,
            "chain_id": TERMS.chain_id,
            "asset": {"account": TERMS.asset, "name": TERMS.asset_name, "version": TERMS.asset_version},
            "pay_to": TERMS.pay_to,
            "gateway_seed": GATEWAY.seed.hex(),
            "purchase_digest": paper.purchase.digest(TERMS).hex(),
            "voucher_message": paper.message().decode(),
            "voucher": paper.to_value(),
            "receipt_message": receipt.message().decode(),
            "receipt": receipt.to_row(),
        },
    )

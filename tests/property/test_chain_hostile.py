"""Whatever bytes come, what answers is ours: JSON-RPC, transactions, reverts, journal entries."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain_support import CHAIN_ID, key, memory_chain
from tessera.chain.engine import decode_transaction
from tessera.chain.reverts import revert_error, revert_reason
from tessera.chain.rlp_forms import rlp_encode
from tessera.chain.rpc import rpc_error
from tessera.chain.transactions import Transaction, sign
from tessera.core.errors import Invalid, TesseraError

CHAIN = memory_chain()
SENDER = key("sender")
GOOD = sign(SENDER, Transaction(CHAIN_ID, 0, SENDER.account, 5, b"data", 30_000, 7, 3))[0]
METHODS = sorted(CHAIN.methods._table)

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**300) | st.text(max_size=20) | st.floats(allow_nan=False)
    | st.sampled_from(["latest", "0x", "0x1", "0x" + "11" * 20, "0x" + "22" * 32, "earliest", "0x0"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["to", "from", "data", "value", "gas", "topics", "x"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300)
@given(st.sampled_from(METHODS), st.lists(anything, max_size=4))
def test_every_method_answers_any_parameters_with_a_result_or_a_named_error(method: str, params: list[Any]) -> None:
    reply = json.loads(CHAIN.handle(json.dumps({"id": 1, "method": method, "params": params}).encode()))
    assert ("result" in reply) != ("error" in reply)
    if "error" in reply:
        assert reply["error"]["code"] in (3, -32000, -32005, -32600, -32602), reply  # never our own fault, -32603


@given(st.binary(max_size=300))
def test_any_bytes_get_an_answer(body: bytes) -> None:
    reply = CHAIN.handle(body)
    assert reply == b"" or json.loads(reply) is not None


@given(st.binary(max_size=400))
def test_random_bytes_are_no_transaction(raw: bytes) -> None:
    with pytest.raises(Invalid):
        decode_transaction(raw, CHAIN_ID)


@settings(max_examples=200)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.sampled_from(["flip", "cut", "add"]))
def test_a_changed_transaction_is_another_accounts_or_none(position: int, change: int, how: str) -> None:
    """No bytes but the signer's own pass for the signer's."""
    raw = {
        "flip": GOOD[:position] + bytes([GOOD[position] ^ change]) + GOOD[position + 1 :],
        "cut": GOOD[:position],
        "add": GOOD + bytes([change]),
    }[how]
    with contextlib.suppress(Invalid):
        assert decode_transaction(raw, CHAIN_ID).sender.hex() != SENDER.account[2:].lower()


@settings(max_examples=100)
@given(st.lists(st.binary(max_size=40), max_size=12))
def test_well_formed_rlp_of_nonsense_is_no_transaction(fields: list[bytes]) -> None:
    for prefix in (b"", b"\x01", b"\x02"):
        with pytest.raises(Invalid):
            decode_transaction(prefix + rlp_encode(list(fields)), CHAIN_ID)


@given(st.binary(max_size=200))
def test_any_revert_has_a_reason_and_an_error(data: bytes) -> None:
    for prefix in (b"", bytes.fromhex("08c379a0"), bytes.fromhex("4e487b71")):
        assert isinstance(revert_error(revert_reason(prefix + data)), TesseraError)


@given(anything)
def test_any_error_object_of_a_node_becomes_one_of_ours(error: Any) -> None:
    assert isinstance(rpc_error("eth_call", error), TesseraError)
    assert isinstance(rpc_error("eth_call", {"code": error, "message": error, "data": error}), TesseraError)

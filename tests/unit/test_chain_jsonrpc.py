"""JSON-RPC as strangers send it: every text gets a well-formed answer, every parameter is checked."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from chain_support import CHAIN_ID, WORKERS, key, local_world, memory_chain
from tessera.chain.jsonrpc import BATCH_LIMIT, answer
from tessera.chain.rpc import BytesRpc, HttpRpc
from tessera.core.errors import Conflict, Invalid, Late, Refused, TesseraError, Unavailable

pytestmark = pytest.mark.anyio
HASH, ADDRESS = "0x" + "11" * 32, "0x" + "22" * 20


def ask(chain: Any, method: str, *params: Any) -> Any:
    body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": list(params)}
    reply = json.loads(chain.handle(json.dumps(body).encode()))
    assert (reply["jsonrpc"], reply["id"]) == ("2.0", 7)
    return reply


# --- the envelope -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"\xff\xfe", -32700),
        (b"[" * 100_000, -32700),
        (b"1" * 10_000, -32700),  # more digits than Python reads
        (b"5", -32600),
        (b"null", -32600),
        (b"[]", -32600),
        (b"{}", -32600),
        (b'{"id":1,"method":5}', -32600),
        (b'{"id":{},"method":"eth_chainId"}', -32600),
        (b'{"id":1,"method":"eth_chainId","params":{}}', -32602),
        (b'{"id":1,"method":"eth_chainId","params":[1]}', -32602),
        (b'{"id":1,"method":"eth_call"}', -32602),
        (b'{"id":1,"method":"no_such_method"}', -32601),
        (b'{"id":1,"method":"evm_snapshot_"}', -32601),
        (b'{"id":1,"method":"__init__"}', -32601),
        (b"[" + b"1," * BATCH_LIMIT + b"1]", -32600),
    ],
)
async def test_malformed_requests_get_their_code(body: bytes, code: int) -> None:
    reply = json.loads(memory_chain().handle(body))
    assert reply["error"]["code"] == code
    assert "result" not in reply


async def test_a_batch_within_a_batch_is_no_request() -> None:
    reply = json.loads(memory_chain().handle(b'[[{"id":1,"method":"eth_chainId"}],{"id":2,"method":"eth_chainId"}]'))
    assert [one.get("error", {}).get("code") for one in reply] == [-32600, None]


async def test_the_longest_batch_is_answered_and_one_more_is_not() -> None:
    one = {"id": 1, "method": "eth_chainId"}
    assert len(json.loads(memory_chain().handle(json.dumps([one] * BATCH_LIMIT).encode()))) == BATCH_LIMIT
    assert "error" in json.loads(memory_chain().handle(json.dumps([one] * (BATCH_LIMIT + 1)).encode()))


async def test_a_body_over_the_limit_is_not_read() -> None:
    reply = json.loads(memory_chain().handle(b" " * 101, 100))
    assert reply["error"]["message"] == "101 bytes, at most 100 expected"


async def test_a_batch_is_answered_in_order_and_notifications_are_not() -> None:
    batch = [
        {"id": 1, "method": "eth_chainId"},
        {"method": "eth_chainId"},
        {"id": "b", "method": "nothing"},
        7,
    ]
    replies = json.loads(memory_chain().handle(json.dumps(batch).encode()))
    assert [(reply["id"], "result" in reply) for reply in replies] == [(1, True), ("b", False), (None, False)]
    assert memory_chain().handle(b'{"method": "eth_chainId"}') == b""
    assert memory_chain().handle(b'[{"method": "eth_chainId"}]') == b""


async def test_a_bug_of_ours_is_an_internal_error_without_its_details() -> None:
    def broken(method: str, params: list[Any]) -> Any:
        raise ZeroDivisionError("secret")

    reply = json.loads(answer(broken, b'{"id":1,"method":"eth_chainId"}'))
    assert reply["error"]["code"] == -32603
    assert "secret" not in json.dumps(reply)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("eth_getBalance", ["0x12"]),
        ("eth_getBalance", [5]),
        ("eth_getBalance", [ADDRESS, "newest"]),
        ("eth_getBalance", [ADDRESS, "0x"]),
        ("eth_getBalance", [ADDRESS, [1]]),
        ("eth_getBalance", ["0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAeD".swapcase()]),
        ("eth_getStorageAt", [ADDRESS, "0x" + "1" * 65]),
        ("eth_call", [{"to": ADDRESS, "data": "0x1"}]),
        ("eth_call", [{"to": ADDRESS, "data": 5}]),
        ("eth_call", [{"to": ADDRESS, "data": "0x11", "input": "0x22"}]),
        ("eth_call", [{"to": ADDRESS, "surprise": 1}]),
        ("eth_call", ["0x"]),
        ("eth_call", [{"to": ADDRESS, "value": "0x" + "f" * 65}]),
        ("eth_call", [{"to": ADDRESS}, "latest", {ADDRESS: {"balance": "0x1"}}]),
        ("eth_getBlockByNumber", ["latest", "yes"]),
        ("eth_getBlockByHash", ["0x11", False]),
        ("eth_getTransactionReceipt", ["11" * 32]),
        ("eth_getLogs", [{"topics": [HASH] * 5}]),
        ("eth_getLogs", [{"topics": ["0x11"]}]),
        ("eth_getLogs", [{"address": ["0x11"]}]),
        ("eth_getLogs", [{"address": [ADDRESS] * 1_001}]),
        ("eth_getLogs", [{"blockHash": HASH}]),
        ("eth_getLogs", [{"surprise": 1}]),
        ("eth_sendRawTransaction", ["0x" + "00" * (128 * 1024 + 1)]),
        ("eth_feeHistory", ["0x1", "latest", "all"]),
        ("evm_increaseTime", [-1]),
        ("evm_setNextBlockTimestamp", ["soon"]),
        ("evm_mine", [[]]),
        ("eth_call", [{"to": ADDRESS}, {"blockHash": "0x11"}]),
        ("eth_call", [{"to": ADDRESS}, {"blockHash": HASH, "surprise": 1}]),
        ("eth_getTransactionByBlockNumberAndIndex", ["latest", "first"]),
        ("eth_getBlockTransactionCountByHash", ["latest"]),
        ("tessera_journal", [True]),
    ],
)
async def test_a_wrong_parameter_is_named(method: str, params: list[Any]) -> None:
    error = ask(memory_chain(), method, *params)["error"]
    assert error["code"] == -32602, error
    assert "expected" in error["message"] or "not supported" in error["message"]


@pytest.mark.parametrize("raw", ["0x", "0x01", "0x02c0", "0xc0", "0x02" + "ff" * 40, "0xf8" + "00" * 60])
async def test_garbage_is_no_transaction(raw: str) -> None:
    error = ask(memory_chain(), "eth_sendRawTransaction", raw)["error"]
    assert error["code"] == -32000


async def test_what_is_not_there_is_null_or_zero() -> None:
    chain = memory_chain()
    for method in ("eth_getBlockByHash", "eth_getTransactionByHash", "eth_getTransactionReceipt"):
        assert ask(chain, method, HASH)["result"] is None
    assert ask(chain, "eth_getBlockByNumber", "0x5", False)["result"] is None
    assert ask(chain, "eth_getBalance", ADDRESS, "latest")["result"] == "0x0"
    assert ask(chain, "eth_getCode", ADDRESS)["result"] == "0x"
    assert ask(chain, "eth_getStorageAt", ADDRESS, "0x0", "latest")["result"] == "0x" + "00" * 32


async def test_a_revert_has_code_3_and_its_bytes() -> None:
    world = await local_world()
    transfer = "0xa9059cbb" + "00" * 12 + "22" * 20 + "00" * 31 + "05"
    for method in ("eth_call", "eth_estimateGas"):
        error = ask(world.local, method, {"to": world.coin.address, "data": transfer, "from": ADDRESS})["error"]
        assert error["code"] == 3
        assert error["message"] == "execution reverted: coin: transfer amount exceeds balance"
        assert error["data"].startswith("0x08c379a0")


async def test_development_methods_are_for_development_chains_only() -> None:
    from tessera.chain.local import LocalChain

    assert ask(memory_chain(), "evm_mine")["result"] == "0x0"
    assert ask(LocalChain(None, chain_id=CHAIN_ID), "evm_mine")["error"]["code"] == -32601


async def test_blocks_and_transactions_are_found_by_every_name() -> None:
    chain = (await local_world()).local
    assert chain
    for block in (hex(chain.head.number), "latest", {"blockNumber": hex(chain.head.number)}):
        assert ask(chain, "eth_getBlockTransactionCountByNumber", block)["result"] == "0x1"
        found = ask(chain, "eth_getTransactionByBlockNumberAndIndex", block, "0x0")["result"]
        assert ask(chain, "eth_getTransactionByHash", found["hash"])["result"] == found
        assert ask(chain, "eth_getTransactionByBlockNumberAndIndex", block, "0x1")["result"] is None
    name = "0x" + chain.head.hash.hex()
    assert ask(chain, "eth_getBlockTransactionCountByHash", name)["result"] == "0x1"
    assert ask(chain, "eth_getTransactionByBlockHashAndIndex", name, "0x0")["result"] == found
    assert ask(chain, "eth_getTransactionByBlockNumberAndIndex", "0x0", "0x0")["result"] is None  # genesis is empty
    assert ask(chain, "eth_getBlockTransactionCountByNumber", "0x0")["result"] == "0x0"
    assert ask(chain, "eth_getUncleCountByBlockHash", name)["result"] == "0x0"
    assert ask(chain, "eth_getUncleCountByBlockNumber", "0x0")["result"] == "0x0"
    for method in ("eth_getBlockTransactionCountByHash", "eth_getUncleCountByBlockHash"):
        assert ask(chain, method, HASH)["result"] is None
    assert ask(chain, "eth_getTransactionByBlockHashAndIndex", HASH, "0x0")["result"] is None
    assert ask(chain, "eth_getUncleCountByBlockNumber", "0x999")["result"] is None
    assert ask(chain, "net_peerCount")["result"] == "0x0"


async def test_a_call_may_name_its_block_by_hash() -> None:
    world = await local_world()
    supply = {"to": world.coin.address, "data": "0x18160ddd"}
    before, had = world.local.head.hash, await world.coin.totalSupply()  # type: ignore[union-attr]
    await world.coin.mint(WORKERS[0], key("holder").account, 5)
    named = {"blockHash": "0x" + before.hex(), "requireCanonical": True}
    assert int(ask(world.local, "eth_call", supply, named)["result"], 16) == had
    assert int(ask(world.local, "eth_call", supply, "latest")["result"], 16) == had + 5
    assert ask(world.local, "eth_call", supply, {"blockHash": HASH})["error"]["message"] == f"no block {HASH}"


async def test_the_next_block_can_be_given_its_time_and_the_clock_goes_on_from_there() -> None:
    chain = memory_chain()
    later = chain.head.timestamp + 1_000
    assert ask(chain, "evm_setNextBlockTimestamp", hex(later))["result"] == hex(later)
    ask(chain, "evm_mine")
    assert chain.head.timestamp == later
    ask(chain, "evm_mine", later + 5)
    ask(chain, "evm_mine")
    assert chain.head.timestamp == later + 5
    for wrong in (later, 2**40):  # before the head; beyond what a clock can mean
        assert ask(chain, "evm_setNextBlockTimestamp", wrong)["error"]["code"] == -32000


async def test_filters_tell_each_event_and_block_once() -> None:
    world = await local_world()
    chain = world.local
    events = ask(chain, "eth_newFilter", {"address": world.coin.address})["result"]
    blocks = ask(chain, "eth_newBlockFilter")["result"]
    await world.coin.mint(WORKERS[0], key("holder").account, 5)
    assert len(ask(chain, "eth_getFilterChanges", events)["result"]) == 1
    assert ask(chain, "eth_getFilterChanges", blocks)["result"] == ["0x" + chain.head.hash.hex()]  # type: ignore[union-attr]
    assert ask(chain, "eth_getFilterChanges", events)["result"] == []
    assert len(ask(chain, "eth_getFilterLogs", events)["result"]) == 1
    assert ask(chain, "eth_uninstallFilter", events)["result"] is True
    assert ask(chain, "eth_getFilterChanges", events)["error"]["message"] == "filter not found"


async def test_forgotten_filters_make_room() -> None:
    chain = memory_chain()
    first = ask(chain, "eth_newBlockFilter")["result"]
    for _ in range(256):
        ask(chain, "eth_newBlockFilter")
    assert "error" in ask(chain, "eth_getFilterChanges", first)


# --- the asking side --------------------------------------------------------------------------------------------------


def replying(reply: bytes) -> BytesRpc:
    async def exchange(body: bytes) -> bytes:
        return reply

    return BytesRpc(exchange)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"", Unavailable),
        (b"<html>", Unavailable),
        (b"[]", Unavailable),
        (b"{}", Unavailable),
        (b'{"id":99,"result":1}', Unavailable),
        (b'{"id":1,"error":"no"}', Unavailable),
        (b'{"id":1,"error":{"code":-32603,"message":"x"}}', Unavailable),
        (b'{"id":1,"error":{"code":-32601,"message":"x"}}', Invalid),
        (b'{"id":1,"error":{"code":-32000,"message":"nonce too low"}}', Conflict),
        (b'{"id":1,"error":{"code":-32000,"message":"already known"}}', Conflict),
        (b'{"id":1,"error":{"code":-32000,"message":"insufficient funds for gas"}}', Refused),
        (b'{"id":1,"error":{"code":-32005,"message":"too many results"}}', Refused),
        (b'{"id":1,"error":{"code":3,"message":"execution reverted","data":"0x1234"}}', Refused),
        (b'{"id":1,"error":{"code":-32000,"message":"execution reverted: model_share: bad proof"}}', Invalid),
        (b'{"id":1,"error":{"code":3,"message":"execution reverted","data":"0xzz"}}', Refused),
    ],
)
async def test_a_nodes_answer_is_mapped_whatever_it_is(reply: bytes, error: type[TesseraError]) -> None:
    with pytest.raises(error) as caught:
        await replying(reply).request("eth_chainId", [])
    assert type(caught.value) is error


async def test_a_silent_node_is_late() -> None:
    async def silent(body: bytes) -> bytes:
        await anyio.sleep_forever()
        return b""

    with pytest.raises(Late, match="no answer to eth_chainId"):
        await BytesRpc(silent, timeout_s=0.01).request("eth_chainId", [])


async def test_a_node_that_is_not_there_is_unavailable() -> None:
    rpc = HttpRpc("http://127.0.0.1:9/")
    with pytest.raises(Unavailable):
        await rpc.request("eth_chainId", [])
    await rpc.aclose()
    with pytest.raises(Invalid, match="http"):
        HttpRpc("ftp://node")


async def test_parameters_that_are_no_json_are_the_callers_mistake() -> None:
    with pytest.raises(Invalid, match="not JSON"):
        await replying(b"").request("eth_call", [b"bytes"])

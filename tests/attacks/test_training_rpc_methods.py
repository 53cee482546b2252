"""A peer uses the host's chain link for what is not its own: others' accounts, the node's switches, huge batches."""

import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tessera.core.errors import Invalid, Refused, TesseraError
from tessera.p2p.calls import call
from tessera.p2p.memory import MemoryNetwork, VirtualClock, run_virtual
from tessera.training.protocols import RPC
from tessera.training.rpc_link import OPEN_METHODS, RPC_LIMIT, peer_rpc, serve_rpc
from training_run import HOST_KEY, OPERATOR, STRANGER, Ledger
from training_world import small_manifest

Send = Callable[[bytes], Awaitable[bytes]]


@asynccontextmanager
async def link() -> AsyncIterator[tuple[Send, list[bytes]]]:
    """A way to send a body to a host, and the very bytes that its node got."""
    heard: list[bytes] = []

    async def node(body: bytes) -> bytes:
        heard.append(body)
        return b'{"jsonrpc":"2.0","id":1,"result":"0x1"}'

    network = MemoryNetwork(random.Random(0), clock=VirtualClock())
    async with network.start(HOST_KEY) as host, network.start(STRANGER) as stranger:
        serve_rpc(host, node)

        async def send(body: bytes) -> bytes:
            return (await call(stranger, host.record(), RPC, {}, body, timeout_s=10, reply_limit=1 << 20))[1]

        yield send, heard


def request(method: object, **more: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": [], **more}


def refused(body: bytes, expected: type[TesseraError]) -> None:
    async def main() -> None:
        async with link() as (send, heard):
            with pytest.raises(expected):
                await send(body)
            assert heard == []

    run_virtual(main)


@pytest.mark.parametrize(
    "method",
    ["eth_sendTransaction", "eth_accounts", "eth_sign", "personal_unlockAccount", "evm_revert", "evm_snapshot",
     "anvil_setBalance", "hardhat_impersonateAccount", "debug_traceTransaction", "admin_peers", "miner_stop",
     "eth_newFilter", "ETH_CHAINID", "eth_chainId ", "", None, 7, ["eth_chainId"], {"eth_chainId": 1}],
    ids=str,
)  # fmt: skip
def test_a_closed_method_never_reaches_the_node(method: object) -> None:
    refused(json.dumps(request(method)).encode(), Refused)
    refused(json.dumps([request("eth_chainId"), request(method)]).encode(), Refused)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe\xfd", b"[" * 100_000, b"[]", json.dumps([request("eth_chainId")] * 101).encode(),
     b" " * (RPC_LIMIT + 1)],
    ids=["empty", "cut", "no text", "deep", "no call", "long batch", "too large"],
)  # fmt: skip
def test_what_is_no_json_rpc_or_too_much_never_reaches_the_node(body: bytes) -> None:
    refused(body, Invalid)


@pytest.mark.parametrize("body", [b"null", b"7", b'"eth_chainId"', b"[[]]", b"[null]", b"{}"])
def test_what_names_no_method_never_reaches_the_node(body: bytes) -> None:
    refused(body, Refused)


def test_a_text_that_two_parsers_read_differently_is_written_anew() -> None:
    """Some parsers take the first of two equal keys, some the last: the node must see what was checked."""
    double = b'{"jsonrpc":"2.0","id":1,"method":"eth_sendTransaction","params":[],"method":"eth_chainId"}'
    wide = json.dumps(request("eth_chainId")).encode("utf-16")

    async def main() -> None:
        async with link() as (send, heard):
            await send(double)
            await send(wide)
            assert heard == [json.dumps(request("eth_chainId")).encode()] * 2

    run_virtual(main)
    refused(b'{"method":"eth_chainId","id":1,"params":[],"method":"evm_revert"}', Refused)


def test_open_methods_pass_and_their_answers_come_back() -> None:
    async def main() -> None:
        async with link() as (send, heard):
            for method in sorted(OPEN_METHODS):
                assert b"0x1" in await send(json.dumps(request(method)).encode())
            await send(json.dumps([request("eth_chainId")] * 100).encode())
            assert len(heard) == len(OPEN_METHODS) + 1

    run_virtual(main)


def test_a_worker_can_do_all_it_needs_through_the_link() -> None:
    from tessera.chain.client import RpcChain
    from tessera.chain.faces import Coin

    async def main() -> None:
        ledger = Ledger(small_manifest())
        network = MemoryNetwork(random.Random(0), clock=VirtualClock())
        async with network.start(HOST_KEY) as host, network.start(STRANGER) as stranger:
            serve_rpc(host, ledger.exchange)
            chain = RpcChain(peer_rpc(stranger, host.record))
            coin = await Coin.deploy(chain, OPERATOR)
            await coin.mint(OPERATOR, OPERATOR.account, 7)
            assert await coin.balanceOf(OPERATOR.account) == 7
            assert len(await chain.logs(coin.address, [], 0)) == 1

    run_virtual(main)

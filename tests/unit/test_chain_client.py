"""RpcChain when the node is slow, forgetful or shared: one send is at most one transaction."""

from __future__ import annotations

from typing import Any

import pytest

from chain_support import CHAIN_ID, WORKERS, key, memory_chain
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin
from tessera.chain.local import LocalChain
from tessera.chain.threads import ThreadRpc
from tessera.chain.transactions import Transaction, sign
from tessera.core.errors import Conflict, Invalid, Late, Missing, PaymentRequired, Refused, TesseraError, Unavailable

pytestmark = pytest.mark.anyio
OTHER = key("other").account


class Faulty:
    """A node in front of a LocalChain that fails some requests, before or after it has acted on them."""

    def __init__(self, chain: LocalChain) -> None:
        self._inner = ThreadRpc(chain.methods.call)
        self.lose_requests: dict[str, list[TesseraError]] = {}
        self.lose_replies: dict[str, list[TesseraError]] = {}
        self.replace: dict[str, Any] = {}

    async def request(self, method: str, params: list[Any]) -> Any:
        if self.lose_requests.get(method):
            raise self.lose_requests[method].pop()
        if method in self.replace:
            return self.replace[method]
        reply = await self._inner.request(method, params)
        if self.lose_replies.get(method):
            raise self.lose_replies[method].pop()
        return reply


async def faulty_coin() -> tuple[LocalChain, Faulty, Coin]:
    local = memory_chain()
    rpc = Faulty(local)
    return local, rpc, await Coin.deploy(RpcChain(rpc, receipt_timeout_s=0.3), WORKERS[0])


@pytest.mark.parametrize("error", [Unavailable("gone"), Late("slow")])
async def test_a_lost_answer_does_not_send_twice(error: TesseraError) -> None:
    local, rpc, coin = await faulty_coin()
    rpc.lose_replies["eth_sendRawTransaction"] = [error]
    await coin.mint(WORKERS[0], OTHER, 5)
    assert await coin.balanceOf(OTHER) == 5
    assert local.head.number == 2


async def test_a_lost_request_is_sent_again() -> None:
    local, rpc, coin = await faulty_coin()
    rpc.lose_requests["eth_sendRawTransaction"] = [Unavailable("gone")]
    await coin.mint(WORKERS[0], OTHER, 5)
    assert local.head.number == 2


async def test_a_node_that_stays_away_is_unavailable_and_nothing_was_sent() -> None:
    local, rpc, coin = await faulty_coin()
    rpc.lose_requests["eth_sendRawTransaction"] = [Unavailable("gone"), Unavailable("gone")]
    with pytest.raises(Unavailable):
        await coin.mint(WORKERS[0], OTHER, 5)
    assert local.head.number == 1
    await coin.mint(WORKERS[0], OTHER, 5)


async def test_a_taken_nonce_is_passed_over() -> None:
    local, rpc, coin = await faulty_coin()
    rival = sign(WORKERS[0], Transaction(CHAIN_ID, 1, OTHER, 0, b"", 21_000, 0, 0))[0]

    class Racing:
        """Another process sends with the same key, between our reading of the nonce and our sending."""

        raced = False

        async def request(self, method: str, params: list[Any]) -> Any:
            if method == "eth_sendRawTransaction" and not self.raced:
                self.raced = True
                local.submit(rival)
            return await rpc.request(method, params)

    racing = Coin(RpcChain(Racing()), coin.address)
    await racing.mint(WORKERS[0], OTHER, 5)
    assert await coin.balanceOf(OTHER) == 5
    assert local.head.number == 3


async def test_an_account_whose_nonces_are_always_taken_gives_up() -> None:
    local, rpc, coin = await faulty_coin()
    rpc.lose_requests["eth_sendRawTransaction"] = [Conflict("nonce too low") for _ in range(9)]
    with pytest.raises(Conflict, match="another process keeps sending"):
        await coin.mint(WORKERS[0], OTHER, 5)
    assert local.head.number == 1


async def test_a_transaction_that_no_block_takes_is_late_and_named() -> None:
    _, rpc, coin = await faulty_coin()
    rpc.replace["eth_getTransactionReceipt"] = None
    with pytest.raises(Late, match="it may still come") as caught:
        await coin.mint(WORKERS[0], OTHER, 5)
    assert len(caught.value.fields["tx_hash"]) == 66


async def test_a_node_that_blinks_while_we_wait_is_asked_again() -> None:
    _, rpc, coin = await faulty_coin()
    rpc.lose_requests["eth_getTransactionReceipt"] = [Unavailable("blink"), Late("blink")]
    assert (await coin.mint(WORKERS[0], OTHER, 5)).ok


async def test_a_revert_that_the_estimate_did_not_see_is_told_with_its_reason() -> None:
    """Somebody is first, between estimate and block."""
    _, rpc, coin = await faulty_coin()
    rpc.replace["eth_estimateGas"] = hex(100_000)
    with pytest.raises(PaymentRequired, match="exceeds balance") as caught:
        await coin.transfer(WORKERS[0], OTHER, 5)
    assert caught.value.fields["tx_hash"].startswith("0x")


@pytest.mark.parametrize("answer", [None, 5, "5x", [], {"a": 1}])
async def test_an_answer_of_the_wrong_shape_is_invalid(answer: Any) -> None:
    rpc = Faulty(memory_chain())
    chain = RpcChain(rpc)
    rpc.replace = dict.fromkeys(["eth_blockNumber", "eth_call", "eth_getLogs"], answer)
    for ask in (chain.block_number(), chain.call(OTHER, b""), chain.logs(None, [], 0)):
        if answer == [] and ask.__name__ == "logs":
            ask.close()
            continue
        with pytest.raises(Invalid):
            await ask


@pytest.mark.parametrize("field", ["address", "topics", "data", "blockNumber", "transactionHash"])
async def test_a_log_of_the_wrong_shape_is_invalid(field: str) -> None:
    local, rpc, coin = await faulty_coin()
    await coin.mint(WORKERS[0], OTHER, 5)
    (log,) = local.request("eth_getLogs", [{"fromBlock": "0x0"}])
    for wrong in (None, "0xzz", 5):
        rpc.replace["eth_getLogs"] = [{**log, field: wrong}]
        with pytest.raises(Invalid):
            await coin.events(Coin.Transfer)


async def test_more_events_than_a_node_tells_at_once_come_in_parts() -> None:
    local = memory_chain()

    class Stingy:
        asked = 0

        async def request(self, method: str, params: list[Any]) -> Any:
            if method == "eth_getLogs":
                self.asked += 1
                if int(params[0]["toBlock"], 16) - int(params[0]["fromBlock"], 16) > 2:
                    raise Refused("query returned more than 3 blocks", rule="rpc_limit")
            return await ThreadRpc(local.methods.call).request(method, params)

    rpc = Stingy()
    coin = await Coin.deploy(RpcChain(rpc), WORKERS[0])
    for i in range(10):
        await coin.mint(WORKERS[0], OTHER, i)
    assert [event.value for event in await coin.events(Coin.Transfer)] == list(range(10))
    assert rpc.asked > 4


async def test_contracts_that_do_not_ship_are_missing() -> None:
    chain = memory_chain().client()
    for name in ("no_such", "../faces", ""):
        with pytest.raises(Missing):
            await chain.deploy(WORKERS[0], name)
    with pytest.raises(Invalid, match="cannot encode"):
        await chain.deploy(WORKERS[0], "model_share", "M")


async def test_values_that_do_not_fit_their_type_are_refused_before_anything_is_sent() -> None:
    local, _, coin = await faulty_coin()
    for amount in (-1, 2**256, "5", 1.5):
        with pytest.raises(Invalid, match="cannot encode"):
            await coin.mint(WORKERS[0], OTHER, amount)  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="cannot encode"):
        await coin.authorizationState(OTHER, b"\1" * 33)
    assert local.head.number == 1

"""Wallets and libraries of others see a node: web3.py, MetaMask's sequence of calls, and x402's facilitator."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from eth_account import Account as EthAccount
from web3 import Web3
from web3.exceptions import ContractLogicError, TransactionNotFound, Web3RPCError

from chain_support import CHAIN_ID, NOW, WORKERS, key, memory_chain
from tessera.chain import artifact
from tessera.chain.http import rpc_app
from tessera.chain.local import LocalChain

SENDER = EthAccount.from_key(WORKERS[0].secret)
OTHER = key("other").account


@contextmanager
def served(chain: LocalChain) -> Iterator[str]:
    """The chain behind a real server on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(rpc_app(chain), log_level="error", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(params=["in process", "over HTTP"])
def web3(request: pytest.FixtureRequest) -> Iterator[Web3]:
    chain = memory_chain()
    if request.param == "in process":
        yield Web3(chain.provider())
        return
    with served(chain) as url:
        yield Web3(Web3.HTTPProvider(url))


def deploy(web3: Web3, name: str, *arguments: Any) -> Any:
    made = artifact.load(name)
    factory = web3.eth.contract(abi=made.abi, bytecode=made.bytecode)  # type: ignore[call-overload]
    receipt = send(web3, factory.constructor(*arguments))
    return web3.eth.contract(address=receipt.contractAddress, abi=made.abi)


def send(web3: Web3, call: Any) -> Any:
    nonce = web3.eth.get_transaction_count(SENDER.address)
    signed = SENDER.sign_transaction(call.build_transaction({"from": SENDER.address, "nonce": nonce}))
    return web3.eth.wait_for_transaction_receipt(web3.eth.send_raw_transaction(signed.raw_transaction))


def test_web3_reads_deploys_sends_and_listens(web3: Web3) -> None:
    assert web3.is_connected()
    assert (web3.eth.chain_id, web3.eth.block_number, web3.eth.gas_price) == (CHAIN_ID, 0, 0)
    coin = deploy(web3, "coin")
    heard = coin.events.Transfer.create_filter(from_block="latest")
    receipt = send(web3, coin.functions.mint(OTHER, 1_234))
    assert (receipt.status, receipt.blockNumber, receipt.transactionIndex) == (1, 2, 0)
    assert coin.functions.balanceOf(OTHER).call() == 1_234
    assert coin.functions.balanceOf(OTHER).call(block_identifier=1) == 0
    (event,) = coin.events.Transfer().get_logs(from_block=0)
    assert (event.args.receiver, event.args.value, event.blockHash) == (OTHER, 1_234, receipt.blockHash)
    assert [entry.args.value for entry in heard.get_new_entries()] == [1_234]
    assert coin.events.Transfer().process_receipt(receipt)[0].args.value == 1_234
    with pytest.raises(ContractLogicError, match="coin: transfer amount exceeds balance"):
        coin.functions.transfer(OTHER, 1).call({"from": SENDER.address})
    with pytest.raises(ContractLogicError, match="coin: transfer amount exceeds balance"):
        coin.functions.transfer(OTHER, 1).estimate_gas({"from": SENDER.address})


@pytest.mark.slow
def test_web3_finds_blocks_and_transactions_by_any_name(web3: Web3) -> None:
    coin = deploy(web3, "coin")
    receipt = send(web3, coin.functions.mint(OTHER, 1))
    block = web3.eth.get_block("latest", full_transactions=True)
    assert block == web3.eth.get_block(receipt.blockHash, full_transactions=True)
    assert web3.eth.get_block("earliest").number == 0
    transaction = web3.eth.get_transaction(receipt.transactionHash)
    assert transaction == block.transactions[0]  # type: ignore[index]
    assert transaction["input"] == coin.encode_abi("mint", [OTHER, 1]) or bytes(transaction["input"])[:4]
    assert web3.eth.get_block_receipts(2)[0].transactionHash == receipt.transactionHash  # type: ignore[attr-defined]
    assert web3.eth.get_transaction_count(SENDER.address) == 2
    assert web3.eth.get_code(coin.address) == artifact.load("coin").runtime
    assert int.from_bytes(web3.eth.get_storage_at(coin.address, 0)) == 1  # totalSupply
    assert web3.eth.fee_history(2, "latest")["baseFeePerGas"] == [0, 0, 0]
    assert web3.eth.syncing is False
    with pytest.raises(TransactionNotFound):
        web3.eth.get_transaction_receipt("0x" + "11" * 32)  # type: ignore[arg-type]
    old = {"nonce": 0, "to": OTHER, "value": 0, "gas": 30_000, "gasPrice": 0, "chainId": CHAIN_ID}
    with pytest.raises(Web3RPCError, match="nonce too low"):
        web3.eth.send_raw_transaction(SENDER.sign_transaction(old).raw_transaction)


def test_a_blocks_hash_is_the_hash_of_its_header() -> None:
    """Recomputed by py-evm's own header, transaction trie, receipt trie and bloom."""
    from eth.db.trie import make_trie_root_and_nodes
    from eth.vm.forks.prague.blocks import PragueBlockHeader
    from eth.vm.forks.prague.transactions import PragueTransactionBuilder

    chain = memory_chain()
    web3 = Web3(chain.provider())
    coin = deploy(web3, "coin")
    send(web3, coin.functions.mint(OTHER, 1))
    block = chain.head
    assert block.transaction
    transaction = PragueTransactionBuilder().decode(block.transaction.raw)
    logs = [(address, tuple(int.from_bytes(t) for t in topics), body) for address, topics, body in block.logs]
    receipt = transaction.make_receipt(b"\x01", block.gas_used, tuple(logs))
    header = PragueBlockHeader(
        difficulty=0,
        block_number=block.number,
        gas_limit=10_000_000,
        timestamp=block.timestamp,
        parent_hash=block.parent,
        state_root=block.state_root,
        transaction_root=make_trie_root_and_nodes((transaction,))[0],
        receipt_root=make_trie_root_and_nodes((receipt,))[0],
        bloom=receipt.bloom,
        gas_used=block.gas_used,
        extra_data=b"tessera",
        nonce=bytes(8),
    )
    assert header.hash == block.hash


def test_the_calls_that_metamask_makes_are_answered() -> None:
    """Adding the network, showing the account, adding the token, sending, waiting: as seen in the wallet's log."""
    chain = memory_chain()
    coin = deploy(Web3(chain.provider()), "coin")
    with served(chain) as url, httpx.Client(base_url=url, headers={"origin": "chrome-extension://wallet"}) as http:

        def ask(method: str, *params: Any) -> Any:
            body = {"jsonrpc": "2.0", "id": 4_815_162_342, "method": method, "params": list(params)}
            reply = http.post("/", json=body).json()
            assert reply["id"] == 4_815_162_342
            return reply["result"]

        assert http.options("/").headers["access-control-allow-origin"] == "*"
        assert ask("eth_chainId") == hex(CHAIN_ID)
        assert ask("net_version") == str(CHAIN_ID)
        batch = [
            {"jsonrpc": "2.0", "id": 1, "method": "eth_blockNumber", "params": []},
            {"jsonrpc": "2.0", "id": 2, "method": "eth_getBalance", "params": [SENDER.address, "latest"]},
            {"jsonrpc": "2.0", "id": 3, "method": "eth_getBlockByNumber", "params": ["latest", False]},
        ]
        height, balance, block = (reply["result"] for reply in http.post("/", json=batch).json())
        assert (height, balance, block["number"]) == ("0x1", "0x0", "0x1")
        for call in ("symbol", "decimals"):
            found = ask("eth_call", {"to": coin.address, "data": coin.encode_abi(call)}, "latest")
            assert coin.decode_function_input(coin.encode_abi(call))
            assert len(found) > 2
        assert ask("eth_getCode", OTHER, "latest") == "0x"
        data = coin.encode_abi("mint", [SENDER.address, 5])
        call = {"from": SENDER.address, "to": coin.address, "data": data, "value": "0x0"}
        gas = ask("eth_estimateGas", call)
        assert ask("eth_maxPriorityFeePerGas") == "0x0"
        fees = ask("eth_feeHistory", "0x5", "latest", [10, 50, 90])
        assert fees["reward"][0] == ["0x0"] * 3
        nonce = ask("eth_getTransactionCount", SENDER.address, "pending")
        signed = SENDER.sign_transaction(
            {
                "type": 2,
                "chainId": CHAIN_ID,
                "nonce": int(nonce, 16),
                "to": coin.address,
                "data": data,
                "value": 0,
                "gas": int(int(gas, 16) * 1.5),
                "maxFeePerGas": 0,
                "maxPriorityFeePerGas": 0,
            }
        )
        sent = ask("eth_sendRawTransaction", "0x" + bytes(signed.raw_transaction).hex())
        assert ask("eth_getTransactionByHash", sent)["from"] == SENDER.address
        receipt = ask("eth_getTransactionReceipt", sent)
        assert (receipt["status"], receipt["gasUsed"]) == ("0x1", gas)
        assert ask("eth_getBlockByHash", receipt["blockHash"], True)["transactions"][0]["hash"] == sent


def test_x402s_own_facilitator_verifies_and_settles_here() -> None:
    """The official package, unchanged: EIP-3009 by signature, then the same payment again."""
    from x402.mechanisms.evm.exact import ExactEvmClientScheme, ExactEvmFacilitatorScheme
    from x402.mechanisms.evm.signers import EthAccountSigner, FacilitatorWeb3Signer
    from x402.schemas import PaymentPayload, PaymentRequirements

    chain = LocalChain(None, chain_id=CHAIN_ID)  # the machine's clock: the client asks it too
    web3 = Web3(chain.provider())
    coin = deploy(web3, "coin")
    buyer, seller = EthAccount.from_key(key("buyer").secret), key("seller").account
    send(web3, coin.functions.mint(buyer.address, 1_000))
    network = f"eip155:{CHAIN_ID}"
    with served(chain) as url:
        facilitator = ExactEvmFacilitatorScheme(FacilitatorWeb3Signer("0x" + WORKERS[1].secret.hex(), url))
        wanted = PaymentRequirements(
            scheme="exact",
            network=network,
            asset=coin.address,
            amount="400",
            pay_to=seller,
            max_timeout_seconds=60,
            extra={"name": "Test USD", "version": "2"},
        )
        inner = ExactEvmClientScheme(EthAccountSigner(buyer)).create_payment_payload(wanted)
        payload = PaymentPayload(x402_version=2, payload=inner, accepted=wanted)
        assert facilitator.verify(payload, wanted).is_valid
        settled = facilitator.settle(payload, wanted)
        assert settled.success, settled
        assert coin.functions.balanceOf(seller).call() == 400
        again = facilitator.verify(payload, wanted)
        assert (again.is_valid, again.invalid_reason) == (False, "invalid_exact_evm_nonce_already_used")
    assert chain.head.timestamp > NOW - 10**9

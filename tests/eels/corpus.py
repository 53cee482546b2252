"""The transactions that EELS replays: those of every gas table, and the edges of the engine.

Each chain is a list of blocks with what LocalChain says of them. The edges are what contracts of ours seldom do: failed
creations, gas that runs out, every type of transaction, refunds, precompiles, hashes of older blocks.
"""

from __future__ import annotations

from typing import Any

from eth_account import Account as EthAccount

from chain_support import CHAIN_ID, WORKERS, key, memory_chain
from gas import CONTRACTS, gas_table
from tessera.chain.engine import GAS_LIMIT, decode_transaction
from tessera.chain.forms import block_form, receipt_form
from tessera.chain.local import LocalChain
from tessera.chain.transactions import Transaction, sign
from tessera.core.clock import FakeClock

__all__ = ["corpus"]

RICH = key("rich")
OTHER = key("other").account
ETHER = 10**18


async def corpus() -> list[dict[str, Any]]:
    """Every chain, as JSON."""
    chains = [edges()]
    for contract in CONTRACTS:
        chain = memory_chain()
        await gas_table(contract, chain.client())
        chains.append(exported(contract, chain))
    return chains


def exported(name: str, chain: LocalChain) -> dict[str, Any]:
    genesis = chain.state(0)
    accounts = [*chain.genesis.alloc, *chain.genesis.contracts]
    alloc = {
        account: {
            "balance": str(genesis.balance(raw)), "nonce": genesis.nonce(raw), "code": "0x" + genesis.code(raw).hex()
        }
        for account in accounts
        for raw in [bytes.fromhex(account[2:])]
    }  # fmt: skip
    blocks = [_block(chain, number) for number in range(chain.head.number + 1)]
    return {"name": name, "chainId": chain.chain_id, "gasLimit": GAS_LIMIT, "alloc": alloc, "blocks": blocks}


def _block(chain: LocalChain, number: int) -> dict[str, Any]:
    block = chain.block(number)
    assert block is not None
    form = block_form(block, False)
    found = {
        "number": number, "timestamp": block.timestamp, "hash": form["hash"], "stateRoot": form["stateRoot"],
        "transactionsRoot": form["transactionsRoot"], "receiptsRoot": form["receiptsRoot"], "bloom": form["logsBloom"],
        "gasUsed": block.gas_used, "raw": None,
    }  # fmt: skip
    if block.transaction:
        receipt = receipt_form(block)
        logs = [[log["address"].lower(), log["topics"], log["data"]] for log in receipt["logs"]]
        found |= {"raw": "0x" + block.transaction.raw.hex(), "hashOfRaw": receipt["transactionHash"]}
        found |= {"ok": receipt["status"] == "0x1", "logs": logs}
    return found


def edges() -> dict[str, Any]:
    """Transactions at the edges, on one chain whose first account is rich."""
    chain = LocalChain(None, chain_id=CHAIN_ID, clock=FakeClock(), alloc={RICH.account: ETHER, OTHER: 5})
    sent = iter(range(10_000))

    def send(to: str | None, data: bytes = b"", value: int = 0, gas: int = 200_000, fee: int = 0) -> bytes:
        raw, _ = sign(RICH, Transaction(CHAIN_ID, next(sent), to, value, data, gas, fee, fee))  # type: ignore[arg-type]
        chain.submit(raw)
        return chain.head.contract or b""

    def deploy(runtime: bytes) -> str:
        return "0x" + send(None, _init(runtime), gas=1_000_000).hex()

    send(OTHER, value=1)
    send(OTHER, value=1, fee=3)  # a tip to the account zero
    send(key("new").account, value=7, fee=1)
    send(RICH.account, value=5)
    send(OTHER, b"\x00" * 100 + b"\x01" * 100, gas=100_000)  # the floor of EIP-7623
    send("0x" + "00" * 20, value=1)
    send(None, b"")  # a contract without code
    send(None, b"\xfe", gas=60_000)  # a creation that uses up its gas
    send(None, bytes.fromhex("60006000fd"))  # a creation that reverts
    send(None, _init(b"\xef\x00"), gas=100_000)  # EIP-3541
    send(None, _init(b"\x00" * 24_577), gas=9_000_000)  # EIP-170: too long
    counter = deploy(bytes.fromhex("600035600055600035600155600035600255"))  # three slots take the argument
    for word in (1, 1, 2, 0, 0, 3):
        send(counter, word.to_bytes(32, "big"))
    send(counter, (9).to_bytes(32, "big"), gas=30_000)  # runs out of gas between two slots
    send(counter, (0).to_bytes(32, "big"), value=1)
    hasher = deploy(bytes.fromhex("6000354360000340600055600143034060015542600255"))  # BLOCKHASH and TIMESTAMP
    send(hasher, (0).to_bytes(32, "big"))
    send(hasher, (2).to_bytes(32, "big"))
    suicide = deploy(bytes.fromhex("33ff"))
    send(suicide, value=3)
    send(None, bytes.fromhex("33ff"), value=3, gas=100_000)  # dies in the transaction that made it
    transient = deploy(bytes.fromhex("60015c60005560203660015d"))
    send(transient, b"\x01")
    loop = deploy(bytes.fromhex("5b600056"))
    send(loop, gas=100_000)
    deep = deploy(bytes.fromhex("60006000600060006000305af1600055"))  # calls itself until the gas is gone
    send(deep, gas=3_000_000)
    logger = deploy(bytes.fromhex("3660005f375f356001600236 5fa2".replace(" ", "")))  # one event with two topics
    send(logger, b"\x05" * 40)
    for precompile, data in _PRECOMPILES.items():
        send(f"0x{precompile:040x}", data, gas=500_000)
    for transaction in _other_types(next(sent)):
        raw = bytes(EthAccount.sign_transaction(transaction, RICH.secret).raw_transaction)
        assert decode_transaction(raw, CHAIN_ID).kind in (0, 1)
        chain.submit(raw)
    poor, _ = sign(WORKERS[0], Transaction(CHAIN_ID, 0, counter, 0, b"\x01", 100_000, 0, 0))  # type: ignore[arg-type]
    chain.submit(poor)
    chain.mine()
    return exported("edges", chain)


def _other_types(nonce: int) -> list[dict[str, Any]]:
    base = {"to": OTHER, "value": 2, "gas": 100_000, "gasPrice": 1, "chainId": CHAIN_ID}
    listed = [{"address": OTHER, "storageKeys": ["0x" + "11" * 32, "0x" + "22" * 32]}]
    return [base | {"nonce": nonce}, base | {"nonce": nonce + 1, "type": 1, "accessList": listed}]


def _init(runtime: bytes) -> bytes:
    """Init code that leaves `runtime`: PUSH3 length, DUP1, PUSH1 13, PUSH0, CODECOPY, PUSH0, RETURN."""
    return b"\x62" + len(runtime).to_bytes(3, "big") + bytes.fromhex("80600b5f395ff3") + runtime


_PRECOMPILES = {
    1: bytes(128),  # ecrecover of nothing
    2: b"tessera" * 9,
    3: b"tessera",
    4: b"tessera" * 20,
    5: (1).to_bytes(32, "big") * 3 + b"\x03\x02\x05",  # 3^2 mod 5
    6: bytes(128),
    7: bytes(96),
    8: b"",
    9: bytes(213),
    10: b"\x01" * 10,  # a malformed proof
    11: bytes(256),  # BLS, Prague
}

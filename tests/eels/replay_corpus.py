"""Replays a corpus of blocks with EELS, Ethereum's executable specification, and compares what came of each of them.

Runs in a virtual environment of its own (`make install-eels`), because EELS needs older cryptography than we do:
so this file imports nothing of ours. It reads the corpus from the file that it is given, prints one line for each
difference, then a line of figures as JSON, and ends with 1 when anything differed.

    .venv-eels/bin/python tests/eels/replay_corpus.py corpus.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from ethereum.crypto.hash import keccak256
from ethereum.forks.prague import vm
from ethereum.forks.prague.blocks import decode_receipt
from ethereum.forks.prague.bloom import logs_bloom
from ethereum.forks.prague.fork import process_transaction
from ethereum.forks.prague.fork_types import Account, Address
from ethereum.forks.prague.state import State, set_account, state_root
from ethereum.forks.prague.transactions import LegacyTransaction, decode_transaction
from ethereum.forks.prague.trie import root, trie_get
from ethereum_rlp import rlp
from ethereum_types.bytes import Bytes, Bytes32
from ethereum_types.numeric import U64, U256, Uint


def differences(chain: dict[str, Any]) -> Iterator[str]:
    """Each way in which EELS sees this chain differently."""
    state = State()
    for address, account in chain["alloc"].items():
        content = Account(Uint(account["nonce"]), U256(int(account["balance"])), Bytes(_bytes(account["code"])))
        set_account(state, Address(_bytes(address)), content)
    blocks = chain["blocks"]
    if state_root(state) != _bytes(blocks[0]["stateRoot"]):
        yield f"{chain['name']}: the first state has another root: 0x{state_root(state).hex()}"
    for parent in range(len(blocks) - 1):
        block = blocks[parent + 1]
        if block["raw"] is None:  # mined empty by hand: no transaction, no change
            continue
        hashes = [Bytes32(_bytes(earlier["hash"])) for earlier in blocks[max(0, parent - 255) : parent + 1]]
        found = _run(chain, state, block, hashes)
        for name, value in found.items():
            if value != block[name]:
                yield f"{chain['name']}, block {parent + 1}: {name} is {block[name]}, EELS says {value}"


def _run(chain: dict[str, Any], state: State, block: dict[str, Any], hashes: list[Any]) -> dict[str, Any]:
    environment = vm.BlockEnvironment(
        chain_id=U64(chain["chainId"]), state=state, block_gas_limit=Uint(chain["gasLimit"]), block_hashes=hashes,
        coinbase=Address(bytes(20)), number=Uint(block["number"]), base_fee_per_gas=Uint(0),
        time=U256(block["timestamp"]), prev_randao=Bytes32(bytes(32)), excess_blob_gas=U64(0),
        parent_beacon_block_root=Bytes32(bytes(32)),
    )  # fmt: skip
    raw = _bytes(block["raw"])
    transaction = decode_transaction(Bytes(raw)) if raw[0] < 0xC0 else rlp.decode_to(LegacyTransaction, Bytes(raw))
    output = vm.BlockOutput()
    process_transaction(environment, output, transaction, Uint(0))
    receipt = decode_receipt(trie_get(output.receipts_trie, rlp.encode(Uint(0))))
    return {
        "gasUsed": int(output.block_gas_used),
        "ok": bool(receipt.succeeded),
        "logs": [
            ["0x" + log.address.hex(), ["0x" + topic.hex() for topic in log.topics], "0x" + log.data.hex()]
            for log in output.block_logs
        ],
        "bloom": "0x" + logs_bloom(output.block_logs).hex(),
        "receiptsRoot": "0x" + root(output.receipts_trie).hex(),
        "transactionsRoot": "0x" + root(output.transactions_trie).hex(),
        "stateRoot": "0x" + state_root(state).hex(),
        "hashOfRaw": "0x" + keccak256(raw).hex(),
    }


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix("0x"))


def main(path: str) -> int:
    with open(path, encoding="utf-8") as file:
        corpus = json.load(file)
    found = [line for chain in corpus for line in differences(chain)]
    count = sum(block["raw"] is not None for chain in corpus for block in chain["blocks"])
    figures = {"transactions": count, "differences": len(found)}
    sys.stdout.write("".join(f"{line}\n" for line in [*found, json.dumps(figures)]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

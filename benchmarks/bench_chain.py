"""The embedded chain against eth-tester and anvil: transfers, replay, opening, logs, paid requests.

    python benchmarks/bench_chain.py [--quick] [--json] [--anvil PATH]

All in one run on one machine. A transfer is a signed ERC-20 transfer, signed beforehand, and put in a block of its own
by each; both chains run in this process without HTTP. A paid request is one completion of an engine that answers at
once, bought by the official x402 client: what is timed is the offer, the signature, verification and settlement.
Opening is timed in fresh processes, imports apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from eth_abi.abi import encode

from tessera.chain import artifact
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin
from tessera.chain.local import LocalChain
from tessera.chain.replay import verify_journal
from tessera.chain.rpc import HttpRpc
from tessera.chain.transactions import Transaction, sign
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

RESULTS = Path(__file__).parent / "results"
CHAIN_ID = 845_300
PAYER, PAYEE = AccountKey(keccak(b"payer")), AccountKey(keccak(b"payee"))
TRANSFER = keccak(b"transfer(address,uint256)")[:4] + encode(["address", "uint256"], [PAYEE.account, 1])
MINT = keccak(b"mint(address,uint256)")[:4] + encode(["address", "uint256"], [PAYER.account, 10**12])
GAS = 200_000
PRICE = 40_000
AT_ONCE = 8  # paid requests under way

OPENING = """
import sys, time
from pathlib import Path
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin
from tessera.chain.local import LocalChain
from tessera.core.clock import SystemClock
started = time.perf_counter()
chain = LocalChain(Path(sys.argv[1]), chain_id=int(sys.argv[2]))
chain.request("eth_getBlockByNumber", ["latest", False])
print(time.perf_counter() - started, chain.head.number)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of everything: under 50 s on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--anvil", type=Path, default=find_anvil(), help="anvil's binary, to compare with")
    arguments = parser.parse_args()
    result = measure(arguments.quick, arguments.anvil)
    if not arguments.quick:
        write_results(result)
    for name, value in result.items():
        print(f"{name:32} {value}")
    if arguments.json:
        print(json.dumps(result))


def measure(quick: bool, anvil: Path | None) -> dict[str, Any]:
    transfers, logs, journal, paid = (300, 400, 1_000, 16) if quick else (3_000, 2_000, 20_000, 200)
    with tempfile.TemporaryDirectory() as folder:
        ours = local_transfers(transfers)
        theirs = eth_tester_transfers(min(transfers, 600))
        path = Path(folder) / "journal.db"
        fill(path, journal)
        replayed = opening(path)  # writes what makes the next one fast, where the chain has such a thing
        opened = opening(path)
        result: dict[str, Any] = {
            "transfers_per_s": round(ours),
            "eth_tester_transfers_per_s": round(theirs),
            "transfers_ratio": round(ours / theirs, 2),
            "journal_transactions": journal,
            "replay_per_s": round(replay_rate(path)),
            "open_journal_s": round(opened, 3),
            "open_journal_first_s": round(replayed, 3),
            "cold_start_s": round(min(opening(Path(folder) / f"new{n}.db") for n in range(3)), 3),
            f"get_logs_{logs}_s" if quick else "get_logs_2000_s": round(get_logs(logs), 4),
        }
    result["paid_requests_per_s"] = round(asyncio.run(paid_on_local(paid)), 1)
    on_anvil = asyncio.run(paid_on_anvil(anvil, paid)) if anvil else None
    result["anvil_paid_requests_per_s"] = None if on_anvil is None else round(on_anvil, 1)
    if on_anvil:
        result["paid_requests_ratio"] = round(result["paid_requests_per_s"] / on_anvil, 2)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {**result, "hardware": machine, "python": platform.python_version(), "command": command(quick)}


# --- transfers --------------------------------------------------------------------------------------------------------


def signed(chain_id: int, nonce: int, to: Account | None, data: bytes, gas: int = GAS, fee: int = 0) -> bytes:
    return sign(PAYER, Transaction(chain_id, nonce, to, 0, data, gas, fee, 0))[0]


def coin_of(contract: bytes | str) -> Account:
    return Account(contract if isinstance(contract, str) else "0x" + contract.hex())


def ready(chain: LocalChain) -> Account:
    """A coin, and money for the payer: nonces 0 and 1."""
    made = chain.submit(signed(CHAIN_ID, 0, None, artifact.load("coin").init_code(), 4_000_000))
    block = chain.block_of(made.hash)
    assert block is not None
    assert block.contract is not None
    coin = coin_of(block.contract)
    chain.submit(signed(CHAIN_ID, 1, coin, MINT))
    return coin


def local_transfers(count: int) -> float:
    chain = LocalChain(None, chain_id=CHAIN_ID)
    coin = ready(chain)
    raws = [signed(CHAIN_ID, 2 + n, coin, TRANSFER) for n in range(count)]
    return count / timed(lambda: [chain.submit(raw) for raw in raws])


def eth_tester_transfers(count: int) -> float:
    try:
        from eth_tester import EthereumTester, PyEVMBackend
    except ImportError as error:
        raise SystemExit("this comparison needs eth-tester: pip install eth-tester==0.14.0b1") from error
    tester = EthereumTester(PyEVMBackend())
    chain_id, fee = int(tester.backend.chain.chain_id), 10**10
    rich = tester.get_accounts()[0]
    tester.send_transaction({"from": rich, "to": PAYER.account, "value": 10**22, "gas": 21_000})
    init = artifact.load("coin").init_code()
    made = tester.send_raw_transaction("0x" + signed(chain_id, 0, None, init, 4_000_000, fee).hex())
    coin = coin_of(tester.get_transaction_receipt(made)["contract_address"])
    tester.send_raw_transaction("0x" + signed(chain_id, 1, coin, MINT, fee=fee).hex())
    raws = ["0x" + signed(chain_id, 2 + n, coin, TRANSFER, fee=fee).hex() for n in range(count)]
    return count / timed(lambda: [tester.send_raw_transaction(raw) for raw in raws])


def get_logs(count: int) -> float:
    chain = LocalChain(None, chain_id=CHAIN_ID)
    coin = ready(chain)
    for n in range(count - 1):  # minting made the first
        chain.submit(signed(CHAIN_ID, 2 + n, coin, TRANSFER))
    query = {"jsonrpc": "2.0", "id": 1, "method": "eth_getLogs", "params": [{"fromBlock": "0x0", "address": coin}]}
    body = json.dumps(query).encode()
    answers: list[bytes] = []
    seconds = timed(lambda: answers.append(chain.handle(body)))
    assert len(json.loads(answers[0])["result"]) == count
    return seconds


# --- opening ----------------------------------------------------------------------------------------------------------


def fill(path: Path, count: int) -> None:
    with LocalChain(path, chain_id=CHAIN_ID) as chain:
        coin = ready(chain)
        for n in range(count - 2):
            chain.submit(signed(CHAIN_ID, 2 + n, coin, TRANSFER))


def opening(path: Path) -> float:
    """Seconds from opening the journal to the first answer, in a fresh process."""
    words = [sys.executable, "-c", OPENING, str(path), str(CHAIN_ID)]
    seconds, _ = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds)


def replay_rate(path: Path) -> float:
    """Blocks a second when a member replays the whole journal."""
    with LocalChain(path, chain_id=CHAIN_ID) as chain:
        entries, genesis = chain.entries(), chain.genesis
    return len(entries) / timed(lambda: verify_journal(entries, chain_id=CHAIN_ID, genesis=genesis))


# --- paid requests ----------------------------------------------------------------------------------------------------


async def paid_on_local(count: int) -> float:
    return await paid_requests(LocalChain(None, chain_id=CHAIN_ID).client(), count)


async def paid_on_anvil(binary: Path, count: int) -> float:
    async with running_anvil(binary) as url:
        rpc = HttpRpc(url)
        for key in (PAYER, PAYEE):
            await rpc.request("anvil_setBalance", [key.account, hex(10**21)])
        rate = await paid_requests(RpcChain(rpc), count)
        await rpc.aclose()
        return rate


async def paid_requests(chain: RpcChain, count: int) -> float:
    from tessera.serving.buyer import Buyer
    from tessera.serving.engine import FakeEngine
    from tessera.serving.gateway import GatewayConfig, create_app
    from tessera.serving.local import LocalModel
    from tessera.serving.paying.payments import PaymentConfig, X402Payments
    from tessera.serving.text import CharTokenizer

    coin = await Coin.deploy(chain, PAYEE)
    await coin.mint(PAYEE, PAYER.account, 10**12)
    config = PaymentConfig(coin.address, await coin.name(), await coin.version(), PRICE, PAYEE.account)
    payments = await X402Payments.open(config, chain, PAYEE)
    engine = FakeEngine(lambda prompt, sampling: list(b"hello world"))
    app = create_app(GatewayConfig(), [LocalModel("bench", engine, CharTokenizer())], [payments])
    limits = {"max_units_each": PRICE, "max_units": PRICE * (count + 1)}
    chain_id, transport = await chain.chain_id(), httpx.ASGITransport(app)
    buyer = Buyer("http://gateway", PAYER, chain_id=chain_id, asset=coin.address, transport=transport, **limits)
    await buyer.complete("warm", model="bench", max_tokens=8)
    started, left = time.perf_counter(), iter(range(count))

    async def buy() -> None:
        for number in left:
            await buyer.complete(f"question {number}", model="bench", max_tokens=8)

    await asyncio.gather(*(buy() for _ in range(AT_ONCE)))
    seconds = time.perf_counter() - started
    paid = await coin.balanceOf(PAYEE.account)
    if paid != PRICE * (count + 1):
        raise SystemExit(f"{paid} units arrived, {PRICE * (count + 1)} expected")
    return count / seconds


@asynccontextmanager
async def running_anvil(binary: Path) -> AsyncIterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(binary), "--port", str(port), "--chain-id", str(CHAIN_ID), "--hardfork", "prague", "--silent"]
    process = subprocess.Popen(words)  # noqa: ASYNC220 - nobody else uses this loop yet
    try:
        url, rpc = f"http://127.0.0.1:{port}", HttpRpc(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 20
        while True:
            try:
                await rpc.request("eth_chainId", [])
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)
        await rpc.aclose()
        yield url
    finally:
        process.terminate()
        process.wait(10)


def find_anvil() -> Path | None:
    root = Path(__file__).resolve().parent.parent
    found = os.environ.get("TESSERA_ANVIL") or shutil.which("anvil")
    path = Path(found) if found else root / "node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil"
    return path if path.is_file() else None


# --- around -----------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def command(quick: bool) -> str:
    return "python benchmarks/bench_chain.py" + (" --quick" if quick else "")


def write_results(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "chain.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = "\n".join(f"| {name} | {value} |" for name, value in result.items())
    name = RESULTS / f"chain_{os.cpu_count()}core_{datetime.now(UTC):%Y%m}.md"
    name.write_text(f"# The embedded chain\n\n| figure | value |\n|---|---|\n{rows}\n")


if __name__ == "__main__":
    main()

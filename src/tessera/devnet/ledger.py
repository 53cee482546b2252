"""The devnet's chain: the embedded one by default, any EVM network by URL; and the test coin on it.

The operator is an ordinary account. On the embedded chain transactions cost nothing. On a network with unlocked
accounts (anvil) the first of them pays his gas; elsewhere somebody must fund him first, and the error says so.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx
from anyio import to_thread

from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin, IncomeSplit
from tessera.chain.local import LocalChain
from tessera.chain.rpc import HttpRpc
from tessera.core.clock import Clock
from tessera.core.errors import Invalid, Late, Refused, TesseraError, Unavailable
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey
from tessera.training.home import write_atomic

__all__ = ["LOCAL_CHAIN_ID", "Ledger", "open_ledger"]

LOCAL_CHAIN_ID = 8_402
OPERATOR_WEI = 10**18  # taken from an unlocked account where gas costs money
FUNDING_S = 60.0
BODY_LIMIT = 1 << 20  # bytes of a JSON-RPC request


@dataclass(frozen=True)
class Ledger:
    """A chain that is open.

    Attributes:
        exchange: JSON-RPC text in, text out; what peers reach through the host.
        local: the embedded chain, or None on a network by URL.
    """

    chain: RpcChain
    chain_id: int
    exchange: Callable[[bytes], Awaitable[bytes]]
    local: LocalChain | None
    url: str | None


@asynccontextmanager
async def open_ledger(
    journal: Path, url: str | None, clock: Clock, operator: AccountKey | None = None
) -> AsyncIterator[Ledger]:
    """The embedded chain in `journal`, whose heads `operator` signs for members, or the network at `url`.

    Raises: Invalid for a damaged journal; Unavailable when nobody answers at `url`.
    """
    if url is None:
        local = await to_thread.run_sync(
            lambda: LocalChain(journal, chain_id=LOCAL_CHAIN_ID, clock=clock, operator=operator)
        )
        try:
            yield Ledger(local.client(), LOCAL_CHAIN_ID, _local_exchange(local), local, None)
        finally:
            await to_thread.run_sync(local.close)
        return
    chain = RpcChain(HttpRpc(url))
    try:
        chain_id = await chain.chain_id()
    except TesseraError as error:
        raise Unavailable(f"no EVM node answers at {url}: {error.message}") from error
    async with httpx.AsyncClient(timeout=30) as client:
        yield Ledger(chain, chain_id, _http_exchange(client, url), None, url)


async def ensure_funded(ledger: Ledger, operator: AccountKey) -> None:
    """Make sure that the operator can pay for gas. Raises `Refused` with what to do when nobody does it for him."""
    chain = ledger.chain
    if await chain.gas_price() == 0 or await chain.balance(operator.account) > OPERATOR_WEI // 10:
        return
    accounts = await chain.request("eth_accounts", [])
    if not accounts:
        raise Refused(
            f"account {operator.account} has no coins for gas on chain {ledger.chain_id}: send it some and start again",
            rule="funded",
        )
    funding = {"from": accounts[0], "to": operator.account, "value": hex(OPERATOR_WEI)}
    transaction = await chain.request("eth_sendTransaction", [funding])
    with anyio.move_on_after(FUNDING_S):
        while await chain.receipt(transaction) is None:
            await anyio.sleep(0.1)
        return
    raise Late(f"the transaction that funds {operator.account} is in no block after {FUNDING_S:.0f} s")


async def ensure_coin(ledger: Ledger, operator: AccountKey, file: Path) -> Account:
    """The test coin on this chain: the one that `file` remembers, if it is still there, else a new one."""
    known = _read_coins(file)
    address = known.get(str(ledger.chain_id))
    if address is not None and await ledger.chain.code(parse_account(address)):
        return parse_account(address)
    coin = await ledger.chain.deploy(operator, "coin")
    write_atomic(file, json.dumps({**known, str(ledger.chain_id): coin}).encode())
    return coin


async def ensure_split(ledger: Ledger, operator: AccountKey, coin: Account, bps: int, run: str, file: Path) -> Account:
    """The split of income of one run, by the name `run`: the one that `file` remembers, else a new one."""
    known, name = _read_coins(file), f"{ledger.chain_id}/{coin}/{bps}/{run}"
    address = known.get(name)
    if address is not None and await ledger.chain.code(parse_account(address)):
        return parse_account(address)
    split = await IncomeSplit.deploy(ledger.chain, operator, coin, bps)
    write_atomic(file, json.dumps({**known, name: split.address}).encode())
    return split.address


async def give_coins(ledger: Ledger, coin: Account, operator: AccountKey, account: Account, units: int) -> None:
    """Test money for a buyer, up to `units`."""
    face = Coin(ledger.chain, coin)
    missing = units - await face.balanceOf(account)
    if missing > 0:
        await face.mint(operator, account, missing)


def _read_coins(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    try:
        return {str(key): str(value) for key, value in json.loads(file.read_bytes()).items()}
    except (ValueError, AttributeError) as error:
        raise Invalid(f"{file} is damaged: restore it, or remove it to deploy a new test coin") from error


def _local_exchange(local: LocalChain) -> Callable[[bytes], Awaitable[bytes]]:
    async def exchange(body: bytes) -> bytes:
        return await to_thread.run_sync(local.handle, body, BODY_LIMIT)

    return exchange


def _http_exchange(client: httpx.AsyncClient, url: str) -> Callable[[bytes], Awaitable[bytes]]:
    async def exchange(body: bytes) -> bytes:
        try:
            reply = await client.post(url, content=body, headers={"content-type": "application/json"})
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise Unavailable(f"the chain's node does not answer: {type(error).__name__}") from error
        return reply.content

    return exchange

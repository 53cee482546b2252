"""LocalChain: blocks, reading and calling without a trace, refusing what no block may hold, time and snapshots."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from eth_account import Account as EthAccount

import tessera.chain.local as local_module
from chain_support import CHAIN_ID, NOW, WORKERS, World, key, local_world, memory_chain
from tessera.chain.engine import GAS_LIMIT, Message, Outcome
from tessera.chain.faces import Coin
from tessera.chain.local import LocalChain
from tessera.chain.transactions import Transaction, sign
from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Invalid, Missing, Refused, Unavailable
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
SENDER = key("sender")
PLAIN = Transaction(CHAIN_ID, 0, key("other").account, 0, b"", 21_000, 0, 0)


def raw(transaction: Transaction = PLAIN, signer: AccountKey = SENDER) -> bytes:
    return sign(signer, transaction)[0]


def address(person: AccountKey) -> bytes:
    return bytes.fromhex(person.account[2:])


# --- transactions -----------------------------------------------------------------------------------------------------


async def test_each_transaction_gets_its_own_block_at_once() -> None:
    chain = memory_chain()
    for nonce in range(3):
        chain.submit(raw(replace(PLAIN, nonce=nonce)))
    assert chain.head.number == 3
    assert [chain.block(n).parent for n in (1, 2, 3)] == [chain.block(n).hash for n in (0, 1, 2)]  # type: ignore[union-attr]


async def test_the_same_bytes_count_once() -> None:
    chain = memory_chain()
    chain.submit(raw())
    with pytest.raises(Conflict, match="already known"):
        chain.submit(raw())


@pytest.mark.parametrize(
    ("transaction", "error", "reason"),
    [
        (replace(PLAIN, nonce=1), Refused, "nonce too high: next nonce 0, tx nonce 1"),
        (replace(PLAIN, gas=20_999), Invalid, "intrinsic gas too low"),
        (replace(PLAIN, gas=GAS_LIMIT + 1), Invalid, "exceeds the block's"),
        (replace(PLAIN, value=1), Refused, "insufficient funds"),
        (replace(PLAIN, max_fee=1), Refused, "insufficient funds"),
        (replace(PLAIN, max_fee=0, priority_fee=1), Invalid, "priority fee"),
        (replace(PLAIN, chain_id=1), Invalid, "signed for chain 1"),
        (replace(PLAIN, data=b"\xff" * 1_000, gas=40_000), Invalid, "at least 61000 expected"),  # EIP-7623's floor
        (replace(PLAIN, to=None, data=bytes(49_153), gas=GAS_LIMIT), Invalid, "init code"),
        (replace(PLAIN, data=bytes(128 * 1024), gas=GAS_LIMIT), Invalid, "at most 131072"),
    ],
)
async def test_what_no_block_may_hold_is_refused_and_changes_nothing(
    transaction: Transaction, error: type, reason: str
) -> None:
    chain = memory_chain()
    with pytest.raises(error, match=reason):
        chain.submit(raw(transaction))
    assert chain.head.number == 0
    chain.submit(raw())


async def test_a_used_nonce_is_too_low() -> None:
    chain = memory_chain()
    chain.submit(raw())
    with pytest.raises(Refused, match="nonce too low: next nonce 1, tx nonce 0"):
        chain.submit(raw(replace(PLAIN, value=0, data=b"\1", gas=30_000)))


@pytest.mark.parametrize("kind", ["legacy", "access list", "1559"])
async def test_every_kind_of_transaction_that_wallets_make_is_taken(kind: str) -> None:
    fields = {"nonce": 0, "to": key("other").account, "value": 0, "gas": 30_000, "chainId": CHAIN_ID, "data": b""}
    slots = [{"address": key("other").account, "storageKeys": ["0x" + "01" * 32]}]
    fields |= {
        "legacy": {"gasPrice": 0},
        "access list": {"gasPrice": 0, "accessList": slots, "type": 1},
        "1559": {"maxFeePerGas": 0, "maxPriorityFeePerGas": 0, "accessList": slots, "type": 2},
    }[kind]
    chain = memory_chain()
    signed = EthAccount.sign_transaction(fields, SENDER.secret)
    taken = chain.submit(bytes(signed.raw_transaction))
    assert taken.hash == bytes(signed.hash)
    assert taken.sender == address(SENDER)
    shown = chain.request("eth_getTransactionByHash", ["0x" + taken.hash.hex()])
    assert int(shown["v"], 16) == signed.v
    assert shown["chainId"] == hex(CHAIN_ID)


async def test_a_transaction_without_a_chain_is_not_taken() -> None:
    fields = {"nonce": 0, "to": key("other").account, "value": 0, "gas": 30_000, "gasPrice": 0, "data": b""}
    signed = EthAccount.sign_transaction(fields, SENDER.secret)
    with pytest.raises(Invalid):
        memory_chain().submit(bytes(signed.raw_transaction))


@pytest.mark.parametrize("kind", [3, 4, 0x7E])
async def test_kinds_that_are_not_carried_are_named(kind: int) -> None:
    with pytest.raises(Invalid, match=f"type 0x{kind:02x}"):
        memory_chain().submit(bytes([kind]) + raw()[1:])


async def test_our_own_signing_is_eth_accounts() -> None:
    for transaction in (PLAIN, replace(PLAIN, to=None, data=b"\x60" * 300, nonce=300, value=2**70, max_fee=2**40)):
        fields = {
            "type": 2,
            "chainId": CHAIN_ID,
            "nonce": transaction.nonce,
            "to": transaction.to or b"",
            "value": transaction.value,
            "data": transaction.data,
            "gas": transaction.gas,
            "maxFeePerGas": transaction.max_fee,
            "maxPriorityFeePerGas": transaction.priority_fee,
        }
        theirs = EthAccount.sign_transaction(fields, SENDER.secret)
        assert sign(SENDER, transaction) == (bytes(theirs.raw_transaction), "0x" + bytes(theirs.hash).hex())


async def test_a_reverted_transaction_counts_and_changes_nothing_else() -> None:
    world = await local_world()
    chain, coin = world.local, world.coin
    assert chain
    transfer = bytes.fromhex("a9059cbb") + bytes(12) + address(key("other")) + (5).to_bytes(32, "big")
    taken = chain.submit(raw(replace(PLAIN, to=coin.address, data=transfer, gas=100_000)))
    receipt = chain.request("eth_getTransactionReceipt", ["0x" + taken.hash.hex()])
    assert (receipt["status"], receipt["logs"]) == ("0x0", [])
    assert chain.state().nonce(address(SENDER)) == 1
    assert await coin.balanceOf(key("other").account) == 0


async def test_threads_write_one_after_the_other() -> None:
    chain = memory_chain()
    people = [key(f"person {i}") for i in range(4)]

    def work(person: AccountKey) -> None:
        for nonce in range(10):
            chain.submit(raw(replace(PLAIN, nonce=nonce), person))
            chain.call(Message(address(person), address(SENDER), b""))

    threads = [threading.Thread(target=work, args=(person,)) for person in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chain.head.number == 40
    assert [chain.state().nonce(address(person)) for person in people] == [10] * 4
    numbers = [chain.block(n).number for n in range(41)]  # type: ignore[union-attr]
    assert numbers == list(range(41))


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_calls_and_estimates_leave_no_trace() -> None:
    world = await local_world()
    chain = world.local
    assert chain
    mint = Message(
        address(SENDER), address_of(world.coin), bytes.fromhex("40c10f19") + bytes(12) + b"\1" * 20 + b"\1" * 32
    )
    before, height, supply, outcomes = chain.state_root(), chain.head.number, await world.coin.totalSupply(), []
    for _ in range(3):
        outcomes.append((chain.call(mint), chain.estimate(mint)))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][0].ok
    assert chain.state_root() == before
    assert chain.head.number == height
    assert await world.coin.totalSupply() == supply


async def test_an_estimate_is_the_least_gas_that_succeeds(world_with_shares: World) -> None:
    """Through a nested call, where a contract may pass on only 63 of 64 parts of its gas."""
    chain = world_with_shares.local
    assert chain
    claim = Message(address(key("holder")), address_of(world_with_shares.share), bytes.fromhex("4e71d92d"))
    gas, outcome = chain.estimate(claim)
    assert outcome.ok
    assert chain.call(replace(claim, gas=gas)).ok
    assert not chain.call(replace(claim, gas=gas - 1)).ok


async def test_an_estimate_ends_when_somebody_else_is_first_meanwhile(
    world_with_shares: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What succeeds in the first run fails in every later one: a transaction of others came in between."""
    chain = world_with_shares.local
    assert chain
    claim = Message(address(key("holder")), address_of(world_with_shares.share), bytes.fromhex("4e71d92d"))
    good, runs = chain.call(claim), list[int]()
    bad = chain.call(replace(claim, gas=good.gas_needed - 1))
    assert (good.ok, bad.ok) == (True, False)

    def call(message: Message, number: int | None = None) -> Outcome:
        runs.append(message.gas)
        return good if len(runs) == 1 else bad

    monkeypatch.setattr(chain, "call", call)
    assert chain.estimate(claim) == (0, bad)
    assert len(runs) < 1_000


async def test_a_call_is_what_the_transaction_then_does(world_with_shares: World) -> None:
    chain, share = world_with_shares.local, world_with_shares.share
    assert chain
    outcome = chain.call(Message(address(key("holder")), address_of(share), bytes.fromhex("4e71d92d")))
    receipt = await share.claim(key("holder"))
    assert receipt.gas_used == outcome.gas_used
    assert int.from_bytes(outcome.output, "big") == 75


@pytest.fixture
async def world_with_shares() -> World:
    world = await local_world()
    await world.give({key("holder").account: 3, key("other").account: 1})
    await world.earn(100)
    return world


def address_of(contract: object) -> bytes:
    return bytes.fromhex(contract.address[2:])  # type: ignore[attr-defined]


async def test_a_call_cannot_spend_coins_that_are_not_there() -> None:
    chain = memory_chain()
    with pytest.raises(Refused, match="insufficient funds"):
        chain.call(Message(address(SENDER), address(WORKERS[0]), b"", value=1))
    with pytest.raises(Invalid, match="intrinsic gas too low"):
        chain.call(Message(address(SENDER), address(WORKERS[0]), b"", gas=20_000))


async def test_first_balances_can_be_given_and_moved() -> None:
    chain = LocalChain(None, chain_id=CHAIN_ID, clock=FakeClock(NOW), alloc={SENDER.account: 10**18})
    client = chain.client()
    await client.fund(SENDER, key("other").account, 10**17)
    assert await client.balance(key("other").account) == 10**17
    assert await client.balance(SENDER.account) == 9 * 10**17


async def test_old_states_stay_readable_until_they_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_module, "KEPT", 3)
    chain = memory_chain()
    coin = await Coin.deploy(chain.client(), WORKERS[0])
    await coin.mint(WORKERS[0], SENDER.account, 5)
    height = chain.head.number
    for balance in (10, 15):
        await coin.mint(WORKERS[0], SENDER.account, 5)
        assert await coin.at(height).balanceOf(SENDER.account) == 5
        assert await coin.balanceOf(SENDER.account) == balance
    await coin.mint(WORKERS[0], SENDER.account, 5)
    with pytest.raises(Refused, match="no longer kept"):
        await coin.at(height).balanceOf(SENDER.account)
    assert await coin.balanceOf(SENDER.account) == 20
    assert await coin.name() == "Test USD"
    with pytest.raises(Missing, match="the head is"):
        chain.state(99)


async def test_too_many_events_are_asked_for_in_parts() -> None:
    world = await local_world()
    assert world.local
    for i in range(5):
        await world.coin.mint(WORKERS[0], SENDER.account, i)
    with pytest.raises(Refused, match="more than 3 events"):
        world.local.logs(0, 99, None, [], 3)


# --- time, snapshots, closing -----------------------------------------------------------------------------------------


async def test_blocks_carry_the_clocks_time_and_never_go_back() -> None:
    clock = FakeClock(NOW)
    chain = LocalChain(None, chain_id=CHAIN_ID, clock=clock, dev=True)
    chain.submit(raw())
    clock.advance(100)
    chain.submit(raw(replace(PLAIN, nonce=1)))
    clock.advance(-50)
    chain.submit(raw(replace(PLAIN, nonce=2)))
    assert [chain.block(n).timestamp - NOW for n in range(4)] == [0, 0, 100, 100]  # type: ignore[union-attr]
    chain.increase_time(1_000)
    assert chain.mine().timestamp == NOW + 1_050


async def test_a_snapshot_brings_everything_back() -> None:
    world = await local_world()
    chain = world.local
    assert chain
    head, saved, events = chain.head, chain.snapshot(), await world.coin.events(Coin.Transfer)
    receipt = await world.coin.mint(WORKERS[0], SENDER.account, 5)
    assert chain.revert(saved)
    assert chain.head == head
    assert await world.coin.balanceOf(SENDER.account) == 0
    assert chain.request("eth_getTransactionReceipt", [receipt.tx_hash]) is None
    assert await world.coin.events(Coin.Transfer) == events
    assert not chain.revert(saved)
    await world.coin.mint(WORKERS[0], SENDER.account, 7)
    assert await world.coin.balanceOf(SENDER.account) == 7


async def test_a_journal_on_disk_has_no_snapshots(tmp_path: Path) -> None:
    with LocalChain(tmp_path / "chain.db", chain_id=CHAIN_ID, dev=True) as chain:
        with pytest.raises(Invalid, match="append-only"):
            chain.snapshot()


async def test_a_closed_chain_is_read_only() -> None:
    chain = memory_chain()
    chain.close()
    with pytest.raises(Unavailable, match="closed"):
        chain.submit(raw())
    assert chain.head.number == 0


@pytest.mark.parametrize("chain_id", [0, -1, 2**53])
async def test_a_chain_id_is_a_number_that_wallets_can_hold(chain_id: int) -> None:
    with pytest.raises(Invalid, match="chain id"):
        LocalChain(None, chain_id=chain_id)

"""The journal: what is on disk survives, replays, and cannot be mistaken; members find a fork or a false root."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from chain_support import CHAIN_ID, NOW, WORKERS, key, make_world
from tessera.chain.blocks import make_block
from tessera.chain.faces import Coin, Run
from tessera.chain.genesis import Genesis
from tessera.chain.journal import Entry
from tessera.chain.local import LocalChain
from tessera.chain.replay import replay, verify_journal
from tessera.chain.settle import income_table
from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Unavailable

pytestmark = pytest.mark.anyio
HOLDER = key("holder")


def opened(path: Path, **options: object) -> LocalChain:
    return LocalChain(path, chain_id=CHAIN_ID, clock=FakeClock(NOW), **options)  # type: ignore[arg-type]


_content: list[bytes] = []


@pytest.fixture
async def file(tmp_path: Path) -> Path:
    """A chain of some blocks, closed: made once, then copied."""
    path = tmp_path / "chain.db"
    if not _content:
        with opened(path) as chain:
            world = await make_world(chain.client())
            await world.give({HOLDER.account: 3})
            await world.earn(100)
        _content.append(path.read_bytes())
    path.write_bytes(_content[0])
    return path


async def test_an_opened_chain_goes_on_where_it_ended(file: Path) -> None:
    with opened(file) as first:
        head, blocks = first.head, [first.block(n) for n in range(first.head.number + 1)]
    with opened(file) as chain:
        assert chain.head == head
        assert [chain.block(n) for n in range(chain.head.number + 1)] == blocks
        (began,) = await chain.client().logs(None, [Run.Began.TOPIC], 0)
        share = Run.Began.decode(began).share
        await Coin.deploy(chain.client(), WORKERS[1])
        assert (await income_table(chain.client(), share)).revenue == 100
    with opened(file) as chain:
        assert chain.head.number == head.number + 1


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_it_has_shown(tmp_path: Path) -> None:
    """The child prints each height after its block; it is killed in full run, and the journal has them all."""
    path = tmp_path / "chain.db"
    program = f"""
        import sys
        from pathlib import Path
        from tessera.chain.local import LocalChain
        from tessera.chain.transactions import Transaction, sign
        from tessera.core.signing import AccountKey
        key = AccountKey(bytes(31) + bytes([7]))
        chain = LocalChain(Path({str(path)!r}), chain_id={CHAIN_ID})
        for nonce in range(100_000):
            chain.submit(sign(key, Transaction({CHAIN_ID}, nonce, key.account, 0, b"", 21_000, 0, 0))[0])
            print(chain.head.number, chain.head.hash.hex(), flush=True)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    shown = dict(child.stdout.readline().split() for _ in range(20))
    os.kill(child.pid, signal.SIGKILL)
    shown |= dict(line.split() for line in child.stdout.read().splitlines() if len(line.split()) == 2)
    child.stdout.close()
    child.wait(10)
    with LocalChain(path, chain_id=CHAIN_ID) as chain:
        complete = {int(n): h for n, h in shown.items() if len(h) == 64}
        assert len(complete) >= 20
        assert {n: chain.block(n).hash.hex() for n in complete} == complete  # type: ignore[union-attr]


async def test_one_process_at_a_time_has_the_chain(file: Path) -> None:
    with opened(file), pytest.raises(Conflict, match="another process"):
        opened(file)


@pytest.mark.parametrize("content", [b"not a database at all, but some text" * 40, b"\x00" * 5_000])
async def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chain.db"
    path.write_bytes(content)
    with pytest.raises(Invalid, match="damaged or no chain's journal"):
        opened(path)
    assert path.read_bytes() == content


async def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chain.db"
    with sqlite3.connect(path) as database:
        database.execute("create table photos(name)")
    database.close()
    with pytest.raises(Invalid, match="no Tessera chain"):
        opened(path)


async def test_another_chains_journal_is_refused(file: Path) -> None:
    with pytest.raises(Invalid, match="another chain's: its chain_id is 845300, expected 1"):
        LocalChain(file, chain_id=1)
    with pytest.raises(Invalid, match="alloc"):
        opened(file, alloc={HOLDER.account: 5})


async def test_a_folder_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be opened"):
        opened(tmp_path / "nowhere" / "chain.db")


DAMAGE = {
    "gas": "update blocks set gas_used = gas_used + 1 where number = 3",
    "root": "update blocks set state_root = zeroblob(32) where number = 3",
    "hash": "update blocks set hash = zeroblob(32) where number = 3",
    "time": "update blocks set timestamp = 5 where number = 3",
    "transaction": "update blocks set raw = zeroblob(100) where number = 3",
    "no transaction": "update blocks set raw = null where number = 3",
    "gap": "delete from blocks where number = 3",
    "genesis": "update blocks set timestamp = timestamp + 1 where number = 0",
    "type": "update blocks set raw = 'text' where number = 3",
    "swapped": "update blocks set raw = (select raw from blocks where number = 2) where number = 3",
    "format": "pragma user_version = 9",
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_journal_names_the_block_and_is_left_alone(file: Path, damage: str) -> None:
    with sqlite3.connect(file) as database:
        database.execute(DAMAGE[damage])
    database.close()
    names = {"gap": "block 4", "genesis": "block 0", "format": "format 9"}
    with pytest.raises(Invalid, match=names.get(damage, "block 3")):
        opened(file)
    with pytest.raises(Invalid):
        opened(file)


async def test_a_disk_that_refuses_loses_no_block_silently(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = opened(file)
    client, head = chain.client(), chain.head

    def full(entry: Entry) -> None:
        raise Unavailable("the journal cannot be written: database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(chain._journal, "append", full)
        with pytest.raises(Unavailable, match="disk is full"):
            await Coin.deploy(client, WORKERS[0])
        assert chain.head == head
    await Coin.deploy(client, WORKERS[0])
    assert chain.head.number == head.number + 1
    chain.close()


# --- members ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def entries(file: Path) -> list[Entry]:
    with opened(file) as chain:
        return chain.entries()


async def test_members_come_to_the_operators_head(entries: list[Entry]) -> None:
    head = verify_journal(entries, chain_id=CHAIN_ID, known={entries[3].number: entries[3].hash})
    assert (head.number, head.hash, head.state_root) == (entries[-1].number, entries[-1].hash, entries[-1].state_root)


async def test_members_read_the_journal_over_json_rpc(file: Path) -> None:
    with opened(file) as chain:
        client = chain.client()
        values = await client.request("tessera_journal", [0, 3]) + await client.request("tessera_journal", [3])
        assert [Entry.from_value(value) for value in values] == chain.entries()
        assert await client.request("tessera_stateRoot", []) == "0x" + chain.state_root().hex()


async def test_two_histories_are_a_fork(entries: list[Entry], tmp_path: Path) -> None:
    with opened(tmp_path / "other.db") as other:
        await Coin.deploy(other.client(), WORKERS[2])
        known = {entry.number: entry.hash for entry in other.entries()}
    with pytest.raises(Misbehaviour, match="a fork: two different blocks at height 1") as caught:
        verify_journal(entries, chain_id=CHAIN_ID, known=known)
    assert caught.value.evidence["hashes"] == ["0x" + known[1].hex(), "0x" + entries[1].hash.hex()]


async def test_blocks_that_were_shown_cannot_disappear(entries: list[Entry]) -> None:
    known = {entry.number: entry.hash for entry in entries}
    with pytest.raises(Misbehaviour, match="blocks that were shown are gone"):
        verify_journal(entries[:4], chain_id=CHAIN_ID, known=known)
    with pytest.raises(Misbehaviour, match="ends nowhere"):
        verify_journal([], chain_id=CHAIN_ID, known=known)


FALSE: dict[str, Callable[[Entry], Entry]] = {
    "root": lambda entry: replace(entry, state_root=b"\1" * 32),
    "gas": lambda entry: replace(entry, gas_used=entry.gas_used - 1),
    "time": lambda entry: replace(entry, timestamp=entry.timestamp + 1),
    "transaction": lambda entry: replace(entry, raw=None),
}


@pytest.mark.parametrize("claim", FALSE)
async def test_a_false_claim_about_a_block_is_misbehaviour(entries: list[Entry], claim: str) -> None:
    forged = [*entries[:4], FALSE[claim](entries[4]), *entries[5:]]
    with pytest.raises(Misbehaviour, match="block 4") as caught:
        verify_journal(forged, chain_id=CHAIN_ID)
    assert caught.value.evidence == forged[4].to_value()


async def test_a_root_that_the_transactions_do_not_lead_to_is_found_though_the_hash_fits(entries: list[Entry]) -> None:
    """An operator who makes up a state has to make up its hash too; only running the transaction shows it."""
    honest, _ = list(replay(entries[:5], CHAIN_ID, Genesis()))[4]
    lie = make_block(4, honest.timestamp, honest.parent, b"\1" * 32, honest.transaction, honest)
    forged = replace(entries[4], state_root=lie.state_root, hash=lie.hash)
    with pytest.raises(Misbehaviour, match="lead to state root") as caught:
        verify_journal([*entries[:4], forged], chain_id=CHAIN_ID)
    assert caught.value.evidence == forged.to_value()


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"number": -1}, {"number": True}, {"number": 1, "timestamp": 1, "gasUsed": 1, "raw": 5}, "0x"],
)
async def test_an_entry_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(Invalid):
        Entry.from_value(value)

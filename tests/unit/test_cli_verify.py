"""`tessera verify`: what a member keeps of the operator's heads, and what it makes of other members' files."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import tessera.cli.verify as verify_module
from chain_support import CHAIN_ID, NOW, WORKERS, key
from tessera.chain.faces import Coin
from tessera.chain.local import LocalChain
from tessera.cli.verify import HEADS, read_heads, run_verify
from tessera.core.clock import FakeClock
from tessera.core.errors import Invalid, Misbehaviour, Refused

pytestmark = pytest.mark.anyio


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[LocalChain]:
    """The ledgers that the operator shows, the newest last."""
    chains = [make()]

    @asynccontextmanager
    async def open_run(state_dir: Path) -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(chain=chains[-1].client())

    monkeypatch.setattr(verify_module, "open_run", open_run)
    return chains


def make() -> LocalChain:
    return LocalChain(None, chain_id=CHAIN_ID, clock=FakeClock(NOW), operator=key("operator"))


async def test_a_member_keeps_the_heads_and_compares_with_them(
    shown: list[LocalChain], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await Coin.deploy(shown[0].client(), WORKERS[0])
    for _ in range(2):
        await run_verify(tmp_path, [], True)
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [fact["compared_with"] for fact in facts] == [0, 1]
    assert (facts[1]["operator"], facts[1]["block"]) == (key("operator").account, 1)
    assert facts[1]["standard_contracts"] is True
    assert read_heads(tmp_path / HEADS) == [shown[0].signed_head()]
    await run_verify(tmp_path, [], False)
    assert "tessera verify --seen FILE" in capsys.readouterr().out
    shown.append(make())  # the operator begins again
    with pytest.raises(Misbehaviour, match="block 1 was shown"):
        await run_verify(tmp_path, [], True)


async def test_another_members_file_shows_the_fork(shown: list[LocalChain], tmp_path: Path) -> None:
    other = make()
    for chain, worker in ((shown[0], WORKERS[0]), (other, WORKERS[1])):
        await Coin.deploy(chain.client(), worker)
    friends = tmp_path / "friend.jsonl"
    friends.write_text(json.dumps(other.signed_head().to_value()) + "\n\n")
    with pytest.raises(Misbehaviour, match="two different blocks at height 1"):
        await run_verify(tmp_path, [friends], True)


@pytest.mark.parametrize("content", [b"\xff", b"{", b"[]", b"[" * 50_000, b" " * ((1 << 20) + 1)])
async def test_a_file_of_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "friend.jsonl"
    file.write_bytes(content)
    with pytest.raises(Invalid):
        read_heads(file)
    with pytest.raises(Invalid, match="cannot be read"):
        read_heads(tmp_path / "nowhere")


async def test_a_public_chain_needs_no_replay(
    shown: list[LocalChain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(shown[0].methods._table, "tessera_head")
    with pytest.raises(Refused, match="no ledger of one operator"):
        await run_verify(tmp_path, [], True)

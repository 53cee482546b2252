"""The agent is killed (kill -9) after its payment was settled on the chain and before it wrote that down."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import anyio
import httpx
import pytest

from agents_world import AGENT, ATTACKER, NOW, QUICK, SELLER, Seller, key, make_mandate, open_ledger, units
from tessera.agents.intents import Coin, intent_id
from tessera.agents.ledger import IntentLedger
from tessera.agents.mandates import asset_id
from tessera.agents.paying import Payer, Purchase
from tessera.agents.settlements import ChainSettlements, FakeSettlements
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin as CoinFace
from tessera.chain.local import LocalChain
from tessera.core.clock import FakeClock
from tessera.core.ids import Account, parse_account

CHAIN_ID = 31_337
POINTS = ("before sign", "after sign", "before send", "after settle", "before consume", "after consume")


class RealSeller(Seller):
    """Settles on the embedded chain with its own gas, as the honest seller of the tests does in memory."""

    def __init__(self, asset: str, face: CoinFace, die: str) -> None:
        super().__init__(FakeSettlements(asset, {}))
        self.face, self.die = face, die

    async def handle(self, request: httpx.Request) -> httpx.Response:
        payment = self.read(request)
        if payment is None:
            return self.offer("/data")
        kill_at("before send", self.die)
        nonce = bytes.fromhex(payment["nonce"][2:])
        if not await self.face.authorizationState(parse_account(payment["from"]), nonce):
            signature = bytes.fromhex(self.signature(request)[2:])
            await self.face.transferWithAuthorization(
                key("operator"), parse_account(payment["from"]), parse_account(payment["to"]), int(payment["value"]), 0,
                int(payment["validBefore"]), nonce, signature[64], signature[:32], signature[32:64],
            )  # fmt: skip
        kill_at("after settle", self.die)
        return httpx.Response(200, text="data")

    @staticmethod
    def signature(request: httpx.Request) -> str:
        import base64
        import json

        return str(json.loads(base64.b64decode(request.headers["payment-signature"]))["payload"]["signature"])


class MortalLedger(IntentLedger):
    die = ""

    def sign(self, *args: object) -> object:  # type: ignore[override]
        kill_at("before sign", self.die)
        result = super().sign(*args)  # type: ignore[arg-type]
        kill_at("after sign", self.die)
        return result

    def consume(self, *args: object) -> object:  # type: ignore[override]
        kill_at("before consume", self.die)
        result = super().consume(*args)  # type: ignore[arg-type]
        kill_at("after consume", self.die)
        return result


def kill_at(point: str, die: str) -> None:
    if point == die:
        os.kill(os.getpid(), signal.SIGKILL)


def open_chain(folder: Path) -> tuple[LocalChain, RpcChain]:
    local = LocalChain(folder / "chain.sqlite", chain_id=CHAIN_ID, clock=FakeClock(NOW))
    return local, local.client()


async def live(folder: Path, coin_at: Account, die: str) -> None:
    """One life of the agent: it reconciles, and buys the one thing it wants."""
    local, chain = open_chain(folder)
    face = CoinFace(chain, coin_at)
    asset = asset_id(CHAIN_ID, coin_at)
    coin = Coin(asset, await face.name(), await face.version())
    MortalLedger.die = die
    ledger = MortalLedger(folder / "books.sqlite", clock=FakeClock(NOW))
    seller = RealSeller(asset, face, die)
    payer = Payer(ledger, AGENT, coin, ChainSettlements(chain), config=QUICK, clock=FakeClock(NOW),
                  transport=httpx.MockTransport(seller.handle))  # fmt: skip
    await payer.reconcile()
    mandate = make_mandate(asset=asset)
    purchase = Purchase(intent_id("the one thing"), mandate.id, "https://seller/data", units(100, asset))
    assert (await payer.buy(purchase)).body == b"data"
    await payer.aclose()
    ledger.close()
    local.close()


async def prepare(folder: Path) -> Account:
    local, chain = open_chain(folder)
    face = await CoinFace.deploy(chain, key("operator"))
    await face.mint(key("operator"), AGENT.account, 1_000)
    open_ledger(make_mandate(asset=asset_id(CHAIN_ID, face.address)), where=folder / "books.sqlite").close()
    local.close()
    return face.address


def one_life(folder: Path, coin_at: Account, die: str) -> int | None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=anyio.run, args=(live, folder, coin_at, die))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("point", POINTS)
def test_it_pays_once_and_knows_it_after_the_restart(point: str, tmp_path: Path) -> None:
    coin_at = anyio.run(prepare, tmp_path)
    assert one_life(tmp_path, coin_at, point) == -signal.SIGKILL
    assert one_life(tmp_path, coin_at, "") == 0
    assert one_life(tmp_path, coin_at, "") == 0

    async def look() -> None:
        local, chain = open_chain(tmp_path)
        face = CoinFace(chain, coin_at)
        assert await face.balanceOf(SELLER) == 40
        assert await face.balanceOf(AGENT.account) == 960
        assert await face.balanceOf(ATTACKER.account) == 0
        local.close()

    anyio.run(look)
    ledger = IntentLedger(tmp_path / "books.sqlite", clock=FakeClock(NOW))
    assert [(entry.state, entry.note[:2]) for entry in ledger.entries()] == [("consumed", "0x")]
    ledger.close()

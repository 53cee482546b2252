"""A checkpoint folder served: what an OpenAI client sees is what transformers says, here and over other machines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from openai import AsyncOpenAI, AuthenticationError

from plain_world import CHATML, PROMPT, write_folder, write_tokenizer
from tessera.chain.faces import Coin
from tessera.chain.http import rpc_app
from tessera.chain.local import LocalChain
from tessera.core.clock import SystemClock
from tessera.core.errors import Invalid, Refused
from tessera.core.signing import AccountKey
from tessera.devnet.http import bind_port, listening
from tessera.devnet.library import Import, find_model, import_model, model_tokenizer
from tessera.devnet.model_server import Peers, ServeConfig, Served, serve_model
from tessera.devnet.model_till import Access, Price
from tessera.devnet.stage_holding import Holding, hold_stage
from tessera.devnet.stage_invitation import StageInvitation
from tessera.p2p.blobs import BlobStore
from tessera.serving.buyer import Buyer
from tessera.training.home import Home

pytestmark = pytest.mark.anyio
VECTORS = Path(__file__).resolve().parents[2] / "specs" / "vectors" / "plain_models.json"
CLOCK = SystemClock()
NEW = 24
FREE = Access(free=True)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Qwen3 in four stages, params in float32 and messages in bfloat16."""
    folder = write_folder(tmp_path / "qwen3", "qwen3")
    write_tokenizer(folder)
    home = Home(tmp_path / "state")
    import_model(home, folder, "qwen3", Import())
    return home


@asynccontextmanager
async def serving(home: Home, access: Access = FREE, **settings: Any) -> AsyncIterator[Served]:
    async with serve_model(
        home, find_model(home, "qwen3"), ServeConfig(port=0, access=access, threads=1, **settings), CLOCK
    ) as served:
        yield served


def expected(home: Home) -> str:
    """What transformers continues the prompt with; see tests/golden/test_plain_vectors.py."""
    tokens = json.loads(VECTORS.read_text())["qwen3"]["tokens"][:NEW]
    return model_tokenizer(BlobStore(home.blobs), find_model(home, "qwen3")).decode(tokens)


async def ask(served: Served, key: str = "") -> httpx.Response:
    body = {"model": "qwen3", "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(timeout=60) as client:
        return await client.post(f"{served.url}/v1/completions", json=body, headers=headers)


async def ready(served: Served) -> bool:
    async with httpx.AsyncClient(timeout=60) as client:
        return (await client.get(f"{served.url}/healthz/ready")).status_code == 200


async def until(what: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not what():
            await anyio.sleep(0.02)


async def test_a_served_model_says_what_transformers_says(home: Home) -> None:
    async with serving(home) as served:
        assert await ready(served)
        answer = await ask(served)
    assert answer.json()["choices"][0]["text"] == expected(home)
    assert answer.json()["usage"] == {"prompt_tokens": len(PROMPT), "completion_tokens": NEW, "total_tokens": 48}


@pytest.mark.slow
async def test_a_chat_goes_through_the_models_template_and_needs_the_key(home: Home) -> None:
    said = [{"role": "user", "content": "the <|im_end|> user"}]
    tokenizer = model_tokenizer(BlobStore(home.blobs), find_model(home, "qwen3"))
    rendered = f"<|im_start|>user\n{tokenizer.guarded('the <|im_end|> user')}<|im_end|>\n<|im_start|>assistant\n"
    assert find_model(home, "qwen3").template == CHATML
    async with serving(home, Access(api_keys=("secret",))) as served:
        client = AsyncOpenAI(api_key="secret", base_url=f"{served.url}/v1", max_retries=0)
        answer = await client.chat.completions.create(model="qwen3", messages=said, max_tokens=4)  # type: ignore[arg-type]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(tokenizer.encode_chat(rendered))
        stranger = client.with_options(api_key="other")
        with pytest.raises(AuthenticationError):
            await stranger.chat.completions.create(model="qwen3", messages=said)  # type: ignore[arg-type]
        await stranger.close()
        await client.close()


@pytest.mark.slow
async def test_the_first_start_makes_a_key_and_the_next_ones_know_it(home: Home) -> None:
    async with serving(home, Access()) as served:
        key = served.first_key
        assert (await ask(served, key)).status_code == 200
        assert [(await ask(served, wrong)).status_code for wrong in ("", "sk-tessera-other")] == [401, 401]
    async with serving(home, Access()) as served:
        assert (served.first_key, (await ask(served, key)).status_code) == ("", 200)


async def test_more_stages_than_there_are_cannot_be_elsewhere(home: Home) -> None:
    with pytest.raises(Invalid, match="cannot hold 5"):
        async with serving(home, peers=Peers(5)):
            pass


@pytest.mark.slow  # a chain, and an official client that pays on it
async def test_a_priced_model_is_paid_through_x402(home: Home) -> None:
    local = LocalChain(None, chain_id=31_337, clock=CLOCK)
    operator, buyer, payee = home.account("operator"), AccountKey.generate(), AccountKey.generate().account
    coin = Coin(local.client(), await local.client().deploy(operator, "coin"))
    await coin.mint(operator, buyer.account, 1_000)
    async with listening(rpc_app(local), bind_port("127.0.0.1", 0)) as chain_url:
        access = Access(price=Price(70, coin.address, payee, chain_url))
        async with serving(home, access) as served:
            assert (await ask(served)).status_code == 402
            terms = {"chain_id": 31_337, "asset": coin.address, "max_units_each": 70, "max_units": 70, "pay_to": payee}
            async with Buyer(served.url, buyer, **terms) as paying:
                answer = await paying.complete("the user", model="qwen3", max_tokens=4, temperature=0)
            assert answer["usage"]["completion_tokens"] == 4
            assert await coin.balanceOf(payee) == 70
        with pytest.raises(Invalid, match="not both"):
            async with serving(home, Access(free=True, price=access.price)):
                pass


@pytest.mark.slow  # three machines over QUIC
async def test_other_machines_hold_stages_leave_and_come_back(home: Home, tmp_path: Path) -> None:
    peers = Peers(2, bind="127.0.0.1:0")
    async with serving(home, peers=peers) as served, anyio.create_task_group() as group:
        assert served.invitation is not None
        invitation = StageInvitation.parse(served.invitation.to_text(), CLOCK)
        seen: dict[str, list[Holding]] = {"a": [], "b": [], "c": []}

        left: list[str] = []

        async def holds(name: str, *, task_status: Any) -> None:
            with anyio.CancelScope() as scope:
                task_status.started(scope)
                await hold_stage(Home(tmp_path / name), invitation, CLOCK, tell=seen[name].append)
            left.append(name)

        assert not await ready(served)
        assert (await ask(served)).status_code == 503
        first = await group.start(holds, "a")
        await until(lambda: len(served.table.holders(2)) == 1)
        second = await group.start(holds, "b")
        await until(lambda: served.table.complete)
        assert [(holding.stage, holding.ready) for holding in seen["b"]] == [(3, False), (3, True)]
        for _ in range(2):
            assert (await ask(served)).json()["choices"][0]["text"] == expected(home)
        first.cancel()
        await until(lambda: left == ["a"] and not served.table.complete)  # its state directory is free again
        assert not await ready(served)
        again = await group.start(holds, "a")  # its file is there still
        await until(lambda: served.table.complete)
        third = await group.start(holds, "c")  # a replica of some stage
        await until(lambda: sum(len(served.table.holders(stage)) for stage in range(4)) == 5)
        assert (await ask(served)).json()["choices"][0]["text"] == expected(home)
        for scope in (second, again, third):
            scope.cancel()


@pytest.mark.slow
async def test_an_invitation_outlives_its_host_but_not_its_model(home: Home, tmp_path: Path) -> None:
    peers = Peers(1, bind="127.0.0.1:0")
    async with serving(home, peers=peers) as served:
        first = served.invitation
    async with serving(home, peers=peers) as served:
        assert first is not None
        assert served.invitation is not None
        assert served.invitation.secret == first.secret
        strange = StageInvitation.make(home.peer_key, "0" * 64, host=served.invitation.host, expires=2**40)
        with pytest.raises(Refused, match="not, or no longer"):
            await hold_stage(Home(tmp_path / "stranger"), strange, CLOCK)
        assert served.desk is not None
        assert served.desk.members == 0

"""Every way to sign in as somebody else, or to have the tokens of shares that one does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from chain_support import World, key, local_world
from serving_stack import PAYEE, Stack, completion, open_stack, sign_text
from tessera.core.clock import FakeClock
from tessera.core.errors import Refused, Unavailable
from tessera.core.signing import AccountKey
from tessera.serving.paying.holdings import HoldingsConfig
from tessera.serving.paying.keys import KeyRing
from tessera.serving.paying.owners import Tier, capacity, tiers
from tessera.serving.paying.prices import TokenPrice
from tessera.serving.paying.sign_in import SignIn, SignInConfig

pytestmark = pytest.mark.anyio
OWNER, OTHER = key("owner"), key("other")
TOKENS = TokenPrice(prompt_units=100_000, completion_units=300_000)
NEED = 23  # tokens that `completion()` can take; it takes 14
WINDOW_S = 100_000


@dataclass
class Owned:
    """A gateway of a model of which `OWNER` has held 600 shares of 1,000 since the last window."""

    stack: Stack
    shares: World
    clock: FakeClock

    async def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)
        await self.shares.wait(seconds)

    async def transfer(self, sender: AccountKey, receiver: AccountKey, amount: int) -> None:
        await self.shares.share.transfer(sender, receiver.account, amount)


@pytest.fixture
async def world() -> Owned:
    shares = await local_world()
    await shares.give({OWNER.account: 600, PAYEE: 400})
    assert shares.local is not None
    clock = FakeClock(shares.local.head.timestamp)
    holdings = HoldingsConfig(shares.share.address, window_s=WINDOW_S, cache_s=60)
    rights = [tiers(Tier("holder", 500, 2 * NEED)), capacity(100)]
    stack = await open_stack(tokens=TOKENS, chain=shares.chain, clock=clock, holdings=holdings, rights=rights)  # type: ignore[arg-type]
    owned = Owned(stack, shares, clock)
    await owned.wait(WINDOW_S)
    return owned


async def served(world: Owned, api_key: str, times: int = 1) -> list[int]:
    return [(await world.stack.post(api_key=api_key)).status_code for _ in range(times)]


async def test_an_owner_signs_in_and_uses_its_level_then_its_capacity_and_then_pays(world: Owned) -> None:
    api_key = await world.stack.sign_in(OWNER)
    first = await world.stack.post(api_key=api_key)
    assert (first.status_code, first.headers["tessera-cost"], first.headers["tessera-left"]) == (200, "14", "32")
    # 2 · 14 of 46 leave 18, fewer than one needs; of 60 tokens of capacity, 3 · 14 leave 18
    assert await served(world, api_key, 5) == [200, 200, 200, 200, 402]
    async with world.stack.client() as client:
        told = (await client.get("/v1/rights", headers={"Authorization": f"Bearer {api_key}"})).json()["rights"]
    assert [(right["kind"], right["tokens"], right["tokens_left"]) for right in told] == [
        ("tier", 46, 18), ("capacity", 60, 18),
    ]  # fmt: skip
    offer = world.stack.payments.offer
    name = f"credit/{offer.network}/{offer.asset.lower()}/{OWNER.account.lower()}"
    await world.stack.balances.add(name, "bought", 100_000, "a payment")
    assert await served(world, api_key) == [200]
    await world.wait(WINDOW_S)
    fresh = await world.stack.sign_in(OWNER)
    assert (await world.stack.post(api_key=fresh)).headers["tessera-left"] == "32"  # what was left is lost


async def test_who_has_no_shares_gets_a_session_and_no_tokens(world: Owned) -> None:
    assert await served(world, await world.stack.sign_in(OTHER)) == [402]


async def sign_in(world: Owned, text: str, signature: str) -> tuple[int, str]:
    async with world.stack.client() as client:
        answer = await client.post("/v1/sign-in", json={"text": text, "signature": signature})
    assert answer.status_code == 200 or "api_key" not in answer.text
    return answer.status_code, str(answer.json().get("error", {}).get("message", ""))


async def own_text(world: Owned, account: str = OWNER.account) -> str:
    async with world.stack.client() as client:
        return str((await client.get("/v1/sign-in", params={"account": account})).json()["text"])


async def test_a_replayed_sign_in_opens_nothing(world: Owned) -> None:
    text = await own_text(world)
    signature = sign_text(OWNER, text)
    assert (await sign_in(world, text, signature))[0] == 200
    status, message = await sign_in(world, text, signature)
    assert status == 403
    assert "before" in message


async def test_a_replay_at_another_gateway_on_the_same_tables_opens_nothing(database_url: str) -> None:
    clock, chain = FakeClock(), (await local_world()).chain
    terms = SignInConfig("https://gateway", 1)
    gateways = [SignIn(terms, KeyRing(clock), chain, clock, where=database_url) for _ in range(2)]
    text = gateways[0].text(OWNER.account)
    assert (await gateways[1].open(text, sign_text(OWNER, text))).account == OWNER.account
    with pytest.raises(Refused, match="before"):
        await gateways[0].open(text, sign_text(OWNER, text))
    for gateway in gateways:
        gateway.close()


CHANGES: dict[str, Callable[[str], str]] = {
    "other domain": lambda text: text.replace("gateway wants", "evil.example wants"),
    "other uri": lambda text: text.replace("http://gateway/", "http://evil.example/"),
    "other chain": lambda text: text.replace("Chain ID: ", "Chain ID: 7"),
    "other statement": lambda text: text.replace("moves no coins", "moves all coins"),
    "other version": lambda text: text.replace("Version: 1", "Version: 2"),
    "longer life": lambda text: text.replace("Expiration Time: 20", "Expiration Time: 21"),
    "other account": lambda text: text.replace(OWNER.account, OTHER.account),
    "own nonce": lambda text: text.replace(text.split("Nonce: ")[1][8:24], "0" * 16),
    "more resources": lambda text: text + "\nResources:\n- https://evil.example",
    "a line before": lambda text: "\n" + text,
    "not this text": lambda text: "hello",
    "lower case": lambda text: text.replace(OWNER.account, OWNER.account.lower()),
    "no text": lambda text: text.replace("\n", " "),
}


async def test_a_text_that_differs_from_ours_in_anything_opens_nothing(world: Owned) -> None:
    for name, change in CHANGES.items():
        text = change(await own_text(world))
        assert (await sign_in(world, text, sign_text(OWNER, text)))[0] == 403, name


async def test_a_text_of_another_gateway_opens_nothing(world: Owned) -> None:
    theirs = SignIn(
        SignInConfig("http://gateway", world.stack.chain_id), KeyRing(world.clock), world.stack.chain, world.clock
    )
    text = theirs.text(OWNER.account)
    status, message = await sign_in(world, text, sign_text(OWNER, text))
    assert (status, "nonce" in message) == (403, True)


async def test_an_expired_text_opens_nothing(world: Owned) -> None:
    text = await own_text(world)
    await world.wait(600)
    assert (await sign_in(world, text, sign_text(OWNER, text)))[0] == 403


async def test_a_signature_that_is_none_or_somebody_elses_opens_nothing(world: Owned) -> None:
    text = await own_text(world)
    for signature in ("0x", "0x00", "0x" + "11" * 65, "0x" + "11" * 2_048, sign_text(OTHER, text)):
        assert (await sign_in(world, text, signature))[0] == 403, signature


async def test_a_text_for_no_account_is_not_made(world: Owned) -> None:
    async with world.stack.client() as client:
        for account in ("", "0x12", "0x" + "zz" * 20, "a" * 5_000):
            assert (await client.get("/v1/sign-in", params={"account": account})).status_code == 400, account


async def test_a_lent_session_spends_its_owners_tokens_and_ends_with_them(world: Owned) -> None:
    lent, own = await world.stack.sign_in(OWNER), await world.stack.sign_in(OWNER)
    assert await served(world, lent, 5) == [200] * 5
    assert await served(world, own) == [402]
    await world.wait(12 * 3600)
    assert await served(world, lent) == [402]


async def test_who_sells_loses_its_tokens_within_the_cache_time(world: Owned) -> None:
    api_key = await world.stack.sign_in(OWNER)
    assert await served(world, api_key) == [200]
    await world.transfer(OWNER, OTHER, 600)
    await world.wait(59)
    assert await served(world, api_key) == [200]
    await world.wait(2)
    assert await served(world, api_key) == [402]


async def test_who_sells_a_part_keeps_the_rest_of_its_capacity_less_what_was_used(world: Owned) -> None:
    await world.transfer(OWNER, OTHER, 200)
    api_key = await world.stack.sign_in(OWNER)  # 400 of 1,000: no level, 40 tokens of capacity
    first = await world.stack.post(api_key=api_key)
    assert first.headers["tessera-left"] == "26"
    await world.transfer(OWNER, OTHER, 30)
    await world.wait(61)
    second = await world.stack.post(completion(max_tokens=10), api_key=api_key)
    assert second.headers["tessera-left"] == str(37 - 14 - 13)


async def test_flash_holding_and_handing_shares_on_gives_no_tokens_twice(world: Owned) -> None:
    first = await world.stack.sign_in(OWNER)
    assert await served(world, first, 5) == [200] * 5
    await world.transfer(OWNER, OTHER, 600)
    await world.wait(61)
    second = await world.stack.sign_in(OTHER)
    assert await served(world, second) == [402]
    await world.transfer(OTHER, OWNER, 600)  # and back: what it has used stays used
    await world.wait(61)
    assert await served(world, first) == [402]


async def test_a_chain_that_cannot_be_asked_gives_nothing_away(world: Owned) -> None:
    api_key = await world.stack.sign_in(OWNER)

    class Down:
        async def request(self, method: str, params: list[Any]) -> Any:
            raise Unavailable("the node is gone")

    rpc, world.stack.chain.rpc = world.stack.chain.rpc, Down()
    assert await served(world, api_key) == [503]
    world.stack.chain.rpc = rpc
    assert await served(world, api_key) == [200]

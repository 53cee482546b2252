"""An operator shows two members two ledgers. Each is in order by itself; what the members exchange proves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from chain_support import CHAIN_ID, NOW, WORKERS, key
from tessera.chain.faces import Coin
from tessera.chain.heads import SignedHead, check_operator, contradiction, sign_head
from tessera.chain.local import LocalChain
from tessera.core.clock import FakeClock
from tessera.core.errors import Invalid, Misbehaviour, Missing, Refused

pytestmark = pytest.mark.anyio
OPERATOR, ATTACKER = key("operator"), key("attacker")


def ledger(operator: Any = OPERATOR) -> LocalChain:
    return LocalChain(None, chain_id=CHAIN_ID, clock=FakeClock(NOW), operator=operator, dev=True)


class Forked:
    """One operator, one past, two presents: `honest` pays the victim, `other` pays the operator's friend instead."""

    def __init__(self) -> None:
        self.honest, self.other = ledger(), ledger()
        self.coins: list[Coin] = []

    async def begin(self) -> Forked:
        for chain, payee in ((self.honest, key("victim")), (self.other, key("friend"))):
            coin = await Coin.deploy(chain.client(), WORKERS[0])
            await coin.mint(WORKERS[0], WORKERS[0].account, 100)
            await coin.transfer(WORKERS[0], payee.account, 100)  # here they part, at block 3
            self.coins.append(coin)
        return self


@pytest.fixture
async def forked() -> Forked:
    return await Forked().begin()


async def test_members_who_compare_find_the_fork_and_can_prove_it(forked: Forked) -> None:
    """Both replays succeed. The heads that the two members exchange do not go together."""
    first = await check_operator(forked.honest.client().request, CHAIN_ID)
    second = await check_operator(forked.other.client().request, CHAIN_ID)
    assert first.head.number == second.head.number == 3
    assert (first.head.hash, first.state_root) != (second.head.hash, second.state_root)
    with pytest.raises(Misbehaviour, match="has signed two different blocks at height 3") as caught:
        await check_operator(forked.honest.client().request, CHAIN_ID, seen=[second.head])
    evidence = caught.value.evidence
    heads = [SignedHead.from_value(value) for value in evidence["heads"]]
    proof = contradiction(*heads)  # whoever gets the evidence checks it alone
    assert proof is not None
    assert proof.evidence["signer"] == OPERATOR.account


async def test_the_fork_is_found_at_different_heights_too(forked: Forked) -> None:
    early = (await check_operator(forked.other.client().request, CHAIN_ID)).head
    await forked.coins[0].mint(WORKERS[0], WORKERS[0].account, 5)
    await forked.coins[0].mint(WORKERS[0], WORKERS[0].account, 6)
    with pytest.raises(Misbehaviour, match="two different blocks at height 3"):
        await check_operator(forked.honest.client().request, CHAIN_ID, seen=[early])


async def test_a_head_of_the_common_past_is_no_fork(forked: Forked) -> None:
    past = forked.other.signed_head(2)
    checked = await check_operator(forked.honest.client().request, CHAIN_ID, operator=OPERATOR.account, seen=[past])
    assert checked.head.number == 3


async def test_an_operator_that_signs_what_the_member_wants_to_see_is_caught_by_the_replay(forked: Forked) -> None:
    """It answers about old heights as the other ledger has them, but hands out this one's journal."""
    seen = forked.other.signed_head(3)
    await forked.coins[0].mint(WORKERS[0], WORKERS[0].account, 5)
    inner = forked.honest.client().request

    async def two_faced(method: str, params: list[Any]) -> Any:
        return seen.to_value() if method == "tessera_head" and params == ["0x3"] else await inner(method, params)

    with pytest.raises(Misbehaviour, match="a fork: two different blocks at height 3") as caught:
        await check_operator(two_faced, CHAIN_ID, seen=[seen])
    assert seen.to_value() in caught.value.evidence["heads"]
    assert caught.value.evidence["signer"] == OPERATOR.account


async def test_two_friends_heads_that_contradict_each_other_are_enough(forked: Forked) -> None:
    seen = [forked.honest.signed_head(3), forked.other.signed_head(3)]
    with pytest.raises(Misbehaviour, match="two different blocks at height 3"):
        await check_operator(forked.honest.client().request, CHAIN_ID, seen=seen)


async def test_blocks_that_were_shown_cannot_be_taken_back(forked: Forked) -> None:
    seen = forked.honest.signed_head()
    rolled_back = ledger()
    with pytest.raises(Misbehaviour, match="block 3 was shown, and the ledger ends at 0") as caught:
        await check_operator(rolled_back.client().request, CHAIN_ID, seen=[seen])
    assert len(caught.value.evidence["heads"]) == 2


TRICKS: dict[str, tuple[Callable[[str, list[Any], Any], Any], type[Exception], str]] = {
    "a journal that is too short": (
        lambda method, params, value: [] if method == "tessera_journal" else value, Misbehaviour, "has no block 0"),
    "a head that the journal does not lead to": (
        lambda method, params, value: sign_head(OPERATOR, CHAIN_ID, 3, b"\1" * 32).to_value()
        if method == "tessera_head" else value, Misbehaviour, "two different blocks at height 3"),
    "another genesis": (
        lambda method, params, value: {"alloc": {ATTACKER.account: "5"}, "contracts": {}}
        if method == "tessera_genesis" else value, Misbehaviour, "block 0 should hash"),
    "a genesis of nonsense": (
        lambda method, params, value: {"alloc": {"0x1": "-5"}} if method == "tessera_genesis" else value,
        Invalid, "account"),
    "entries of nonsense": (
        lambda method, params, value: [{"number": 0}] if method == "tessera_journal" else value, Invalid, "entry"),
    "a head of another chain": (
        lambda method, params, value: sign_head(OPERATOR, 1, 3, b"\1" * 32).to_value()
        if method == "tessera_head" else value, Invalid, "head of chain 1"),
    "a head that nobody signed": (
        lambda method, params, value: {**value, "signature": "0x" + "00" * 65} if method == "tessera_head" else value,
        Invalid, "signature"),
    "more entries than were asked for": (
        lambda method, params, value: value * 300 if method == "tessera_journal" else value, Misbehaviour, "no block"),
}  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
async def test_an_operator_that_answers_otherwise_is_found_or_refused(forked: Forked, trick: str) -> None:
    change, error, reason = TRICKS[trick]
    inner = forked.honest.client().request

    async def lying(method: str, params: list[Any]) -> Any:
        return change(method, params, await inner(method, params))

    with pytest.raises(error, match=reason):
        await check_operator(lying, CHAIN_ID)


async def test_a_stranger_cannot_frame_an_operator(forked: Forked) -> None:
    """A made-up head is refused, and proves nothing."""
    framed = sign_head(ATTACKER, CHAIN_ID, 3, b"\1" * 32)
    request = forked.honest.client().request
    for operator in (None, OPERATOR.account):
        with pytest.raises(Refused, match="expected chain"):
            await check_operator(request, CHAIN_ID, operator=operator, seen=[framed])
    honest = forked.honest.signed_head(3)
    assert contradiction(honest, framed) is None
    assert contradiction(honest, replace(honest, hash=b"\1" * 32)) is None  # the signature is then another account's
    assert contradiction(honest, honest) is None
    assert contradiction(honest, forked.other.signed_head(2)) is None
    with pytest.raises(Refused):
        await check_operator(request, CHAIN_ID, operator=ATTACKER.account)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"chainId": 1, "number": -1, "hash": "0x" + "11" * 32, "signature": "0x" + "11" * 65},
        {"chainId": True, "number": 1, "hash": "0x" + "11" * 32, "signature": "0x" + "11" * 65},
        {"chainId": 1, "number": 1, "hash": "0x11", "signature": "0x" + "11" * 65},
        {"chainId": 1, "number": 1, "hash": "0x" + "11" * 32, "signature": "0x11"},
        {"chainId": 1, "number": 2**70, "hash": "0x" + "11" * 32, "signature": "0x" + "11" * 65},
    ],
)
async def test_a_head_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(Invalid):
        SignedHead.from_value(value)


async def test_a_chain_without_an_operators_key_signs_nothing(forked: Forked) -> None:
    with pytest.raises(Missing, match="nobody signs heads here"):
        ledger(None).signed_head()
    with pytest.raises(Missing, match="no block 9"):
        forked.honest.signed_head(9)


async def test_long_transactions_come_in_short_pages(forked: Forked) -> None:
    client = forked.honest.client()
    for _ in range(4):
        await client.send(WORKERS[0], WORKERS[1].account, b"\x01" * 100_000)
    pages = [len(await client.request("tessera_journal", [hex(first), "0x64"])) for first in (0, 4, 5, 6, 7)]
    assert pages == [5, 1, 1, 1, 1]
    assert (await check_operator(client.request, CHAIN_ID)).head.number == 7

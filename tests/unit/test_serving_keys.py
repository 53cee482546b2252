"""API keys: made, found, limited, ended; never kept in the open."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.core.clock import FakeClock
from tessera.core.errors import Invalid, Missing
from tessera.serving.paying.allowances import DAY_S, OperatorAllowance, UsedUp
from tessera.serving.paying.balances import Balances
from tessera.serving.paying.charging import API_KEY_HEADER, PaidRequest, Usage
from tessera.serving.paying.keys import MAX_PER_OWNER, ApiKeys, KeyRing, bearer

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def test_a_key_is_found_by_its_secret_alone_and_not_kept_in_the_open(tmp_path: Path, clock: FakeClock) -> None:
    file = tmp_path / "keys.sqlite"
    ring = KeyRing(clock, where=file)
    secret = await ring.issue("operator", "laptop", tokens_per_day=500)
    found = await ring.find(secret)
    assert found is not None
    assert (found.kind, found.owner, found.tokens_per_day) == ("operator", "laptop", 500)
    for other in ("", "sk-tessera-", secret[:-1], secret + "x", secret.upper(), found.id, "sk-\ud800"):
        assert await ring.find(other) is None
    ring.close()
    kept = file.read_bytes()
    assert found.id.encode() in kept
    assert secret.encode() not in kept
    assert secret.removeprefix("sk-tessera-").encode() not in kept


async def test_a_revoked_or_ended_key_is_no_key_at_any_gateway(database_url: str, clock: FakeClock) -> None:
    here, there = KeyRing(clock, where=database_url), KeyRing(clock, where=database_url)
    revoked, ends = await here.issue("operator", "a"), await here.issue("session", "b", until=clock.time() + 10)
    assert await there.find(revoked) is not None
    assert await there.find(ends) is not None
    first = (await there.list("operator"))[0]
    assert (await there.revoke(first.id)).revoked == clock.time()
    with pytest.raises(Missing):
        await here.revoke(first.id)
    assert await here.find(revoked) is None
    clock.advance(10)
    assert await here.find(ends) is None
    here.close()
    there.close()


async def test_an_owner_has_a_bounded_number_of_keys_and_the_operator_as_many_as_it_makes(clock: FakeClock) -> None:
    ring = KeyRing(clock)
    bought = []
    for _ in range(MAX_PER_OWNER + 2):
        bought.append(await ring.issue("credit", "0xa"))
        await ring.issue("operator", "laptop")
        clock.advance(1)
    good = [secret for secret in bought if await ring.find(secret) is not None]
    assert good == bought[2:]
    assert len(await ring.list("operator")) == MAX_PER_OWNER + 2


@pytest.mark.parametrize(("owner", "limit"), [("", 0), ("x" * 81, 0), ("a\nb", 0), ("a", -1), ("a", 2**53)])
async def test_a_key_that_makes_no_sense_is_not_made(clock: FakeClock, owner: str, limit: int) -> None:
    with pytest.raises(Invalid):
        await KeyRing(clock).issue("operator", owner, tokens_per_day=limit)


def asking(secret: str, prompt: int = 10, most: int = 40) -> PaidRequest:
    return PaidRequest("", b"", {API_KEY_HEADER: f"Bearer {secret}"}, "m", prompt, most)


async def test_a_days_tokens_are_used_up_and_come_again_the_next_day(clock: FakeClock) -> None:
    ring, balances = KeyRing(clock), Balances(clock)
    ways = ApiKeys(ring, {"operator": [OperatorAllowance(balances, clock)]})
    secret = await ring.issue("operator", "laptop", tokens_per_day=80)
    first = await ways.hold(asking(secret))
    assert first is not None
    with pytest.raises(UsedUp, match="30 of 80"):
        await ways.hold(asking(secret))
    told = await first.finish(Usage(10, 15))
    assert told == {"Tessera-Cost": "25", "Tessera-Unit": "tokens", "Tessera-Left": "55"}
    await first.release()
    broken = await ways.hold(asking(secret))
    assert broken is not None
    broken.owe()
    await broken.release()
    await broken.release()
    again = await ways.hold(asking(secret, most=45))
    assert again is not None
    with pytest.raises(UsedUp) as caught:
        await ways.hold(asking(secret, 1, 0))
    assert 0 < caught.value.retry_after_s <= DAY_S
    clock.advance(DAY_S)
    assert await ways.hold(asking(secret)) is not None


async def test_a_key_without_a_limit_is_served_and_a_strange_one_is_no_key(clock: FakeClock) -> None:
    ring = KeyRing(clock)
    ways = ApiKeys(ring, {"operator": [OperatorAllowance(Balances(clock), clock)]})
    hold = await ways.hold(asking(await ring.issue("operator", "laptop"), most=10**9))
    assert hold is not None
    assert hold.caller.startswith("key ")
    assert await ways.hold(asking("sk-tessera-strange")) is None
    assert await ways.hold(asking(await ring.issue("credit", "0xa"))) is None
    assert await ways.hold(PaidRequest("", b"")) is None


@pytest.mark.parametrize(
    ("header", "found"), [("Bearer a", "a"), ("bearer  a ", "a"), ("Basic a", ""), ("a", ""), ("", ""), ("Bearer", "")]
)
def test_a_key_is_read_from_the_bearer_scheme_only(header: str, found: str) -> None:
    assert bearer({API_KEY_HEADER: header}) == found

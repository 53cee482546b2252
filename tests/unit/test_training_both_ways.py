"""Reading and writing at the same time: the first failure ends both."""

from __future__ import annotations

from typing import NoReturn

import anyio
import pytest

from tessera.core.errors import Late, Misbehaviour, Unavailable
from tessera.training.both_ways import both_ways

pytestmark = pytest.mark.anyio


async def for_ever() -> NoReturn:
    await anyio.sleep_forever()
    raise AssertionError


async def late() -> NoReturn:
    raise Late("not taken")


async def misbehaves() -> NoReturn:
    raise Misbehaviour("no frame", evidence={})


async def test_either_failure_ends_both() -> None:
    with anyio.fail_after(5):
        assert isinstance(await both_ways(for_ever, late), Late)
        assert isinstance(await both_ways(misbehaves, for_ever), Misbehaviour)


async def test_of_two_failures_at_once_misbehaviour_counts() -> None:
    assert isinstance(await both_ways(late, misbehaves), Misbehaviour)
    assert isinstance(await both_ways(misbehaves, late), Misbehaviour)


async def test_a_failure_that_is_none_of_ours_comes_out() -> None:
    async def breaks() -> NoReturn:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        await both_ways(breaks, for_ever)
    assert caught.group_contains(ZeroDivisionError)


async def test_whoever_is_cancelled_from_outside_gives_no_reason() -> None:
    with anyio.move_on_after(0.01) as scope:
        raise Unavailable(str(await both_ways(for_ever, for_ever)))
    assert scope.cancelled_caught

"""A process behind a worker that dies or falls silent: an error on every side, in time, and no hang."""

import signal
import time

import anyio
import pytest
import torch.distributed as dist

from rank_world import two_ranks
from tessera.models import parallel_link
from tessera.models.parallel import LeadEngine
from tessera.models.parallel_link import RankLink, RankLost
from tessera.models.presets import tiny_spec
from tessera.models.trainer import StageTrainer

pytestmark = pytest.mark.slow  # each starts a process that imports torch


@pytest.fixture(autouse=True)
def quick_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_link, "BEAT_S", 0.2)


def shared(link: RankLink) -> StageTrainer:
    return StageTrainer(tiny_spec(2), 0, steps=3, engine=LeadEngine(link, tiny_spec(2), 0, 3, False))


def until_lost(trainer: StageTrainer) -> None:
    """A first message to a process that died may still go into the socket."""
    for _ in range(50):
        trainer.reset_step()


def test_a_dead_follower_is_an_error_for_rank_0() -> None:
    with two_ranks() as (link, follower):
        trainer = shared(link)
        follower.kill()
        follower.wait(10)
        with pytest.raises(RankLost, match="out of step"):
            until_lost(trainer)
        with pytest.raises(RankLost):  # and stays one
            trainer.save()


def test_a_dead_follower_is_noticed_while_nothing_is_asked() -> None:
    async def watch(link: RankLink) -> None:
        with anyio.fail_after(10):
            await link.watch()

    with two_ranks() as (link, follower):
        follower.kill()
        with pytest.raises(RankLost):
            anyio.run(watch, link)


def test_a_follower_that_hangs_is_an_error_after_the_timeout() -> None:
    with two_ranks(timeout_s=3) as (link, follower):
        trainer = shared(link)
        follower.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(RankLost, match=r"[Tt]imed out"):
            until_lost(trainer)
        assert time.monotonic() - started < 15


def test_a_follower_ends_with_an_error_when_rank_0_is_gone() -> None:
    with two_ranks() as (link, follower):
        link._over.set()
        link._beat.join()
        dist.destroy_process_group()
        assert follower.wait(20) != 0
        assert follower.stderr is not None
        assert "RankLost: rank 0 is gone" in follower.stderr.read()


def test_followers_stop_without_an_error_when_the_work_is_done() -> None:
    with two_ranks() as (link, follower):
        shared(link)
        link.__exit__()
        assert follower.wait(20) == 0

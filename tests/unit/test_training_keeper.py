"""Keepers: shares for what receipts prove, by more than two thirds, whoever is away or lies."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from tessera.chain.client import RpcChain
from tessera.chain.types import Receipt as Transaction
from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused
from tessera.core.ids import Account
from tessera.core.signing import AccountKey, PeerKey
from tessera.p2p.calls import call
from tessera.p2p.memory import run_virtual
from tessera.training.accusations import MOST, Accusations
from tessera.training.audit import AuditConfig, Outcome, Verdict, draw
from tessera.training.epochs import EpochLeaves, compute_epoch
from tessera.training.keeper import known_leaves
from tessera.training.protocols import EPOCH
from tessera.training.receipts import Receipt
from training_run import STRANGER, Settlement, settle_all, settlement
from training_world import CREATOR, DATA_OWNER, account_keys, all_receipts, peer_keys, small_manifest, work_of

MANIFEST = small_manifest(steps=6, epoch_steps=3)
ACCOUNTS = [key.account for key in account_keys()]
FULL = MANIFEST.schedule.microbatches  # of a step


def leaves_of(epoch: int, microbatches: list[int] | None = None) -> EpochLeaves:
    return compute_epoch(MANIFEST, epoch, work_of(ACCOUNTS, microbatches or [3 * FULL] * 4))


def body_of(receipts: list[Receipt]) -> bytes:
    return encoding.encode({"receipts": [receipt.to_row() for receipt in receipts], "verdicts": []})


async def redeemed(world: Settlement) -> list[int]:
    return [await world.share.balanceOf(account) for account in ACCOUNTS]


def test_every_epoch_is_posted_and_redeemed(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world:
            await settle_all(world.settlers)
            assert await world.share.epoch_count() == 2
            expected = [leaves_of(0), leaves_of(1)]
            assert [(await world.share.epochs(e)).root for e in range(2)] == [leaves.root for leaves in expected]
            assert await redeemed(world) == [sum(e.shares_of(a) for e in expected) for a in ACCOUNTS]
            assert await world.share.totalSupply() == sum(e.total for e in expected)
            waiting = [(await world.share.epochs(e)).unredeemed for e in range(2)]
            assert waiting == [e.shares_of(DATA_OWNER) + e.shares_of(CREATOR) for e in expected]

    run_virtual(main)


def test_an_epoch_waits_until_its_last_step_is_done(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world, anyio.create_task_group() as tasks:
            for settler in world.settlers:
                settler.steps_done = 5
            tasks.start_soon(settle_all, world.settlers)
            await anyio.sleep(600)
            assert await world.share.epoch_count() == 1
            for settler in world.settlers:
                settler.steps_done = 6
            await anyio.sleep(10)
            assert await world.share.epoch_count() == 2

    run_virtual(main)


@pytest.mark.slow
def test_three_of_four_settle_and_the_fourth_redeems_when_it_is_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world, anyio.create_task_group() as tasks:
            absent, *present = world.settlers  # stage 0, whose turn epoch 0 is
            tasks.start_soon(settle_all, present)
            await anyio.sleep(120)
            assert await world.share.epoch_count() == 2
            assert (await redeemed(world))[0] == 0
            assert absent.book.epoch(0) is None
            await absent.settle()
            assert (await redeemed(world))[0] == leaves_of(0).shares_of(ACCOUNTS[0]) + leaves_of(1).shares_of(
                ACCOUNTS[0]
            )

    run_virtual(main)


@pytest.mark.slow
def test_half_of_the_workers_cannot_settle(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world, anyio.create_task_group() as tasks:
            tasks.start_soon(settle_all, world.settlers[:2])
            await anyio.sleep(90)
            assert await world.share.epoch_count() == 0
            tasks.start_soon(world.settlers[2].settle)
            await anyio.sleep(120)
            assert await world.share.epoch_count() == 2

    run_virtual(main)


def test_a_worker_that_lost_its_receipts_is_paid_from_its_neighbours_copies(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, held=lambda stage, receipt: stage != 1) as world:
            await settle_all(world.settlers)
            assert (await redeemed(world))[1] == 2 * leaves_of(0).shares_of(ACCOUNTS[1])

    run_virtual(main)


@pytest.mark.slow
def test_receipts_that_nobody_holds_are_not_paid_and_stop_nobody(tmp_path: Path) -> None:
    peers = [key.id for key in peer_keys()]

    def held(stage: int, receipt: Receipt) -> bool:
        return (receipt.step, receipt.worker) != (1, peers[1])

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, held=held) as world:
            await settle_all(world.settlers)
            assert (await world.share.epochs(0)).root == leaves_of(0, [3 * FULL, 2 * FULL, 3 * FULL, 3 * FULL]).root
            assert (await world.share.epochs(1)).root == leaves_of(1).root

    run_virtual(main)


def test_two_receipts_for_one_step_pay_once(tmp_path: Path) -> None:
    """A step that was trained again after a fault is signed again, with other bytes perhaps."""

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, held=lambda stage, receipt: stage != 2) as world:
            keys = {key.id: key for key in peer_keys()}
            again = [
                replace(receipt, digest=b"\7" * 32).signed_by(keys[receipt.signer])
                for receipt in all_receipts(MANIFEST, peer_keys(), range(2))
            ]
            world.settlers[2].book.add(again)
            await settle_all(world.settlers)
            assert (await world.share.epochs(0)).root == leaves_of(0).root

    run_virtual(main)


def test_two_who_collude_cannot_crowd_out_what_others_hold(tmp_path: Path) -> None:
    """Stages 0 and 1 sign for each other over and over, for other sets each time."""
    keys = peer_keys()

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world:
            honest = all_receipts(MANIFEST, keys, range(1))
            few = [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)]
            for receipt in honest:
                if receipt.worker in (keys[0].id, keys[1].id) and receipt.signer in (keys[0].id, keys[1].id):
                    signer = next(key for key in keys if key.id == receipt.signer)
                    world.settlers[0].book.add(replace(receipt, microbatches=s).signed_by(signer) for s in few)
            await settle_all(world.settlers)
            assert (await world.share.epochs(0)).root == leaves_of(0).root

    run_virtual(main)


class SlowChain(RpcChain):
    """Half a minute late with everything that it sends."""

    async def send(self, key: AccountKey, to: Account | None, data: bytes, *, value: int = 0) -> Transaction:
        await anyio.sleep(30)
        return await super().send(key, to, data, value=value)


@pytest.mark.slow
def test_an_epoch_that_somebody_else_posted_is_taken_over(tmp_path: Path) -> None:
    def chain_of(stage: int, chain: RpcChain) -> RpcChain:
        return SlowChain(chain.rpc) if stage == 0 else chain

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, chain_of=chain_of) as world:
            await settle_all(world.settlers)
            assert await world.share.epoch_count() == 2
            assert await redeemed(world) == [2 * leaves_of(0).shares_of(account) for account in ACCOUNTS]

    run_virtual(main)


@pytest.mark.slow
def test_a_chain_that_is_away_delays_and_loses_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world, anyio.create_task_group() as tasks:
            world.ledger.away = True
            tasks.start_soon(settle_all, world.settlers)
            await anyio.sleep(300)
            world.ledger.away = False
            await anyio.sleep(60)
            assert sum(await redeemed(world)) == sum(2 * leaves_of(0).shares_of(account) for account in ACCOUNTS)

    run_virtual(main)


# --- audits -----------------------------------------------------------------------------------------------------------

ACCUSED, AUDITOR = peer_keys()[0], peer_keys(5)[4]  # both of stage 0


def verdict(
    step: int = 1,
    index: int | None = 2,
    *,
    by: PeerKey = AUDITOR,
    about: PeerKey = ACCUSED,
    outcome: Outcome = "failed",
) -> Verdict:
    lot = draw(by, MANIFEST.run_id, step, about.id, index)
    return Verdict(lot, outcome, "code: 8.2 steps from the replay", bytes(32)).signed_by(by)


async def propose(world: Settlement, verdicts: list[Verdict], leaves: EpochLeaves) -> None:
    """Stage 1 asks the auditor for his signature."""
    rows = {"receipts": [r.to_row() for r in honest()], "verdicts": [v.to_row() for v in verdicts]}
    world.settlers[4].keeper.serve()
    await world.ask(1, 4, {"op": "vote", "epoch": 0, "attempt": 0, "root": leaves.root.hex()}, encoding.encode(rows))


def test_who_failed_an_audit_loses_the_epoch_and_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, companions=1) as world:
            world.settlers[4].book.add_verdicts([verdict(), verdict(4, about=AUDITOR, by=ACCUSED, outcome="passed")])
            await settle_all(world.settlers)
            expected = [leaves_of(0, [0, 3 * FULL, 3 * FULL, 3 * FULL]), leaves_of(1)]
            assert [(await world.share.epochs(e)).root for e in range(2)] == [leaves.root for leaves in expected]

    run_virtual(main)


def test_a_voter_computes_with_the_verdicts_that_he_holds(tmp_path: Path) -> None:
    less = leaves_of(0, [0, 3 * FULL, 3 * FULL, 3 * FULL])

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, companions=1) as world:
            world.settlers[4].book.add_verdicts([verdict()])
            with pytest.raises(Conflict, match="leaves out 0 receipts and 1 verdicts"):
                await propose(world, [], leaves_of(0))
            with pytest.raises(Misbehaviour, match="give root"):
                await propose(world, [verdict()], leaves_of(0))
            await propose(world, [verdict()], less)

    run_virtual(main)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (replace(verdict(), outcome="withheld"), "forged"),
        (verdict(by=peer_keys()[1]), "does not share the worker's stage"),
        (verdict(about=STRANGER), "does not share the worker's stage"),
        (verdict(outcome="passed"), "accuses nobody"),
        (verdict(4), "another epoch"),
        (verdict(index=FULL), "do not exist"),
    ],
)
def test_a_verdict_that_counts_for_nothing_gets_no_vote(wrong: Verdict, why: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, companions=1) as world:
            with pytest.raises(Misbehaviour, match=why):
                await propose(world, [wrong], leaves_of(0))

    run_virtual(main)


def test_an_auditor_fills_four_places_about_one_worker() -> None:
    many = [verdict(step, index) for step in range(2) for index in (None, 0, 1, 2)]
    known = Accusations(many[:MOST])
    assert known.add(many) == []
    assert known.add([verdict(by=ACCUSED, about=AUDITOR)]) != []
    assert len(known.verdicts) == MOST + 1


def test_work_that_nobody_could_audit_is_not_paid_unless_audits_are_waived(tmp_path: Path) -> None:
    strict = MANIFEST.model_copy(update={"replicas": 2, "audit": AuditConfig(waived=False)})

    async def main() -> None:
        async with settlement(strict, tmp_path, companions=1) as world:
            await settle_all(world.settlers)
            assert [share > 0 for share in await redeemed(world)] == [True, False, False, False]

    run_virtual(main)


# --- votes and answers ------------------------------------------------------------------------------------------------


async def vote(world: Settlement, receipts: list[Receipt], *, epoch: int = 0, root: str = "") -> dict[str, Any]:
    """Stage 0 asks stage 1 for its signature."""
    request = {"op": "vote", "epoch": epoch, "attempt": 0, "root": root or leaves_of(epoch).root.hex()}
    world.settlers[1].keeper.serve()
    return (await world.ask(0, 1, request, body_of(receipts)))[0]


def honest(epoch: int = 0) -> list[Receipt]:
    return all_receipts(MANIFEST, peer_keys(), MANIFEST.schedule.epoch_range(epoch))


def test_a_voter_signs_what_it_computes_itself(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world:
            reply = await vote(world, honest())
            digest = await world.run.epoch_digest(0, 0, leaves_of(0).root, leaves_of(0).total)
            assert bytes.fromhex(reply["signature"]) == account_keys()[1].sign_digest(digest)

    run_virtual(main)


def test_a_lying_proposer_gets_no_vote(tmp_path: Path) -> None:
    keys = peer_keys()
    left_out = [r for r in honest() if not (r.worker == keys[1].id and r.step == 1)]
    of_a_neighbour = [r for r in honest() if not (r.worker == keys[2].id and r.step == 1)]
    stranger = [replace(honest()[0], worker=STRANGER.id).signed_by(keys[1])]
    no_neighbour = [replace(honest()[0], worker=keys[0].id).signed_by(keys[2])]
    richer = leaves_of(0, [9 * FULL, 3 * FULL, 3 * FULL, 3 * FULL])

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world:
            with pytest.raises(Conflict, match="leaves out 2 receipts"):
                await vote(world, left_out)
            with pytest.raises(Conflict, match="leaves out 1 receipts"):
                await vote(world, of_a_neighbour)
            with pytest.raises(Misbehaviour, match="these receipts and verdicts give root"):
                await vote(world, honest(), root=richer.root.hex())
            with pytest.raises(Misbehaviour, match="another run's worker"):
                await vote(world, honest() + stranger)
            with pytest.raises(Misbehaviour, match="signer is no neighbour"):
                await vote(world, honest() + no_neighbour)
            with pytest.raises(Misbehaviour, match="another epoch"):
                await vote(world, honest() + honest(1))
            with pytest.raises(Invalid):
                await vote(world, honest(), epoch=2, root="00")
            with pytest.raises(Invalid, match="holds receipts and verdicts"):
                await world.ask(0, 1, {"op": "vote", "epoch": 0, "attempt": 0, "root": ""}, b"{}")
            assert world.settlers[1].book.epoch(0) is None

    run_virtual(main)


def test_no_vote_for_an_epoch_that_is_not_finished_or_is_settled(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world:
            world.settlers[1].steps_done = 2
            with pytest.raises(Conflict, match="not finished here: 2 steps are done"):
                await vote(world, honest())
            world.settlers[1].steps_done = 6
            await settle_all(world.settlers)
            with pytest.raises(Conflict, match="epoch 0 is settled"):
                await vote(world, honest())

    run_virtual(main)


def test_strangers_may_read_leaves_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world, world.network.start(STRANGER) as stranger:
            await settle_all(world.settlers)
            leaves = await known_leaves(stranger, world.roster, world.share, 1)
            assert leaves == leaves_of(1)
            record = world.roster.seats[2].record
            for op in ("receipts", "vote", "anything"):
                with pytest.raises(Refused):
                    await call(stranger, record, EPOCH, {"op": op, "epoch": 0}, timeout_s=5, reply_limit=1 << 20)
            with pytest.raises(Invalid, match="unknown operation"):
                await world.ask(0, 2, {"op": "anything", "epoch": 0})

    run_virtual(main)


def test_leaves_that_do_not_hash_to_the_root_are_not_believed(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world, world.network.start(STRANGER) as stranger:
            await settle_all(world.settlers)
            for settler in world.settlers:
                settler.book.save_epoch(0, leaves_of(0, [1, 1, 1, 10**9]).to_text())
            with pytest.raises(Missing, match="no worker can show the leaves of epoch 0"):
                await known_leaves(stranger, world.roster, world.share, 0)

    run_virtual(main)

"""Two workers at each stage who audit each other, in virtual time: who skips a layer owns nothing of the epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest

from tessera.chain.faces import ModelShare
from tessera.models.presets import tiny_spec
from tessera.p2p.memory import run_virtual
from tessera.training.audit import AuditConfig, Verdict
from tessera.training.auditing import Auditing
from tessera.training.book import ReceiptBook
from tessera.training.home import Home
from tessera.training.manifest import Manifest, Schedule
from tessera.training.seating import Seating
from training_whole import WholeRun, write_data

STEPS, EPOCHS = 8, 2
WINDOW = 64  # steps: virtual ones are over before an audit is
CHEAT = 2  # by number; who sits where is drawn


@dataclass
class Ended:
    """What a run leaves behind, by number of worker."""

    shares: list[int] = field(default_factory=list)
    books: list[list[Verdict]] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)

    @property
    def verdicts(self) -> list[Verdict]:
        return [verdict for book in self.books for verdict in book]


def manifest_in(folder: Path) -> Manifest:
    schedule = Schedule(
        steps=STEPS, microbatches=4, sequences=2, length=16, evaluate_every=8, evaluate_batches=2,
        epoch_steps=STEPS // EPOCHS,
    )  # fmt: skip
    audit = AuditConfig(rate_bps=10_000, update_bps=10_000, window_steps=WINDOW)
    changes = {"model": tiny_spec(2), "replicas": 2, "schedule": schedule, "audit": audit}
    return write_data(folder).model_copy(update=changes)


async def train(folder: Path) -> Ended:
    run, ended = WholeRun(manifest_in(folder), folder), Ended()
    async with run.open():
        run.workers.sort(key=lambda life: life.number)
        share = ModelShare(run.ledger.chain, run.roster.share)
        with anyio.fail_after(1200):
            while await share.epoch_count() < EPOCHS:
                await anyio.sleep(1)
        await anyio.sleep(30)  # everybody redeems
        ended.shares = [await share.balanceOf(worker.home.account_key.account) for worker in run.workers]
        ended.peers = [worker.home.peer_key.id for worker in run.workers]
    for worker in run.workers:
        book = ReceiptBook(worker.home.run_folder(run.manifest.run_id) / "book.sqlite")
        ended.books.append(book.verdicts(run.manifest.run_id, range(STEPS)))
        book.close()
    return ended


@pytest.mark.slow
def test_honest_workers_pass_every_audit(tmp_path: Path) -> None:
    ended = run_virtual(lambda: train(tmp_path))
    assert all(share > 0 for share in ended.shares)
    assert {verdict.outcome for verdict in ended.verdicts} == {"passed"}
    assert {verdict.draw.worker for verdict in ended.verdicts} == set(ended.peers)
    assert len({verdict.draw.step for verdict in ended.verdicts}) == STEPS
    assert any(verdict.draw.index is None for verdict in ended.verdicts)


@pytest.mark.slow
def test_who_skips_a_layer_gets_no_shares_and_his_auditor_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Seating._build_trainer

    def build_lazy(seating: Seating, manifest: Manifest, stage: int) -> Any:
        trainer = build(seating, manifest, stage)
        if seating._home.path.name == f"worker-{CHEAT}":
            layer = next(iter(trainer.stage.layers.values()))
            layer.register_forward_hook(lambda _, entered, left: entered[0])
        return trainer

    monkeypatch.setattr(Seating, "_build_trainer", build_lazy)
    ended = run_virtual(lambda: train(tmp_path))
    assert [share > 0 for share in ended.shares] == [number != CHEAT for number in range(4)]
    for book in ended.books:  # those of the other stage have heard of it
        accused = {(v.draw.worker, v.outcome) for v in book if v.outcome != "passed"}
        assert accused == {(ended.peers[CHEAT], "failed")}


@pytest.mark.slow
def test_who_shows_his_auditor_nothing_gets_no_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Auditing.serve

    def serve_unless_hiding(auditing: Auditing) -> None:
        if auditing._key.id != Home(tmp_path / f"worker-{CHEAT}").peer_key.id:
            serve(auditing)

    monkeypatch.setattr(Auditing, "serve", serve_unless_hiding)
    ended = run_virtual(lambda: train(tmp_path))
    assert [share > 0 for share in ended.shares] == [number != CHEAT for number in range(4)]
    accused = {(v.draw.worker, v.outcome) for v in ended.verdicts if v.outcome != "passed"}
    assert accused == {(ended.peers[CHEAT], "withheld")}

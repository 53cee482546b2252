"""From an economy's state to what people see of it: a `Snapshot` for page and terminal, and the closing JSON object."""

from __future__ import annotations

import time
from typing import Any

from tessera.core.errors import Conflict
from tessera.core.ids import PeerId
from tessera.devnet.board import SILENT_S
from tessera.devnet.economy import Economy
from tessera.devnet.run import Run
from tessera.devnet.snapshot import (
    Boundary,
    Epoch,
    Event,
    Income,
    LossPoint,
    Model,
    Owner,
    Peer,
    Snapshot,
    Status,
    Urls,
    thinned,
)
from tessera.training.manifest import SHARE_FLOPS, SHARE_WAD
from tessera.training.roster import Seat

__all__ = ["closing_object", "take_snapshot"]


def take_snapshot(economy: Economy) -> Snapshot:
    """The economy as it stands now. Cheap: nothing is asked of the chain here."""
    run = economy.run
    if run is None:
        return Snapshot(phase=economy.phase, phase_note=economy.note, urls=Urls(**economy.urls))
    prompt, answer = sample(run)
    manifest, board, spec = run.manifest, run.board, run.manifest.model
    return Snapshot(
        run_id=manifest.run_id,
        chain_id=manifest.chain_id,
        phase=economy.phase,
        phase_note=economy.note,
        model=Model(
            params=run.params,
            stages=spec.stages,
            vocab=spec.model.vocab_size,
            width=spec.model.width,
            codec=f"{spec.codec.kind} {spec.codec.wire}",
            name=manifest.name,
        ),
        step=board.step,
        steps=manifest.schedule.steps,
        tokens=board.step * manifest.tokens_per_step,
        tokens_per_s=board.tokens_per_s if economy.phase == "training" else None,
        losses=_losses(run),
        unigram_loss=run.text.unigram_loss,
        bigram_loss=run.text.bigram_loss,
        wire_bytes_per_token=board.wire_bytes_per_token or None,
        dense_bytes_per_token=float(spec.dense_bytes_per_token()),
        boundaries=[
            Boundary(stage, count / tokens if tokens else None, count)
            for stage, (count, tokens) in sorted(board.wire().items())
        ],
        peers=_peers(run),
        owners=_owners(run),
        epochs=_epochs(run),
        income=_income(run),
        payments=run.figures.payments,
        sample=answer,
        sample_prompt=prompt,
        events=[Event(when, text) for when, text in board.events],
        urls=Urls(**economy.urls),
        total_shares=run.figures.total_shares,
    )


def closing_object(economy: Economy) -> dict[str, Any]:
    """What `tessera up --once --json` prints; money and shares as integers, all of them read from the chain."""
    run = economy.run
    if run is None:
        raise Conflict("the economy has not opened its run yet")
    snapshot, income, validations = take_snapshot(economy), run.figures.income, run.board.points("validation")
    return {
        "run_id": snapshot.run_id,
        "chain_id": snapshot.chain_id,
        "stages": snapshot.model.stages,
        "steps": snapshot.step,
        "tokens": snapshot.tokens,
        "val_loss_first": validations[0][1] if validations else None,
        "val_loss_last": validations[-1][1] if validations else None,
        "unigram_loss": snapshot.unigram_loss,
        "bigram_loss": snapshot.bigram_loss,
        "wire_bytes_per_token": snapshot.wire_bytes_per_token,
        "dense_bytes_per_token": snapshot.dense_bytes_per_token,
        "workers": [
            {
                "peer": peer.peer,
                "account": peer.account,
                "stage": peer.stage,
                "verified_tokens": peer.verified_tokens,
                "shares": peer.shares,
                "claimed": peer.claimed,
            }
            for peer in snapshot.peers
        ],
        "owners": [
            {"account": owner.account, "role": owner.role, "shares": owner.shares, "claimed": owner.claimed}
            for owner in snapshot.owners
        ],
        "total_shares": snapshot.total_shares,
        "requests_paid": run.figures.requests_paid,
        "revenue": income.revenue,
        "unclaimed": income.unclaimed,
        "undistributed": income.undistributed,
        "dust": income.dust,
        "sample": snapshot.sample_prompt + snapshot.sample,
        "elapsed_s": round(time.monotonic() - economy.started, 1),
    }


def sample(run: Run) -> tuple[str, str]:
    """Of what the first buyer got, the prompt and the answer with the most different words: repetition says little."""
    return max(run.samples, key=lambda pair: len(set(pair[1].split())), default=("", ""))


def _losses(run: Run) -> tuple[LossPoint, ...]:
    per_step = run.manifest.tokens_per_step
    train, validation = dict(run.board.points("train")), dict(run.board.points("validation"))
    steps = sorted({*train, *validation})
    points = [LossPoint(step, step * per_step, train.get(step), validation.get(step)) for step in steps]
    return thinned(points)


def _peers(run: Run) -> list[Peer]:
    """Who works, by stage; then who has left, with what they earned."""
    gone = [_peer(run, seat, left=True) for seat in run.host.past]
    return [_peer(run, seat) for seat in run.host.seats] + gone


def _peer(run: Run, seat: Seat, *, left: bool = False) -> Peer:
    spec, figures = run.manifest.model, run.figures
    report = None if left else run.board.reports.get(seat.peer)
    return Peer(
        peer=seat.peer,
        account=seat.account,
        stage=None if left else seat.stage,
        role="former worker" if left else "worker",
        status="left" if left else _status(run, seat.peer),
        verified_tokens=figures.earned(seat.account) * SHARE_FLOPS // SHARE_WAD // spec.flops_per_token(seat.stage),
        shares=figures.shares.get(seat.account, 0),
        claimable=figures.claimable.get(seat.account, 0),
        claimed=figures.income.claimed.get(seat.account, 0),
        transaction=figures.paid_by.get(seat.account, ""),
        rtt_ms=report.rtt_ms if report else None,
    )


def _status(run: Run, peer: PeerId) -> Status:
    heard = run.board.heard.get(peer)
    if heard is None:
        return "waiting"
    return "up" if time.monotonic() - heard < SILENT_S else "down"


def _owners(run: Run) -> list[Owner]:
    figures = run.figures
    return [
        Owner(
            account=owner.account,
            role=owner.role,
            shares=figures.shares.get(owner.account, 0),
            claimed=figures.income.claimed.get(owner.account, 0),
            claimable=figures.claimable.get(owner.account, 0),
            transaction=figures.paid_by.get(owner.account, ""),
        )
        for owner in run.manifest.owners
    ]


def _epochs(run: Run) -> list[Epoch]:
    figures = run.figures
    return [
        Epoch(
            number=leaves.epoch,
            root="0x" + leaves.root.hex(),
            shares=leaves.total,
            transaction=figures.postings.get(leaves.epoch, ""),
            signers=figures.signers.get(leaves.epoch, ()),
        )
        for leaves in figures.epochs
    ]


def _income(run: Run) -> Income:
    income = run.figures.income
    return Income(
        revenue=income.revenue,
        claimed=income.total_claimed,
        unclaimed=income.unclaimed,
        undistributed=income.undistributed,
        dust=income.dust,
        requests_paid=run.figures.requests_paid,
        contract=run.roster.share if run.seated else "",
    )

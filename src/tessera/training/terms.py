"""The terms of a run's contract, as its manifest fixes them: every worker computes them before he bonds a cent."""

from __future__ import annotations

from tessera.chain.faces import Run
from tessera.core.errors import Invalid
from tessera.training.manifest import SHARE_FLOPS, SHARE_WAD, WHOLE_BPS, Manifest

__all__ = ["terms_of", "weight_bps"]

MAX_EPOCHS, MAX_EPOCH_SHARES = 2**24, 2**96  # as in contracts/run.vy


def terms_of(manifest: Manifest) -> Run.Term:
    """Raises `Invalid` for more epochs than the contract takes, or of more work."""
    settlement = manifest.settlement
    if manifest.schedule.epochs > MAX_EPOCHS:
        raise Invalid(f"{manifest.schedule.epochs} epochs, at most {MAX_EPOCHS}: raise epoch_steps")
    shares = _epoch_shares(manifest)
    if shares > MAX_EPOCH_SHARES:
        raise Invalid(
            f"an epoch would be worth {shares} units of shares, at most {MAX_EPOCH_SHARES}: lower epoch_steps"
        )
    return Run.Term(
        stages=manifest.model.stages,
        most=manifest.most_replicas,
        stake=settlement.stake_units,
        window_s=settlement.window_s,
        delay_s=settlement.delay_s,
        reward_bps=settlement.reward_bps,
        epochs=manifest.schedule.epochs,
        early_bps=settlement.early_bps,
        epoch_shares=shares,
        invited=True,
    )


def weight_bps(manifest: Manifest, epoch: int) -> int:
    """What the work of `epoch` counts, as the contract's cap does: from `early_bps` down to 10,000 in equal steps."""
    epochs = manifest.schedule.epochs
    extra = (manifest.settlement.early_bps - WHOLE_BPS) * (epochs - 1 - epoch) // max(epochs - 1, 1)
    return WHOLE_BPS + extra


def _epoch_shares(manifest: Manifest) -> int:
    """Units of shares that an epoch becomes at weight 1 when all of its work is verified, rounded up."""
    schedule, spec = manifest.schedule, manifest.model
    flops_per_token = sum(spec.flops_per_token(stage) for stage in range(spec.stages))
    tokens = min(schedule.epoch_steps, schedule.steps) * manifest.tokens_per_step
    return -(-tokens * flops_per_token * SHARE_WAD * WHOLE_BPS // (SHARE_FLOPS * manifest.allocation.work))

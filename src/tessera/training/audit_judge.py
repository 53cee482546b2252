"""Does the evidence replay? The same question for the auditor, for the other auditors of the stage, and for a joiner.

Each message that the worker sent is compared with its replay in code steps (`tessera.models.distance`), each loss and,
in an audit of the update, each parameter's sum of gradients by relative error. Tolerances belong to the manifest's
`compute`, and the replay computes just that: a worker who saves by computing in less is found, whichever it is.

What a passed audit does not show: that the sum of gradients is right when only a microbatch was drawn, and, where
replicas average rarely, that the optimiser's step was the right one (where they average exactly, equal versions do).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tessera.core.errors import Invalid
from tessera.core.ids import PeerId
from tessera.models.distance import Tolerance, compare, relative_error, tolerance
from tessera.models.replay import Replay, Replayer, unpack_loss
from tessera.training.audit import REASON_CHARS, Outcome
from tessera.training.audit_evidence import Evidence

__all__ = ["Finding", "drift", "judge"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a replay shows."""

    outcome: Outcome  # passed or failed
    reason: str  # "passed", or what is furthest off: version, code, gradient, loss, update, message
    used: float = math.inf  # how much of the tolerance that needs; above 1 it fails


def judge(
    evidence: Evidence,
    replayer: Replayer,
    *,
    stage_of: Callable[[PeerId], int | None],
    ids: Callable[[int, int], Any],
) -> Finding:
    """Replay `evidence`. Whether the draw really hit is `Draw.hits`, which needs the manifest's rate.

    Args:
        replayer: with the parameters that the commitment names.
        stage_of: the roster, those who left included.
        ids: token ids [B, T+1] of (step, microbatch).

    Raises: Invalid, Misbehaviour: the evidence does not hold together, or the parameters are others.

    Cost: two thirds of the microbatch's own work; all of it for an audit of the update.
    """
    spec, stage = replayer.spec, replayer.stage.index
    evidence.check(stage, spec.stages, stage_of)
    version = evidence.commitment.version
    if any(flow.receipt.version != version for flow in evidence.flows if flow.receipt.signer == evidence.worker):
        return _failed("version", "he signed two versions of his parameters in one step")
    if replayer.version != version:
        raise Invalid(f"parameters {replayer.version.hex()[:16]}… replay nothing that names {version.hex()[:16]}…")
    limits = tolerance(spec.model.compute, len(replayer.stage.layers))
    return _replayed(evidence, replayer, ids, limits)


def drift(claimed: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> float:
    """The largest relative error of a parameter between two replicas of a stage; infinite for other parameters."""
    if claimed.keys() != own.keys():
        return float("inf")
    return max(relative_error(claimed[name], own[name]) for name in own)


def _replayed(evidence: Evidence, replayer: Replayer, ids: Callable[[int, int], Any], limits: Tolerance) -> Finding:
    step, codes, gradients = evidence.draw.step, evidence.messages("code_in"), evidence.messages("gradient_in")
    work = {i: (ids(step, i), codes.get(i), gradients.get(i)) for i in evidence.indices}
    total: dict[str, Tensor] | None = None
    try:
        if evidence.draw.index is None:
            replays, total = replayer.gradients(step, work)
        else:
            replays = {i: replayer.replay(step, i, *inputs) for i, inputs in work.items()}
    except Invalid as error:  # he signed that he worked with this
        return _failed("message", f"what he says he worked with cannot be: {error.message}")
    try:
        findings = [f for i, replay in replays.items() for f in _compared(evidence, replayer, i, replay, limits)]
        if total is not None:
            findings.append(_update(evidence, replayer, total, limits))
    except Invalid as error:  # he signed that he sent this
        return _failed("message", error.message)
    return max(findings, key=lambda finding: finding.used)


def _compared(
    evidence: Evidence, replayer: Replayer, index: int, replay: Replay, limits: Tolerance
) -> Iterator[Finding]:
    """What each output of one microbatch shows. Raises: Invalid: bytes that are no message."""
    sent = (
        ("code", evidence.messages("code_out").get(index), replay.code_BTW, None),
        ("gradient", evidence.messages("gradient_out").get(index), replay.gradient_BTW, replay.gradient_noise),
    )
    for what, claimed, own, noise in sent:
        if claimed is not None and own is not None:
            distance = compare(replayer.wire, claimed, own, noise)
            why = f"{distance.mean:.4g} steps from the replay, {distance.worst:.4g} at worst"
            yield _found(what, limits.used(distance), why)
    if replay.loss is not None:
        said = unpack_loss(evidence.losses[evidence.commitment.microbatches.index(index)])
        off = abs(said - replay.loss) / abs(replay.loss) if math.isfinite(said) and replay.loss else math.inf
        yield _found("loss", off / limits.relative, f"he says {said:.6g} nats, the replay has {replay.loss:.6g}")


def _update(evidence: Evidence, replayer: Replayer, total: Mapping[str, Tensor], limits: Tolerance) -> Finding:
    """The sum of gradients against the replay's: the parameter that is furthest off. Raises: Invalid: none."""
    claimed = replayer.read_gradients(evidence.gradient or b"")
    off, name = max((relative_error(claimed[name], own), name) for name, own in total.items())
    return _found("update", off / limits.relative, f"the gradient of {name} is off by {off:.3g} of its size")


def _found(what: str, used: float, why: str) -> Finding:
    return Finding("passed", "passed", used) if used <= 1 else _failed(what, why, used)


def _failed(what: str, why: str, used: float = math.inf) -> Finding:
    return Finding("failed", f"{what}: {why}"[:REASON_CHARS], used)

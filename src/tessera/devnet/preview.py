"""What joining would mean, before anybody agrees to it: the stage, its memory, the pace, and the part that it earns.

The joiner's pace is measured; the others' are what they measured themselves; whoever has not joined yet is taken to be
as fast as the joiner. None of it is paid for, all of it can be compared with what happens.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from tessera.models.forecast import Forecast, StagePace, Workload, forecast
from tessera.models.probe import StageSpeed, probe_stage
from tessera.training.joining import Offer, Pace, machine_name
from tessera.training.manifest import WHOLE_BPS

__all__ = ["Preview", "make_preview", "measure"]


@dataclass(frozen=True)
class Preview:
    """What a joiner is shown."""

    offer: Offer
    memory_bytes: int  # that training this stage takes here
    forecast: Forecast
    known: int  # stages whose pace was measured, ours included
    fetch_bytes: int | None = None  # data and parameters to come

    @property
    def hours(self) -> float:
        """Until the run is trained, at the forecast pace."""
        manifest = self.offer.manifest
        left = max(0, manifest.schedule.steps - self.offer.step)
        return left * manifest.tokens_per_step / self.forecast.tokens_per_s / 3600

    @property
    def share(self) -> float:
        """The part of the whole model that this seat's work from now on earns.

        If all of it is verified, and every worker of the stage does as much.
        """
        manifest = self.offer.manifest
        flops = [manifest.model.flops_per_token(stage) for stage in range(manifest.model.stages)]
        left = max(0, manifest.schedule.steps - self.offer.step) / manifest.schedule.steps
        companions = max(self.offer.place, manifest.replicas)
        return manifest.allocation.work / WHOLE_BPS * flops[self.offer.stage] / sum(flops) * left / companions


def measure(offer: Offer, *, device: str, seconds: float) -> tuple[StageSpeed, Pace]:
    """Train the offered stage for some seconds on random tokens; how fast that is here. Blocks.

    Raises: Invalid when the stage does not fit this machine's memory.
    """
    manifest = offer.manifest
    schedule = manifest.schedule
    speed = probe_stage(
        manifest.model,
        offer.stage,
        sequences=schedule.sequences,
        length=schedule.length,
        microbatches=schedule.microbatches,
        device=device,
        seconds=seconds,
    )
    cores = os.cpu_count() or 1
    place = machine_name(manifest.run_id) if device == "cpu" else ""  # a GPU is a machine of its own
    stage = speed.pace(machine=place, cores=cores)
    pace = Pace(
        forward_s=stage.forward_s,
        backward_s=stage.backward_s,
        step_s=stage.step_s,
        evaluate_s=stage.evaluate_s,
        machine=place,
        cores=cores,
        threads=stage.threads,
    )
    return speed, pace


def make_preview(offer: Offer, speed: StageSpeed, own: Pace, rtt_s: float) -> Preview:
    """
    Args:
        rtt_s: round trip to the host, taken for every boundary between machines.
    """
    manifest = offer.manifest
    paces = {member.stage: member.pace for member in offer.members if member.pace is not None}
    paces[offer.stage] = own
    stages = range(manifest.model.stages)
    line = [_stage_pace(paces[stage]) if stage in paces else _like(own, offer, stage) for stage in stages]
    schedule = manifest.schedule
    work = Workload(
        microbatches=schedule.microbatches,
        tokens=manifest.tokens_per_microbatch,
        bytes_per_token=manifest.model.message_bytes_per_token(),
        evaluate_every=schedule.evaluate_every,
        evaluate_batches=schedule.evaluate_batches,
    )
    rtts = [0.0 if a.machine and a.machine == b.machine else rtt_s for a, b in itertools.pairwise(line)]
    return Preview(offer, speed.memory_bytes, forecast(line, work, rtt_s=rtts), len(paces))


def _stage_pace(pace: Pace) -> StagePace:
    return StagePace(**pace.model_dump())


def _like(own: Pace, offer: Offer, stage: int) -> StagePace:
    """Of somebody who is not here yet: another machine like ours, at work on `stage`."""
    model = offer.manifest.model
    times = model.flops_per_token(stage) / model.flops_per_token(offer.stage)
    return StagePace(
        own.forward_s * times,
        own.backward_s * times,
        step_s=own.step_s * times,
        evaluate_s=own.evaluate_s * times,
        cores=own.cores,
        threads=own.threads,
    )

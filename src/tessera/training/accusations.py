"""Verdicts that speak against somebody: which count, how many anybody must read, and what they look like in a message.

Invariants: an accusation is signed by another worker of the accused one's stage; one auditor fills no more than `MOST`
places about one worker in a message, so that a hostile one cannot make it too long for everybody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.ids import PeerId
from tessera.training.audit import Verdict
from tessera.training.manifest import MAX_WORKERS, Manifest

__all__ = ["MOST", "Accusations", "Place", "limit_bytes", "place_of", "read_accusations"]

MOST = 4  # of one auditor about one worker in an epoch; one is enough to lose it
VERDICT_BYTES = 1800  # an upper bound for one row: a reason's 200 characters may take 1,200

Place = tuple[int, int | None]  # step, microbatch; no microbatch: the whole step


def place_of(verdict: Verdict) -> Place:
    return verdict.draw.step, verdict.draw.index


class Accusations:
    """From several hands: an auditor's first word about each place, and `MOST` places about one worker."""

    def __init__(self, verdicts: Iterable[Verdict] = ()) -> None:
        self._places: dict[tuple[PeerId, PeerId], dict[Place, Verdict]] = {}
        self.add(verdicts)

    def add(self, verdicts: Iterable[Verdict]) -> list[Verdict]:
        """Those that were new."""
        fresh = []
        for verdict in verdicts:
            places = self._places.setdefault((verdict.draw.worker, verdict.draw.auditor), {})
            if place_of(verdict) not in places and len(places) < MOST:
                places[place_of(verdict)] = verdict
                fresh.append(verdict)
        return fresh

    @property
    def verdicts(self) -> list[Verdict]:
        """In the order of their names: a body is the same for all voters."""
        return [
            verdict
            for pair in sorted(self._places)
            for _, verdict in sorted(self._places[pair].items(), key=lambda item: (item[0][0], item[0][1] or -1))
        ]


def limit_bytes(manifest: Manifest) -> int:
    """Most bytes of the accusations of an epoch in one message."""
    workers = min(manifest.most_replicas * manifest.model.stages, MAX_WORKERS)
    return workers * (manifest.most_replicas - 1) * MOST * VERDICT_BYTES


def read_accusations(
    manifest: Manifest, stage_of: Mapping[PeerId, int], rows: object, checked: Collection[object] = ()
) -> list[Verdict]:
    """Accusations from a peer.

    Args:
        stage_of: every worker, those who have left included.
        checked: those whose signatures we know already.

    Raises: Invalid: rows of another shape.  Misbehaviour: forged, or nobody's business.
    Cost: 0.2 ms for each that is not checked yet; call it in a thread.
    """
    if not isinstance(rows, list):
        raise Invalid("verdicts come as a list")
    verdicts = [Verdict.from_row(manifest.run_id, row) for row in rows]
    for verdict in verdicts:
        if reason := _why_not(manifest, stage_of, verdict):
            raise Misbehaviour(f"a verdict {reason}", evidence=verdict.to_row())
        if verdict not in checked:
            verdict.check()
    return verdicts


def _why_not(manifest: Manifest, stage_of: Mapping[PeerId, int], verdict: Verdict) -> str:
    """Why it counts for nothing; empty when it counts."""
    lot, schedule = verdict.draw, manifest.schedule
    if verdict.outcome == "passed":
        return "that accuses nobody"
    worker, auditor = stage_of.get(lot.worker), stage_of.get(lot.auditor)
    if worker is None or worker != auditor:
        return "whose auditor does not share the worker's stage"
    if lot.step >= schedule.steps or (lot.index or 0) >= schedule.microbatches:
        return f"on microbatch {lot.index} of step {lot.step}, which do not exist"
    return ""

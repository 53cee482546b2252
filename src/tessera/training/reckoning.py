"""What the receipts and verdicts of an epoch come to: the same leaves for everybody who knows the same of them.

Nothing here asks anybody. What peers show is read with its signatures checked, what we hold comes from our book, and an
epoch's leaves are computed from what is known of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.ids import PeerId
from tessera.training.accusations import Accusations, limit_bytes, read_accusations
from tessera.training.audit import Verdict, bond_lost, settle_credit
from tessera.training.book import ReceiptBook
from tessera.training.epochs import EpochLeaves, compute_epoch
from tessera.training.manifest import Manifest
from tessera.training.receipts import Credit, Receipt, credited, why_not
from tessera.training.roster import Roster

__all__ = ["Known", "Reckoning"]

RECEIPT_BYTES = 800  # an upper bound for one receipt's row
SETS = 4  # of microbatches that one worker may sign for another in one step: as often as it was done again
AGAIN = 2  # times the receipts of an epoch in which nothing was done twice


class Known:
    """What several hands hold of an epoch: receipts, the first of each kind, and of `SETS` sets of microbatches that
    one worker signed for another in one step, so that two who collude cannot fill a message that everybody must read;
    and accusations, limited likewise.
    """

    def __init__(self, receipts: Iterable[Receipt] = (), verdicts: Iterable[Verdict] = ()) -> None:
        self._accusations = Accusations()
        self._sets: dict[tuple[int, PeerId, PeerId, str], dict[tuple[int, ...], Receipt]] = {}
        self._add(receipts, verdicts)

    def add(self, other: Known) -> tuple[int, int]:
        """How many of its receipts and verdicts were new."""
        return self._add(other.receipts, other.verdicts)

    @property
    def receipts(self) -> list[Receipt]:
        """In the order of their names: a body is the same for all voters."""
        return [self._sets[pair][indices] for pair in sorted(self._sets) for indices in sorted(self._sets[pair])]

    @property
    def verdicts(self) -> list[Verdict]:
        return self._accusations.verdicts

    def seen(self) -> frozenset[Receipt | Verdict]:
        return frozenset((*self.receipts, *self.verdicts))

    def to_body(self) -> bytes:
        rows = [receipt.to_row() for receipt in self.receipts]
        return encoding.encode({"receipts": rows, "verdicts": [verdict.to_row() for verdict in self.verdicts]})

    def _add(self, receipts: Iterable[Receipt], verdicts: Iterable[Verdict]) -> tuple[int, int]:
        fresh = 0
        for receipt in receipts:
            pair = (receipt.step, receipt.worker, receipt.signer, receipt.direction)
            sets = self._sets.setdefault(pair, {})
            if receipt.microbatches not in sets and len(sets) < SETS:
                sets[receipt.microbatches] = receipt
                fresh += 1
        return fresh, len(self._accusations.add(verdicts))


class Reckoning:
    """Computes the epochs of one run for one worker.

    Args:
        roster: the present one.
    """

    def __init__(self, manifest: Manifest, book: ReceiptBook, roster: Callable[[], Roster]) -> None:
        self._manifest, self._book, self._roster = manifest, book, roster
        self._signed: dict[int, frozenset[Verdict]] = {}  # accusations in what we signed
        receipts = manifest.receipts_per_step * manifest.schedule.epoch_steps
        self.body_limit = 4096 + AGAIN * RECEIPT_BYTES * receipts + limit_bytes(manifest)  # bytes

    def held(self, epoch: int) -> Known:
        """What we hold and what counts."""
        stage_of, microbatches = self._roster().stage_by_peer, self._manifest.schedule.microbatches
        held = self._book.of_steps(self._manifest.run_id, self._manifest.schedule.epoch_range(epoch))
        return Known([r for r in held if not why_not(r, stage_of, microbatches)], self.accusations(epoch))

    def accusations(self, epoch: int) -> list[Verdict]:
        """What we hold against somebody."""
        held = self._book.verdicts(self._manifest.run_id, self._manifest.schedule.epoch_range(epoch))
        return [verdict for verdict in held if verdict.outcome != "passed"]

    def read(self, body: bytes, epoch: int, checked: Set[Receipt | Verdict]) -> Known:
        """What a peer holds or proposes. Raises `Misbehaviour` when some is forged or is not of this epoch and roster.

        Args:
            checked: whose signatures we know already.

        Cost: 0.1 ms for each other receipt, twice that for a verdict; meant for a thread.
        """
        value = encoding.decode(body, self.body_limit)
        if not isinstance(value, dict) or value.keys() != {"receipts", "verdicts"}:
            raise Invalid("a body holds receipts and verdicts")
        rows, stage_of = value["receipts"], self._roster().stage_by_peer
        if not isinstance(rows, list):
            raise Invalid("receipts come as a list")
        verdicts = read_accusations(self._manifest, stage_of, value["verdicts"], checked)
        receipts = [Receipt.from_row(self._manifest.run_id, row) for row in rows]
        steps = self._manifest.schedule.epoch_range(epoch)
        if any(verdict.draw.step not in steps for verdict in verdicts):
            raise Misbehaviour("a verdict of another epoch", evidence=[verdict.to_row() for verdict in verdicts])
        for receipt in receipts:
            reason = why_not(receipt, stage_of, self._manifest.schedule.microbatches)
            if reason or receipt.step not in steps:
                raise Misbehaviour(f"a receipt {reason or 'of another epoch'}", evidence=receipt.to_row())
            if receipt not in checked:
                receipt.check()
        return Known(receipts, verdicts)

    def complete(self, epoch: int, known: Known) -> bool:
        """Whether every microbatch of every stage is verified."""
        schedule = self._manifest.schedule
        due = len(schedule.epoch_range(epoch)) * self._manifest.model.stages * schedule.microbatches
        return sum(map(len, self._credit(epoch, known.receipts).values())) >= due

    def leaves(self, epoch: int, known: Known) -> EpochLeaves:
        everyone, audit = self._roster().everyone, self._manifest.audit
        credit = settle_credit(self._credit(epoch, known.receipts), known.verdicts, self._auditors(), audit)
        paid = {
            peer: len(audited) + (len(credit.provisional[peer]) if audit.waived else 0)
            for peer, audited in credit.paid.items()
        }
        work = [(seat.account, seat.stage, paid.get(seat.peer, 0)) for seat in everyone]
        return compute_epoch(self._manifest, epoch, work)

    def keep(self, leaves: EpochLeaves, known: Known) -> None:
        """What we sign, or would have signed."""
        self._signed[leaves.epoch] = frozenset(known.verdicts)
        self._book.save_epoch(leaves.epoch, leaves.to_text())

    def agrees(self, epoch: int, root: bytes) -> bool:
        """Whether we have signed this root, or would have, and nothing has come since that speaks against it."""
        text, signed = self._book.epoch(epoch), self._signed.get(epoch, frozenset())
        agreed = text is not None and EpochLeaves.from_text(text).root == root
        return agreed and signed.issuperset(self.accusations(epoch))

    def bonds_lost(self, verdicts: Iterable[Verdict]) -> dict[PeerId, Sequence[Verdict]]:
        """Whose bond these verdicts cost, and by which of them."""
        return dict(bond_lost(verdicts, self._auditors()))

    def _credit(self, epoch: int, receipts: Iterable[Receipt]) -> Credit:
        schedule, roster = self._manifest.schedule, self._roster()
        steps = schedule.epoch_range(epoch)
        return credited(receipts, roster.stage_by_peer, roster.stages, steps, schedule.microbatches)

    def _auditors(self) -> dict[PeerId, list[PeerId]]:
        """The others who hold each worker's stage now; nobody in a run without audits."""
        roster, audited = self._roster(), self._manifest.audit.rate_bps > 0
        return {
            seat.peer: [other.peer for other in roster.of_stage(seat.stage) if audited and other.peer != seat.peer]
            for seat in roster.everyone
        }

"""How a worker answers the others about an epoch: he shows what he holds, and signs what he computes himself.

He signs a proposal whose root follows from what it shows, and which leaves out nothing that he holds; a strike against
a waiting proposal when another root follows; and the loss of a bond that verdicts of two auditors cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from anyio import to_thread

from tessera.chain.consent import Consent
from tessera.chain.faces import Run
from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId
from tessera.core.signing import AccountKey
from tessera.p2p.calls import serve_calls
from tessera.p2p.transport import Transport
from tessera.training.accusations import limit_bytes, read_accusations
from tessera.training.book import ReceiptBook
from tessera.training.manifest import Manifest
from tessera.training.protocols import EPOCH, SMALL
from tessera.training.receipts import Receipt
from tessera.training.reckoning import Reckoning
from tessera.training.roster import Roster
from tessera.training.window import find_proposal

__all__ = ["Audits", "NoAudits", "Voter"]

MAX_STREAMS = 8  # of one peer at once: a request may be large


class Audits(Protocol):
    """Our audits of others; `tessera.training.auditing.Auditing` is the real one. Its verdicts are in our book."""

    def over(self, step: int) -> bool:
        """Whether those of all steps before `step` are over."""
        ...

    def review(self, receipts: Iterable[Receipt]) -> None:
        """Accuse who is credited by these with what he let us draw nothing about."""
        ...


class NoAudits:
    """Of who audits nobody."""

    def over(self, step: int) -> bool:
        return True

    def review(self, receipts: Iterable[Receipt]) -> None:
        pass


class Voter:
    """Args:
    due: whether an epoch is finished here, and our audits of it are over.
    settled: epochs whose posted leaves we hold.
    """

    def __init__(
        self,
        manifest: Manifest,
        run: Run,
        key: AccountKey,
        *,
        book: ReceiptBook,
        reckoning: Reckoning,
        roster: Callable[[], Roster],
        audits: Audits,
        due: Callable[[int], bool],
        settled: Callable[[], int],
    ) -> None:
        self._manifest, self._run, self._key = manifest, run, key
        self._book, self._reckoning, self._roster, self._audits = book, reckoning, roster, audits
        self._due, self._settled = due, settled
        self._consent = Consent(manifest.chain_id, roster().run, manifest.run_id)

    def serve(self, transport: Transport) -> None:
        limit = self._reckoning.body_limit
        serve_calls(transport, EPOCH, self._answer, request_limit=limit, max_streams=MAX_STREAMS)

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        epoch, op = request.get("epoch"), request.get("op")
        if op != "leaves" and self._roster().stage_of(peer) is None:
            raise Refused("only this run's workers settle its epochs", rule="seated")
        if type(epoch) is not int or not 0 <= epoch < self._manifest.schedule.epochs:
            raise Invalid(f"epoch {epoch!r}, expected 0 to {self._manifest.schedule.epochs - 1}")
        if op == "receipts":
            return {}, self._reckoning.held(epoch).to_body()
        if op == "leaves":
            text = self._book.epoch(epoch)
            if text is None:
                raise Missing(f"epoch {epoch} is not known here")
            return {"leaves": text}, b""
        if op == "slash":
            return {"signature": (await self._slash(str(request.get("worker")), body)).hex()}, b""
        if op not in ("vote", "strike"):
            raise Invalid(f"unknown operation {str(op)[:40]!r}")
        attempt, root = request.get("attempt"), str(request.get("root"))
        present = await self._run.attempt()
        if type(attempt) is not int or attempt != present:
            raise Conflict(f"{present} proposals were struck, not {str(attempt)[:40]}: a signature serves one only")
        sign = self._propose if op == "vote" else self._strike
        return {"signature": (await sign(epoch, attempt, root, body)).hex()}, b""

    async def _propose(self, epoch: int, attempt: int, root: str, body: bytes) -> bytes:
        """Our signature under the proposed root, if we compute the same from what leaves nothing of ours out."""
        if not self._due(epoch):
            raise Conflict(f"epoch {epoch} is not finished here, or not audited")
        if epoch < self._settled():
            raise Conflict(f"epoch {epoch} is settled")
        reckoning = self._reckoning
        proposed = await to_thread.run_sync(reckoning.read, body, epoch, reckoning.held(epoch).seen())
        self._audits.review(proposed.receipts)
        receipts, verdicts = proposed.add(reckoning.held(epoch))
        if receipts or verdicts:
            left_out = f"{receipts} receipts and {verdicts} verdicts"
            raise Conflict(f"the proposal leaves out {left_out} that we hold: gather again")
        leaves = reckoning.leaves(epoch, proposed)
        if leaves.root.hex() != root:
            raise Misbehaviour(
                f"epoch {epoch}: these receipts and verdicts give root {leaves.root.hex()[:16]}…, not {root[:16]}…"
            )
        reckoning.keep(leaves, proposed)
        return self._key.sign_digest(self._consent.epoch(epoch, attempt, leaves.root, leaves.total))

    async def _strike(self, epoch: int, attempt: int, root: str, body: bytes) -> bytes:
        """Our signature against the waiting proposal, if what is shown and what we hold give another root."""
        waiting = await find_proposal(self._run, epoch)
        if not self._due(epoch) or waiting is None or waiting.root.hex() != root:
            raise Conflict(f"epoch {epoch} does not wait with root {root[:16]}…, or is not finished here")
        reckoning = self._reckoning
        shown = await to_thread.run_sync(reckoning.read, body, epoch, reckoning.held(epoch).seen())
        shown.add(reckoning.held(epoch))
        if reckoning.leaves(epoch, shown).root == waiting.root:
            raise Refused(f"epoch {epoch} waits with the root that we compute too", rule="same_root")
        return self._key.sign_digest(self._consent.strike(epoch, attempt, sha256(body)))

    async def _slash(self, worker: str, body: bytes) -> bytes:
        """Our signature for taking a worker's bond, if these verdicts cost it."""
        roster = self._roster()
        accused = roster.seated(PeerId(worker))
        rows = encoding.decode(body, limit_bytes(self._manifest) + SMALL)
        verdicts = await to_thread.run_sync(read_accusations, self._manifest, roster.stage_by_peer, rows)
        lost = self._reckoning.bonds_lost(verdicts).get(accused.peer, ())
        if self._manifest.settlement.stake_units == 0 or not lost or list(lost) != verdicts:
            raise Refused(
                "these verdicts cost nobody his bond: two auditors and more than half are needed", rule="bond"
            )
        challenger = roster.seated(verdicts[0].draw.auditor).account
        return self._key.sign_digest(self._consent.slash(accused.account, sha256(body), challenger))

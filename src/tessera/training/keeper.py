"""The keeper turns finished epochs into shares: every worker runs one, and none is in charge.

For each epoch in order, the worker whose turn it is gathers all receipts, computes the leaves, asks the others to sign,
and proposes the root with more than two thirds of the signatures. When he does not manage in time, it is the next one's
turn. A voter signs only what he computes himself from receipts whose signatures he has checked, only for an epoch that
he has finished too, and only if no receipt that he holds is missing. He holds those for his own work and those that he
signed for his neighbours, so leaving out a worker takes his neighbours' consent. An epoch without verified work is
proposed empty.

A proposal waits out the contract's challenge window; then anybody posts it, and each worker redeems his own leaf.
Meanwhile every worker compares it with what he computes himself. Who finds another root, because evidence has come
since or somebody signed what he should not, shows the others why; a third of them strikes it out, and it is proposed
anew.

Audits take credit away: verdicts that accuse somebody are gathered, checked and computed with in the same way. While a
voter says that he holds more, or still audits, a proposer gathers again, as long as an audit may take: two thirds could
else leave out the only auditor of a stage. Who failed an audit by the word of two auditors loses his bond with it. A
run whose manifest does not waive audits does not pay what nobody could audit: it is owed, and nothing settles it later
yet.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from typing import Any, Protocol

import anyio
import structlog
from anyio import to_thread

from tessera.chain.client import RpcChain
from tessera.chain.consent import Consent
from tessera.chain.faces import ModelShare, Run
from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused, TesseraError, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import Account, PeerId
from tessera.core.merkle import share_leaf
from tessera.core.signing import AccountKey, recover_account
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import Transport
from tessera.training.accusations import Accusations, limit_bytes, read_accusations
from tessera.training.audit import Verdict, bond_lost, settle_credit
from tessera.training.book import ReceiptBook
from tessera.training.epochs import EpochLeaves, compute_epoch
from tessera.training.manifest import Manifest
from tessera.training.protocols import CALL_S, EPOCH, SMALL
from tessera.training.receipts import Credit, Receipt, credited, why_not
from tessera.training.roster import Roster, Seat
from tessera.training.window import find_proposal, proposal_hash

__all__ = ["Audits", "Keeper", "NoAudits", "known_leaves"]

log = structlog.get_logger()

TURN_S = 20.0  # a proposer's time before it is the next worker's turn
GATHER_S = 12.0  # how long a proposer waits for receipts that are still on their way
POLL_S = 0.5
POST_TURN_S = 1.0  # after a window, later each further worker posts, so that mostly one does
LOOKS = 20  # at a waiting proposal, in a window; two a second at most
DOUBT_S = 10.0  # before we ask the others again to strike
RETRY_S = 2.0  # after a failed attempt, which may have sent every receipt to everybody
LEAVES_LIMIT = 1 << 20  # bytes
RECEIPT_BYTES = 800  # an upper bound for one receipt's row
SETS = 4  # of microbatches that one worker may sign for another in one step: as often as it was done again
AGAIN = 2  # times the receipts of an epoch in which nothing was done twice
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


class Keeper:
    """Settles the epochs of one run for one worker.

    Args:
        steps_done: how many steps this worker has finished.
        roster: the present one; addresses may change while peers come and go.
        audits: ours; None: we audit nobody.
        changed: told that the contract has taken a worker off its list.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        transport: Transport,
        chain: RpcChain,
        account_key: AccountKey,
        book: ReceiptBook,
        roster: Callable[[], Roster],
        steps_done: Callable[[], int],
        clock: Clock,
        audits: Audits | None = None,
        changed: Callable[[], Awaitable[None]] = anyio.lowlevel.checkpoint,
    ) -> None:
        self._manifest, self._transport, self._chain, self._key = manifest, transport, chain, account_key
        self._book, self._roster, self._steps_done = book, roster, steps_done
        self._audits: Audits = audits or NoAudits()
        self._clock, self._changed = clock, changed
        self.share, self.run_contract = ModelShare(chain, roster().share), Run(chain, roster().run)
        self._consent = Consent(manifest.chain_id, roster().run, manifest.run_id)
        audit = manifest.audit
        self._patience_s = GATHER_S + audit.attempts * (audit.answer_s + 1) if audit.rate_bps else 0.0
        self._proposed: dict[int, float] = {}  # when we first proposed an epoch
        self._counted: dict[int, frozenset[Verdict]] = {}  # accusations in what we signed
        self._settled = 0  # epochs whose posted leaves we hold
        receipts = manifest.receipts_per_step * manifest.schedule.epoch_steps
        self._body_limit = 4096 + AGAIN * RECEIPT_BYTES * receipts + limit_bytes(manifest)

    def serve(self) -> None:
        serve_calls(self._transport, EPOCH, self._answer, request_limit=self._body_limit, max_streams=MAX_STREAMS)

    async def run(self) -> None:
        """Settle every epoch as it falls due; returns when the last one is redeemed."""
        for epoch in range(self._manifest.schedule.epochs):
            while not self._due(epoch):
                await anyio.sleep(POLL_S)
            while True:
                try:
                    await self._settle(epoch)
                    break
                except TesseraError as error:  # a peer or the chain was away: the epoch stays due
                    log.warning("epoch_not_settled", epoch=epoch, code=error.code, reason=error.message)
                    await anyio.sleep(RETRY_S)

    def _due(self, epoch: int) -> bool:
        schedule = self._manifest.schedule
        return schedule.epochs_due(self._steps_done()) > epoch and self._audits.over(schedule.epoch_range(epoch).stop)

    # --- one epoch --------------------------------------------------------------------------------------------------

    async def _settle(self, epoch: int) -> None:
        turn = 0
        while await self.share.epoch_count() <= epoch:
            if (waiting := await find_proposal(self.run_contract, epoch)) is not None:
                await self._see_through(waiting)
            elif (epoch + turn) % len(self._roster().seats) == self._my_place():
                await self._propose(epoch)
            elif not await self._proposed_within(epoch, TURN_S):
                turn += 1
        leaves = await self._posted_leaves(epoch)
        self._settled = max(self._settled, epoch + 1)
        await self._redeem(leaves)
        await self._slash(epoch)

    async def _propose(self, epoch: int) -> None:
        """Gather, compute, collect signatures, propose. Raises when too few sign."""
        attempt = await self.run_contract.attempt()
        known = await self._gather(epoch)
        self._audits.review(known.receipts)
        known.accusations.add(self._accusations(epoch))
        leaves = self._compute(epoch, known)
        request = {"op": "vote", "epoch": epoch, "attempt": attempt, "root": leaves.root.hex()}
        digest = self._consent.epoch(epoch, attempt, leaves.root, leaves.total)
        signatures, disputed = await self._collect(self._others(), digest, request, known.to_body())
        since = self._proposed.setdefault(epoch, anyio.current_time())
        if disputed and anyio.current_time() - since < self._patience_s:  # an auditor is slow, or found something
            raise Conflict(f"{disputed[0][:16]}… holds more of epoch {epoch}, or still audits it")
        count = len(self._roster().seats)
        if 3 * len(signatures) <= 2 * count:
            raise Unavailable(f"{len(signatures)} of {count} workers signed epoch {epoch}, more than 2/3 needed")
        self._keep(leaves, known)
        try:
            await self.run_contract.propose(self._key, epoch, leaves.root, leaves.total, signatures)
        except Conflict:
            return  # somebody proposed it first
        log.info("epoch_proposed", epoch=epoch, shares=str(leaves.total), signers=len(signatures), attempt=attempt)

    async def _collect(
        self, seats: Iterable[Seat], digest: bytes, request: dict[str, Any], body: bytes
    ) -> tuple[list[bytes], list[PeerId]]:
        """Our signature and those of `seats` who agree, as the contract wants them; and who may agree soon."""
        signatures, disputed = {self._key.account: self._key.sign_digest(digest)}, list[PeerId]()

        async def ask(seat: Seat) -> None:
            try:
                reply, _ = await self._ask(seat, request, body)
                signature = bytes.fromhex(str(reply.get("signature", "")))
                if recover_account(digest, signature) != seat.account:
                    raise Misbehaviour(f"{seat.peer[:16]}… signed something else")
                signatures[seat.account] = signature
            except (TesseraError, ValueError) as error:  # a refusal is not fatal
                if isinstance(error, Conflict):
                    disputed.append(seat.peer)
                facts = {"epoch": request["epoch"], "stage": seat.stage, "peer_id": seat.peer, "reason": str(error)}
                log.warning("vote_missing", op=request["op"], **facts)

        async with anyio.create_task_group() as tasks:
            for seat in seats:
                tasks.start_soon(ask, seat)
        return [signatures[account] for account in sorted(signatures, key=lambda a: int(a, 16))], disputed

    # --- the challenge window ---------------------------------------------------------------------------------------

    async def _see_through(self, waiting: Run.Proposed) -> None:
        """Watch a proposal until its window is over, strike it when it is wrong, and post it when it is not."""
        pause_s = max(POLL_S, self._manifest.settlement.window_s / LOOKS)
        doubted = -DOUBT_S
        while await self.run_contract.pending() == proposal_hash(waiting):
            if self._clock.time() >= waiting.opens_at:
                await self._post(waiting)
                return
            if anyio.current_time() - doubted >= DOUBT_S and (known := await self._contrary(waiting)) is not None:
                doubted = anyio.current_time()
                await self._strike(waiting, known)
            await anyio.sleep(min(pause_s, max(POLL_S, waiting.opens_at - self._clock.time())))

    async def _post(self, waiting: Run.Proposed) -> None:
        """Whoever's turn it is first; the others when he does not."""
        late = (self._my_place() - waiting.epoch) % len(self._roster().seats)
        if await self._posted_within(waiting.epoch, POST_TURN_S * late):
            return
        try:
            await self.run_contract.post(self._key, waiting.epoch, waiting.root, waiting.shares, waiting.opens_at)
        except Conflict:
            return  # somebody posted it first
        log.info("epoch_posted", epoch=waiting.epoch, shares=str(waiting.shares))

    async def _contrary(self, waiting: Run.Proposed) -> _Known | None:
        """What speaks against a waiting proposal; None when it is what we compute, or we cannot tell yet."""
        epoch = waiting.epoch
        if not self._due(epoch):
            return None
        text, counted = self._book.epoch(epoch), self._counted.get(epoch, frozenset())
        agreed = text is not None and EpochLeaves.from_text(text).root == waiting.root
        if agreed and counted.issuperset(self._accusations(epoch)):
            return None
        known = await self._gather(epoch)
        self._audits.review(known.receipts)
        known.accusations.add(self._accusations(epoch))
        leaves = self._compute(epoch, known)
        if leaves.root != waiting.root:
            return known
        self._keep(leaves, known)
        return None

    async def _strike(self, waiting: Run.Proposed, known: _Known) -> None:
        """Show the others what speaks against a proposal, and strike it out when a third of all agrees."""
        epoch, attempt, body = waiting.epoch, await self.run_contract.attempt(), known.to_body()
        evidence = sha256(body)
        request = {"op": "strike", "epoch": epoch, "attempt": attempt, "root": waiting.root.hex()}
        digest = self._consent.strike(epoch, attempt, evidence)
        signatures, _ = await self._collect(self._others(), digest, request, body)
        if 3 * len(signatures) < len(self._roster().seats):
            log.warning("strike_lacks_signatures", epoch=epoch, signers=len(signatures))
            return
        try:
            await self.run_contract.strike(
                self._key, epoch, waiting.root, waiting.shares, waiting.opens_at, evidence, signatures
            )
        except Conflict:
            return  # somebody struck it first
        log.warning("epoch_struck", epoch=epoch, attempt=attempt, root=waiting.root.hex(), signers=len(signatures))

    # --- bonds ------------------------------------------------------------------------------------------------------

    async def _slash(self, epoch: int) -> None:
        """Take the bonds that the epoch's audits cost; what fails here is tried by others, or with the next fault."""
        if self._manifest.settlement.stake_units == 0:
            return
        for peer, verdicts in bond_lost(self._accusations(epoch), self._auditors_of_all()).items():
            seat = self._roster().seat_of(peer)
            if seat is None or seat.account == self._key.account:
                continue
            await anyio.sleep(POST_TURN_S * self._my_place())
            if not await self.run_contract.is_worker(seat.account):
                continue
            try:
                await self._slash_one(epoch, seat, verdicts)
            except TesseraError as error:
                log.warning("bond_not_taken", peer_id=peer, code=error.code, reason=error.message)

    async def _slash_one(self, epoch: int, accused: Seat, verdicts: Sequence[Verdict]) -> None:
        body = encoding.encode([verdict.to_row() for verdict in verdicts])
        evidence, challenger = sha256(body), self._account_of(verdicts[0].draw.auditor)
        digest = self._consent.slash(accused.account, evidence, challenger)
        others = [seat for seat in self._others() if seat is not accused]
        request = {"op": "slash", "epoch": epoch, "worker": accused.peer}
        signatures, _ = await self._collect(others, digest, request, body)
        await self.run_contract.slash(self._key, accused.account, evidence, challenger, signatures)
        log.warning("bond_taken", peer_id=accused.peer, stage=accused.stage, signers=len(signatures))
        await self._changed()

    async def _gather(self, epoch: int) -> _Known:
        """All that any worker holds of the epoch, checked. Waits a little while some work is not verified."""
        steps, known = self._manifest.schedule.epoch_range(epoch), _Known()
        due = len(steps) * self._manifest.model.stages * self._manifest.schedule.microbatches
        with anyio.move_on_after(GATHER_S):
            while True:
                known.add(self._held(steps))
                async with anyio.create_task_group() as tasks:  # together: one that is slow must not hide the others
                    for seat in self._others():
                        tasks.start_soon(self._fetch, seat, epoch, known)
                if sum(map(len, self._credit(epoch, known.receipts).values())) >= due:
                    break
                await anyio.sleep(POLL_S)
        return known

    async def _fetch(self, seat: Seat, epoch: int, known: _Known) -> None:
        """Add what one worker holds to `known`; a bad answer is logged, not fatal."""
        try:
            _, body = await self._ask(seat, {"op": "receipts", "epoch": epoch}, b"")
            receipts, verdicts = await to_thread.run_sync(self._read, body, epoch, known.seen())
            known.add(receipts)
            known.accusations.add(verdicts)
        except TesseraError as error:
            log.warning("receipts_missing", epoch=epoch, peer_id=seat.peer, code=error.code, reason=error.message)

    def _read(self, body: bytes, epoch: int, checked: Set[Receipt | Verdict]) -> tuple[list[Receipt], list[Verdict]]:
        """What a peer holds or proposes. Raises `Misbehaviour` when some is forged or is not of this epoch and roster.

        Args:
            checked: whose signatures we know already.

        Cost: 0.1 ms for each other receipt, twice that for a verdict; runs in a thread.
        """
        value = encoding.decode(body, self._body_limit)
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
        return receipts, verdicts

    def _credit(self, epoch: int, receipts: Iterable[Receipt]) -> Credit:
        schedule, roster = self._manifest.schedule, self._roster()
        steps = schedule.epoch_range(epoch)
        return credited(receipts, roster.stage_by_peer, roster.stages, steps, schedule.microbatches)

    def _compute(self, epoch: int, known: _Known) -> EpochLeaves:
        everyone, audit = self._roster().everyone, self._manifest.audit
        auditors, verdicts = self._auditors_of_all(), known.accusations.verdicts
        credit = settle_credit(self._credit(epoch, known.receipts), verdicts, auditors, audit)
        paid = {
            peer: len(audited) + (len(credit.provisional[peer]) if audit.waived else 0)
            for peer, audited in credit.paid.items()
        }
        work = [(seat.account, seat.stage, paid.get(seat.peer, 0)) for seat in everyone]
        return compute_epoch(self._manifest, epoch, work)

    def _keep(self, leaves: EpochLeaves, known: _Known) -> None:
        """What we sign, or would have signed."""
        self._counted[leaves.epoch] = frozenset(known.accusations.verdicts)
        self._book.save_epoch(leaves.epoch, leaves.to_text())

    def _auditors_of_all(self) -> dict[PeerId, list[PeerId]]:
        """The others who hold each worker's stage now; nobody in a run without audits."""
        roster, audited = self._roster(), self._manifest.audit.rate_bps > 0
        return {
            seat.peer: [other.peer for other in roster.of_stage(seat.stage) if audited and other.peer != seat.peer]
            for seat in roster.everyone
        }

    async def _proposed_within(self, epoch: int, seconds: float) -> bool:
        with anyio.move_on_after(seconds):
            while await self.share.epoch_count() <= epoch and await self.run_contract.pending() == bytes(32):
                await anyio.sleep(POLL_S)
            return True
        return False

    async def _posted_within(self, epoch: int, seconds: float) -> bool:
        with anyio.move_on_after(seconds):
            while await self.share.epoch_count() <= epoch:
                await anyio.sleep(POLL_S)
            return True
        return False

    async def _posted_leaves(self, epoch: int) -> EpochLeaves:
        """The leaves whose root stands on chain: our own, or another worker's if ours differ."""
        text = self._book.epoch(epoch)
        if text is not None:
            leaves = EpochLeaves.from_text(text)
            if leaves.root == (await self.share.epochs(epoch)).root:
                return leaves
        leaves = await known_leaves(self._transport, self._roster(), self.share, epoch)
        self._book.save_epoch(epoch, leaves.to_text())
        return leaves

    async def _redeem(self, leaves: EpochLeaves) -> None:
        """Our leaf; and, by the first of a stage, those of who has left it: they may be gone for good."""
        roster, mine = self._roster(), self._my_seat()
        first = roster.of_stage(mine.stage)[0] == mine
        leavers = [seat.account for seat in roster.past if first and seat.stage == mine.stage]
        for account in (mine.account, *leavers):
            shares = leaves.shares_of(account)
            if shares and not await self.share.counted(share_leaf(leaves.epoch, account, shares)):
                await self.share.redeem(self._key, leaves.epoch, account, shares, leaves.proof(account))
                log.info("shares_redeemed", epoch=leaves.epoch, account=account, shares=str(shares))

    # --- answers ----------------------------------------------------------------------------------------------------

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        epoch, op = request.get("epoch"), request.get("op")
        if op != "leaves" and self._roster().stage_of(peer) is None:
            raise Refused("only this run's workers settle its epochs", rule="seated")
        if type(epoch) is not int or not 0 <= epoch < self._manifest.schedule.epochs:
            raise Invalid(f"epoch {epoch!r}, expected 0 to {self._manifest.schedule.epochs - 1}")
        if op == "receipts":
            return {}, self._known(epoch).to_body()
        if op == "leaves":
            text = self._book.epoch(epoch)
            if text is None:
                raise Missing(f"epoch {epoch} is not known here")
            return {"leaves": text}, b""
        if op == "slash":
            return {"signature": (await self._vote_to_slash(str(request.get("worker")), body)).hex()}, b""
        if op not in ("vote", "strike"):
            raise Invalid(f"unknown operation {str(op)[:40]!r}")
        attempt, root = request.get("attempt"), str(request.get("root"))
        present = await self.run_contract.attempt()
        if type(attempt) is not int or attempt != present:
            raise Conflict(f"{present} proposals were struck, not {str(attempt)[:40]}: a signature serves one only")
        vote = self._vote if op == "vote" else self._vote_to_strike
        return {"signature": (await vote(epoch, attempt, root, body)).hex()}, b""

    async def _vote(self, epoch: int, attempt: int, root: str, body: bytes) -> bytes:
        """Our signature under the proposed root, if we compute the same from what leaves nothing of ours out."""
        if not self._due(epoch):
            raise Conflict(f"epoch {epoch} is not finished here: {self._steps_done()} steps are done, or not audited")
        if epoch < self._settled:
            raise Conflict(f"epoch {epoch} is settled")
        receipts, verdicts = await to_thread.run_sync(self._read, body, epoch, self._known(epoch).seen())
        self._audits.review(receipts)
        own, proposed = self._known(epoch), _Known()
        proposed.add(receipts)
        proposed.accusations.add(verdicts)
        missing = len(proposed.add(own.receipts)), len(proposed.accusations.add(own.accusations.verdicts))
        if any(missing):
            left_out = f"{missing[0]} receipts and {missing[1]} verdicts"
            raise Conflict(f"the proposal leaves out {left_out} that we hold: gather again")
        leaves = self._compute(epoch, proposed)
        if leaves.root.hex() != root:
            raise Misbehaviour(
                f"epoch {epoch}: these receipts and verdicts give root {leaves.root.hex()[:16]}…, not {root[:16]}…"
            )
        self._keep(leaves, proposed)
        return self._key.sign_digest(self._consent.epoch(epoch, attempt, leaves.root, leaves.total))

    async def _vote_to_strike(self, epoch: int, attempt: int, root: str, body: bytes) -> bytes:
        """Our signature against the waiting proposal, if what is shown and what we hold give another root."""
        waiting = await find_proposal(self.run_contract, epoch)
        if not self._due(epoch) or waiting is None or waiting.root.hex() != root:
            raise Conflict(f"epoch {epoch} does not wait with root {root[:16]}…, or is not finished here")
        receipts, verdicts = await to_thread.run_sync(self._read, body, epoch, self._known(epoch).seen())
        shown = _Known()
        shown.add(receipts)
        shown.accusations.add(verdicts)
        shown.add(self._held(self._manifest.schedule.epoch_range(epoch)))
        shown.accusations.add(self._accusations(epoch))
        if self._compute(epoch, shown).root == waiting.root:
            raise Refused(f"epoch {epoch} waits with the root that we compute too", rule="same_root")
        return self._key.sign_digest(self._consent.strike(epoch, attempt, sha256(body)))

    async def _vote_to_slash(self, worker: str, body: bytes) -> bytes:
        """Our signature for taking a worker's bond, if these verdicts cost it."""
        accused, stage_of = self._roster().seat_of(PeerId(worker)), self._roster().stage_by_peer
        if accused is None:
            raise Missing(f"{worker[:16]}… has no seat in this run")
        rows = encoding.decode(body, limit_bytes(self._manifest) + SMALL)
        verdicts = await to_thread.run_sync(read_accusations, self._manifest, stage_of, rows)
        lost = bond_lost(verdicts, self._auditors_of_all()).get(accused.peer, ())
        if self._manifest.settlement.stake_units == 0 or not lost or list(lost) != verdicts:
            raise Refused(
                "these verdicts cost nobody his bond: two auditors and more than half are needed", rule="bond"
            )
        challenger = self._account_of(verdicts[0].draw.auditor)
        return self._key.sign_digest(self._consent.slash(accused.account, sha256(body), challenger))

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _held(self, steps: range) -> list[Receipt]:
        """What we hold and what counts."""
        stage_of, microbatches = self._roster().stage_by_peer, self._manifest.schedule.microbatches
        held = self._book.of_steps(self._manifest.run_id, steps)
        return [receipt for receipt in held if not why_not(receipt, stage_of, microbatches)]

    def _accusations(self, epoch: int) -> list[Verdict]:
        """What we hold against somebody."""
        held = self._book.verdicts(self._manifest.run_id, self._manifest.schedule.epoch_range(epoch))
        return [verdict for verdict in held if verdict.outcome != "passed"]

    def _known(self, epoch: int) -> _Known:
        known = _Known()
        known.add(self._held(self._manifest.schedule.epoch_range(epoch)))
        known.accusations.add(self._accusations(epoch))
        return known

    async def _ask(self, seat: Seat, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        limit = self._body_limit + SMALL
        return await call(self._transport, seat.record, EPOCH, request, body, timeout_s=CALL_S, reply_limit=limit)

    def _account_of(self, peer: PeerId) -> Account:
        """A present worker's."""
        seat = self._roster().seat_of(peer)
        if seat is None:
            raise Missing(f"{peer[:16]}… has no seat in this run")
        return seat.account

    def _my_place(self) -> int:
        return self._roster().accounts.index(self._key.account)

    def _my_seat(self) -> Seat:
        return self._roster().seats[self._my_place()]

    def _others(self) -> list[Seat]:
        return [seat for seat in self._roster().seats if seat.account != self._key.account]


class _Known:
    """What several hands hold of an epoch: receipts, the first of each kind, and of `SETS` sets of microbatches that
    one worker signed for another in one step, so that two who collude cannot fill a message that everybody must read;
    and accusations, limited likewise.
    """

    def __init__(self) -> None:
        self.accusations = Accusations()
        self._sets: dict[tuple[int, PeerId, PeerId, str], dict[tuple[int, ...], Receipt]] = {}

    def add(self, receipts: Iterable[Receipt]) -> list[Receipt]:
        """Those that were new."""
        fresh = []
        for receipt in receipts:
            pair = (receipt.step, receipt.worker, receipt.signer, receipt.direction)
            sets = self._sets.setdefault(pair, {})
            if receipt.microbatches not in sets and len(sets) < SETS:
                sets[receipt.microbatches] = receipt
                fresh.append(receipt)
        return fresh

    @property
    def receipts(self) -> list[Receipt]:
        """In the order of their names: a body is the same for all voters."""
        return [self._sets[pair][indices] for pair in sorted(self._sets) for indices in sorted(self._sets[pair])]

    def seen(self) -> frozenset[Receipt | Verdict]:
        return frozenset((*self.receipts, *self.accusations.verdicts))

    def to_body(self) -> bytes:
        rows = [receipt.to_row() for receipt in self.receipts]
        return encoding.encode(
            {"receipts": rows, "verdicts": [verdict.to_row() for verdict in self.accusations.verdicts]}
        )


async def known_leaves(transport: Transport, roster: Roster, share: ModelShare, epoch: int) -> EpochLeaves:
    """The leaves of a posted epoch, from any worker whose answer hashes to the root on chain.

    Raises: Missing when nobody has them now.
    """
    root = (await share.epochs(epoch)).root
    for seat in roster.seats:
        if seat.peer == transport.id:
            continue
        try:
            request = {"op": "leaves", "epoch": epoch}
            reply, _ = await call(transport, seat.record, EPOCH, request, timeout_s=CALL_S, reply_limit=LEAVES_LIMIT)
            leaves = EpochLeaves.from_text(str(reply.get("leaves")))
            if leaves.epoch == epoch and leaves.root == root:
                return leaves
            log.warning("leaves_wrong", epoch=epoch, stage=seat.stage)
        except TesseraError as error:
            log.debug("leaves_missing", epoch=epoch, stage=seat.stage, reason=error.message)
    raise Missing(f"no worker can show the leaves of epoch {epoch} now")

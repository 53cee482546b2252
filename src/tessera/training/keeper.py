"""The keeper turns finished epochs into shares: every worker runs one, and none is in charge.

For each epoch in order, the worker whose turn it is gathers all receipts, computes the leaves, asks the others to
sign, and posts the root with more than two thirds of the signatures. When he does not manage in time, it is the next
one's turn. A voter signs only what he computes himself from receipts whose signatures he has checked, only for an
epoch that he has finished too, and only if no receipt that he holds is missing. He holds those for his own work and
those that he signed for his neighbours, so leaving out a worker takes his neighbours' consent. Once posted, each worker
redeems his own leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import anyio
import structlog
from anyio import to_thread

from tessera.chain.client import RpcChain
from tessera.chain.faces import ModelShare
from tessera.chain.settle import epoch_digest
from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused, TesseraError, Unavailable
from tessera.core.ids import Account, PeerId
from tessera.core.merkle import share_leaf
from tessera.core.signing import AccountKey, recover_account
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import Transport
from tessera.training.book import ReceiptBook
from tessera.training.epochs import EpochLeaves, compute_epoch
from tessera.training.manifest import Manifest
from tessera.training.protocols import CALL_S, EPOCH, SMALL
from tessera.training.receipts import Receipt, expected_receipts, verified_tokens
from tessera.training.roster import Roster

__all__ = ["Keeper", "known_leaves"]

log = structlog.get_logger()

TURN_S = 20.0  # a proposer's time before it is the next worker's turn
GATHER_S = 12.0  # how long a proposer waits for receipts that are still on their way
POLL_S = 0.5
RETRY_S = 2.0  # after a failed attempt, which may have sent every receipt to everybody
LEAVES_LIMIT = 1 << 20  # bytes
RECEIPT_BYTES = 512  # an upper bound for one receipt's row
MAX_STREAMS = 8  # of one peer at once: a request may be large


class Keeper:
    """Settles the epochs of one run for one worker.

    Args:
        steps_done: how many steps this worker has finished.
        roster: the present one; addresses may change while peers come and go.
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
    ) -> None:
        self._manifest, self._transport, self._chain, self._key = manifest, transport, chain, account_key
        self._book, self._roster, self._steps_done = book, roster, steps_done
        self.share = ModelShare(chain, roster().share)
        self._settled = 0  # epochs whose posted leaves we hold
        self._receipts_limit = 4096 + RECEIPT_BYTES * 2 * manifest.model.stages * manifest.schedule.epoch_steps

    def serve(self) -> None:
        limit = self._receipts_limit
        serve_calls(self._transport, EPOCH, self._answer, request_limit=limit, max_streams=MAX_STREAMS)

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
        return self._manifest.schedule.epochs_due(self._steps_done()) > epoch

    # --- one epoch --------------------------------------------------------------------------------------------------

    async def _settle(self, epoch: int) -> None:
        turn = 0
        stages = self._manifest.model.stages
        while await self.share.epoch_count() <= epoch:
            if (epoch + turn) % stages == self._my_stage():
                await self._propose(epoch)
            elif not await self._posted_within(epoch, TURN_S):
                turn += 1
        leaves = await self._posted_leaves(epoch)
        self._settled = max(self._settled, epoch + 1)
        await self._redeem(leaves)

    async def _propose(self, epoch: int) -> None:
        """Gather, compute, collect signatures, post. Raises when too few sign."""
        receipts = await self._gather(epoch)
        leaves = self._compute(epoch, receipts)
        signatures = {self._key.account: self._sign(leaves)}
        body = encoding.encode([receipt.to_row() for receipt in receipts])
        async with anyio.create_task_group() as tasks:
            for stage in self._others():
                tasks.start_soon(self._collect, stage, leaves, body, signatures)
        accounts = set(self._roster().accounts)
        if 3 * len(signatures) <= 2 * len(accounts):
            raise Unavailable(
                f"{len(signatures)} of {len(accounts)} workers signed epoch {epoch}, more than 2/3 needed"
            )
        ordered = [signatures[account] for account in sorted(signatures, key=lambda a: int(a, 16))]
        self._book.save_epoch(epoch, leaves.to_text())
        try:
            await self.share.post(self._key, epoch, leaves.root, leaves.total, ordered)
        except Conflict:
            return  # somebody posted it first
        log.info("epoch_posted", epoch=epoch, shares=str(leaves.total), signers=len(ordered))

    async def _collect(self, stage: int, leaves: EpochLeaves, body: bytes, signatures: dict[Account, bytes]) -> None:
        """Ask one worker for his signature; a refusal is logged, not fatal."""
        seat = self._roster().seats[stage]
        request = {"op": "vote", "epoch": leaves.epoch, "root": leaves.root.hex()}
        try:
            reply, _ = await self._ask(stage, request, body)
            signature = bytes.fromhex(str(reply.get("signature", "")))
            if recover_account(self._digest(leaves), signature) != seat.account:
                raise Misbehaviour(f"stage {stage} signed something else")
            signatures[seat.account] = signature
        except (TesseraError, ValueError) as error:
            log.warning("vote_missing", epoch=leaves.epoch, stage=stage, reason=str(error))

    async def _gather(self, epoch: int) -> list[Receipt]:
        """All receipts of the epoch that any worker holds, checked. Waits a little while some are missing."""
        steps = self._manifest.schedule.epoch_range(epoch)
        known: dict[tuple[int, PeerId, str], Receipt] = {}
        due = len(steps) * 2 * (self._manifest.model.stages - 1)
        with anyio.move_on_after(GATHER_S):
            while True:
                for receipt in self._held(steps):
                    known[receipt.step, receipt.worker, receipt.direction] = receipt
                async with anyio.create_task_group() as tasks:  # together: one that is slow must not hide the others
                    for stage in self._others() if len(known) < due else ():
                        tasks.start_soon(self._fetch_receipts, stage, epoch, known)
                if len(known) >= due:
                    break
                await anyio.sleep(POLL_S)
        return [known[name] for name in sorted(known)]

    async def _fetch_receipts(self, stage: int, epoch: int, known: dict[tuple[int, PeerId, str], Receipt]) -> None:
        """Add what one worker holds to `known`; a bad answer is logged, not fatal."""
        try:
            _, body = await self._ask(stage, {"op": "receipts", "epoch": epoch}, b"")
            receipts = await to_thread.run_sync(self._read_receipts, body, epoch, frozenset(known.values()))
        except TesseraError as error:
            log.warning("receipts_missing", epoch=epoch, stage=stage, code=error.code, reason=error.message)
            return
        for receipt in receipts:
            known.setdefault((receipt.step, receipt.worker, receipt.direction), receipt)

    def _read_receipts(self, body: bytes, epoch: int, checked: Set[Receipt]) -> list[Receipt]:
        """Receipts from a peer. Raises `Misbehaviour` when one is forged or is not of this epoch and roster.

        Args:
            checked: receipts whose signatures we know already.

        Cost: 0.1 ms for each other one; runs in a thread.
        """
        rows = encoding.decode(body, self._receipts_limit)
        if not isinstance(rows, list):
            raise Invalid("receipts come as a list")
        receipts = [Receipt.from_row(self._manifest.run_id, row) for row in rows]
        steps, roster = self._manifest.schedule.epoch_range(epoch), self._roster()
        for receipt in receipts:
            if receipt.step not in steps or receipt.worker not in {seat.peer for seat in roster.at(receipt.step)}:
                raise Misbehaviour("a receipt of another run's worker or another epoch", evidence=receipt.to_row())
            if not _counts(receipt, roster):
                raise Misbehaviour("a receipt whose signer is no neighbour", evidence=receipt.to_row())
            if receipt.tokens != self._manifest.tokens_per_step:  # else a second one for less could take its place
                raise Misbehaviour(
                    f"a receipt for {receipt.tokens} tokens, a step has {self._manifest.tokens_per_step}",
                    evidence=receipt.to_row(),
                )
            if receipt not in checked:
                receipt.check()
        return receipts

    def _compute(self, epoch: int, receipts: list[Receipt]) -> EpochLeaves:
        stages, accounts, tokens = list[int](), list[Account](), list[int]()
        for steps, seats in self._roster().spans(self._manifest.schedule.epoch_range(epoch)):
            stages += [seat.stage for seat in seats]
            accounts += [seat.account for seat in seats]
            tokens += verified_tokens(receipts, [seat.peer for seat in seats], steps, self._manifest.tokens_per_step)
        leaves = compute_epoch(self._manifest, epoch, accounts, tokens, stages)
        if leaves is None:
            raise Unavailable(f"no receipt proves any work in epoch {epoch}")
        return leaves

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
        """Our leaf, and those of who held our stage before us: they may be gone for good."""
        mine = self._my_stage()
        leavers = [past.seat.account for past in self._roster().past if past.seat.stage == mine]
        for account in dict.fromkeys([self._key.account, *leavers]):
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
            steps = self._manifest.schedule.epoch_range(epoch)
            return {}, encoding.encode([receipt.to_row() for receipt in self._held(steps)])
        if op == "leaves":
            text = self._book.epoch(epoch)
            if text is None:
                raise Missing(f"epoch {epoch} is not known here")
            return {"leaves": text}, b""
        if op == "vote":
            return {"signature": (await self._vote(epoch, str(request.get("root")), body)).hex()}, b""
        raise Invalid(f"unknown operation {str(op)[:40]!r}")

    async def _vote(self, epoch: int, root: str, body: bytes) -> bytes:
        """Our signature under the proposed root, if we compute the same from receipts that leave none of ours out."""
        if not self._due(epoch):
            raise Conflict(f"epoch {epoch} is not finished here: {self._steps_done()} steps are done")
        if epoch < self._settled:
            raise Conflict(f"epoch {epoch} is settled")
        own = self._held(self._manifest.schedule.epoch_range(epoch))
        receipts = await to_thread.run_sync(self._read_receipts, body, epoch, frozenset(own))
        proposed = {(r.step, r.worker, r.direction) for r in receipts}
        missing = sum((r.step, r.worker, r.direction) not in proposed for r in own)
        if missing:
            raise Conflict(f"the proposal leaves out {missing} receipts that we hold: gather again")
        leaves = self._compute(epoch, receipts)
        if leaves.root.hex() != root:
            raise Misbehaviour(f"epoch {epoch}: these receipts give root {leaves.root.hex()[:16]}…, not {root[:16]}…")
        self._book.save_epoch(epoch, leaves.to_text())
        return self._sign(leaves)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _held(self, steps: range) -> list[Receipt]:
        """What we hold and what counts: not, for one, of steps that a successor has trained again."""
        roster = self._roster()
        return [r for r in self._book.of_steps(self._manifest.run_id, steps) if _counts(r, roster)]

    async def _ask(self, stage: int, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        record = self._roster().seats[stage].record
        return await call(
            self._transport, record, EPOCH, request, body, timeout_s=CALL_S, reply_limit=self._receipts_limit + SMALL
        )

    def _digest(self, leaves: EpochLeaves) -> bytes:
        manifest = self._manifest
        share = self._roster().share
        return epoch_digest(manifest.chain_id, share, manifest.run_id, leaves.epoch, leaves.root, leaves.total)

    def _sign(self, leaves: EpochLeaves) -> bytes:
        return self._key.sign_digest(self._digest(leaves))

    def _my_stage(self) -> int:
        return self._roster().accounts.index(self._key.account)

    def _others(self) -> list[int]:
        mine = self._my_stage()
        return [stage for stage in range(self._manifest.model.stages) if stage != mine]


def _counts(receipt: Receipt, roster: Roster) -> bool:
    """Whether `receipt` is about who held a stage in its step, and signed by who was his neighbour then."""
    peers = [seat.peer for seat in roster.at(receipt.step)]
    if receipt.worker not in peers:
        return False
    return (receipt.direction, receipt.signer) in expected_receipts(peers, peers.index(receipt.worker))


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

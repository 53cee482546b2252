"""The teller gives out the workers' part of a run's income: every worker runs one, and none is in charge.

When it is a worker's turn, he gathers vouchers and receipts from all, computes the tally, asks the others to sign, and
proposes it to the split with more than two thirds of the signatures; when its window is over anybody posts it, and each
worker claims his leaf. A voter signs only what he computes himself, from papers whose signatures he has checked and
purchases that he has found paid, and only if nothing that he holds is left out. As with epochs, leaving a worker out
takes his neighbours' consent.

Tellers do not strike by themselves: the split takes a third's signatures under `strike`, which people gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
import structlog
from anyio import to_thread

from tessera.chain import abi
from tessera.chain.consent import TallyConsent
from tessera.chain.faces import IncomeSplit
from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused, TesseraError, Unavailable
from tessera.core.hashing import keccak
from tessera.core.ids import PeerId
from tessera.core.signing import AccountKey, recover_account
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import PeerRecord, Transport
from tessera.serving.income.book import IncomeBook
from tessera.serving.income.purchases import Purchases
from tessera.serving.income.receipts import Receipt
from tessera.serving.income.tally import Server, Tally, compute_tally
from tessera.serving.income.vouchers import Terms, Voucher

__all__ = ["Staff", "Teller", "TellerConfig"]

log = structlog.get_logger()

PROTOCOL = "tessera/tally/1"
CALL_S = 20.0
SMALL = 4_096
VOTE_S = 120.0  # a voter looks up every purchase that he does not know
MAX_SESSIONS = 8_192  # of one tally
MAX_RECEIPTS = 8 * MAX_SESSIONS
BODY_LIMIT = 1_024 * MAX_SESSIONS + 512 * MAX_RECEIPTS
LEAVES_LIMIT = 1 << 20
MAX_STREAMS = 4


class Staff(Protocol):
    """Who serves; present workers vote, and past ones are paid for what they served."""

    @property
    def stages(self) -> int: ...

    def servers(self) -> Mapping[PeerId, Server]:
        """Present and past."""
        ...

    def present(self) -> Sequence[PeerRecord]: ...


@dataclass(frozen=True, slots=True)
class TellerConfig:
    """Times in seconds."""

    period_s: int = 3_600  # cuts are at whole multiples of it
    grace_s: int = 60  # after a cut, until the receipts for its sessions are all here
    poll_s: float = 5.0
    least_units: int = 1  # that a tally is worth its gas for


class Teller:
    """One worker's.

    Args:
        gateways: whose vouchers count; None = anybody's.
    """

    def __init__(
        self,
        split: IncomeSplit,
        consent: TallyConsent,
        terms: Terms,
        staff: Staff,
        book: IncomeBook,
        purchases: Purchases,
        transport: Transport,
        key: AccountKey,
        clock: Clock,
        config: TellerConfig,
        *,
        gateways: frozenset[PeerId] | None = None,
    ) -> None:
        self._split, self._consent, self._terms, self._staff = split, consent, terms, staff
        self._book, self._purchases, self._transport = book, purchases, transport
        self._key, self._clock, self._config, self._gateways = key, clock, config, gateways
        self._claimed = 0  # tallies whose leaf for us is claimed, since this process began
        self._known_paid: set[str] = set()  # purchases of the present tally: what has paid stays paid

    def serve(self) -> None:
        serve_calls(self._transport, PROTOCOL, self._answer, request_limit=BODY_LIMIT, max_streams=MAX_STREAMS)

    async def run(self) -> None:
        """Until cancelled. A peer or a chain that is away costs a turn."""
        while True:
            try:
                await self.turn()
            except TesseraError as error:
                log.info("tally_waits", code=error.code, reason=error.message)
            await anyio.sleep(self._config.poll_s)

    async def turn(self) -> None:
        """Whatever is to be done now: claim, post, or propose. Raises: what peers and chain do."""
        await self._claim()
        number = await self._split.tally_count()
        waiting = await self._waiting(number)
        if waiting is not None:
            if self._clock.time() >= waiting.opens_at:
                await self._post(waiting)
            return
        if self._is_my_turn():
            await self._propose(number)

    # --- proposing --------------------------------------------------------------------------------------------------

    async def _propose(self, number: int) -> None:
        if await self._split.undistributed() > 0:
            await self._split.distribute(self._key)
        pool = await self._split.unassigned()
        after = await self._last_cut(number)
        cut = self._cut_with_room(after)
        if pool < self._config.least_units or cut <= after:
            return
        papers = await self._gather(after, cut)
        tally = self._compute(number, cut, pool, papers)
        if tally.total < self._config.least_units:
            return
        attempt = await self._split.attempt()
        digest = self._consent.tally(number, attempt, tally.root, tally.total)
        request = {
            "op": "vote",
            "tally": number,
            "attempt": attempt,
            "cut": cut,
            "pool": str(pool),
            "root": tally.root.hex(),
        }
        signatures = await self._collect(digest, request, papers.to_body())
        count = len(self._staff.present())
        if 3 * len(signatures) <= 2 * count:
            raise Unavailable(f"{len(signatures)} of {count} workers signed tally {number}, more than 2/3 needed")
        self._book.save_tally(number, tally.to_text())
        await self._split.propose(self._key, number, tally.root, tally.total, signatures)
        log.info("tally_proposed", tally=number, units=str(tally.total), signers=len(signatures))

    async def _gather(self, after: int, cut: int) -> _Papers:
        """What all of us hold of sessions that ended in (after, cut], and are paid."""
        papers = self._held(after, cut)

        async def ask(record: PeerRecord) -> None:
            request = {"op": "papers", "after": after, "cut": cut}
            try:
                _, body = await call(
                    self._transport, record, PROTOCOL, request, timeout_s=CALL_S, reply_limit=BODY_LIMIT
                )
                found = await to_thread.run_sync(_Papers.from_body, self._terms, body)
                papers.add(self._checked(found, after, cut))
            except TesseraError as error:  # what he holds alone is left out until he is back
                log.info("papers_missing", peer_id=record.id, code=error.code, reason=error.message)

        async with anyio.create_task_group() as tasks:
            for record in self._others():
                tasks.start_soon(ask, record)
        paid = await self._paid(papers)
        return papers.only(paid)

    async def _collect(self, digest: bytes, request: dict[str, Any], body: bytes) -> list[bytes]:
        servers = self._staff.servers()
        signatures = {self._key.account: self._key.sign_digest(digest)}

        async def ask(record: PeerRecord) -> None:
            try:
                reply, _ = await call(
                    self._transport, record, PROTOCOL, request, body, timeout_s=VOTE_S, reply_limit=SMALL
                )
                signature = encoding.hex_bytes(reply.get("signature"), 65)
                if (account := recover_account(digest, signature)) != servers[record.id].account:
                    raise Misbehaviour(f"{record.id[:16]}… answered with a signature of {account}")
                signatures[account] = signature
            except TesseraError as error:  # a refusal is not fatal
                log.info("tally_vote_missing", peer_id=record.id, code=error.code, reason=error.message)

        async with anyio.create_task_group() as tasks:
            for record in self._others():
                tasks.start_soon(ask, record)
        return [signatures[account] for account in sorted(signatures, key=lambda a: int(a, 16))]

    # --- the split --------------------------------------------------------------------------------------------------

    async def _waiting(self, number: int) -> IncomeSplit.Proposed | None:
        """The tally that waits out its window."""
        pending = await self._split.pending()
        if pending == bytes(32):
            return None
        for event in reversed(await self._split.events(IncomeSplit.Proposed, topics=[number.to_bytes(32, "big")])):
            fields = (event.tally, event.root, event.amount, event.opens_at)
            if keccak(abi.encode(("uint256", "bytes32", "uint256", "uint256"), fields)) == pending:
                return event
        raise Missing(f"the split waits with {pending.hex()[:16]}…, and no proposal of tally {number} is that")

    async def _post(self, waiting: IncomeSplit.Proposed) -> None:
        try:
            await self._split.post(self._key, waiting.tally, waiting.root, waiting.amount, waiting.opens_at)
        except Conflict:
            return  # somebody posted it first
        log.info("tally_posted", tally=waiting.tally, units=str(waiting.amount))

    async def _claim(self) -> None:
        """Our leaf of each posted tally that we have not claimed."""
        account = self._key.account
        while self._claimed < await self._split.tally_count():
            tally = await self._posted(self._claimed)
            units = tally.units_of(account)
            if units and not await self._split.counted(tally.leaf(account)):
                await self._split.claim(self._key, tally.number, account, units, tally.proof(account))
                log.info("serving_income_claimed", tally=tally.number, units=str(units))
            self._claimed += 1

    async def _posted(self, number: int) -> Tally:
        """A posted tally: ours, or another worker's whose root is the one on the chain."""
        root = (await self._split.tallies(number)).root
        if (text := self._book.tally(number)) is not None and (tally := Tally.from_text(text)).root == root:
            return tally
        for record in self._others():
            try:
                request = {"op": "leaves", "tally": number}
                reply, _ = await call(
                    self._transport, record, PROTOCOL, request, timeout_s=CALL_S, reply_limit=LEAVES_LIMIT
                )
                tally = Tally.from_text(str(reply.get("leaves")))
                if tally.number == number and tally.root == root:
                    self._book.save_tally(number, tally.to_text())
                    return tally
            except TesseraError as error:
                log.debug("tally_not_shown", peer_id=record.id, code=error.code)
        raise Missing(f"no worker can show the leaves of tally {number} now")

    # --- answers ----------------------------------------------------------------------------------------------------

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        op = request.get("op")
        if op == "leaves":
            text = self._book.tally(_number(request, "tally"))
            if text is None:
                raise Missing("that tally is not known here")
            return {"leaves": text}, b""
        if peer not in {record.id for record in self._staff.present()}:
            raise Refused("only this run's workers give out its income", rule="seated")
        if op == "papers":
            return {}, self._held(_number(request, "after"), _number(request, "cut")).to_body()
        if op == "vote":
            return {"signature": (await self._vote(request, body)).hex()}, b""
        raise Invalid(f"unknown operation {str(op)[:40]!r}")

    async def _vote(self, request: dict[str, Any], body: bytes) -> bytes:
        """Our signature under the proposed tally, if we compute the same from what leaves nothing of ours out."""
        number, attempt, cut = (_number(request, name) for name in ("tally", "attempt", "cut"))
        if number != await self._split.tally_count() or attempt != await self._split.attempt():
            raise Conflict(f"tally {number}, attempt {attempt} is not the next one")
        after = await self._last_cut(number)
        if not after < cut <= self._cut() or cut % self._config.period_s:
            raise Conflict(f"a cut at {cut}, after {after}: the last whole period ended at {self._cut()}")
        pool = await self._split.unassigned()
        if request.get("pool") != str(pool):
            raise Conflict(f"there are {pool} units to give out, not {str(request.get('pool'))[:40]}")
        shown = self._checked(await to_thread.run_sync(_Papers.from_body, self._terms, body), after, cut)
        if unpaid := shown.vouchers.keys() - await self._paid(shown):
            raise Conflict(f"{len(unpaid)} sessions of the tally are not paid for yet")
        held = self._held(after, cut)
        mine = held.only(await self._paid(held))
        if missing := shown.lacks(mine):
            raise Conflict(f"the tally leaves out {missing} papers that we hold: gather again")
        tally = self._compute(number, cut, pool, shown)
        if tally.root.hex() != request.get("root"):
            raise Misbehaviour(f"these papers give root {tally.root.hex()[:16]}…, not {str(request.get('root'))[:16]}…")
        self._book.save_tally(number, tally.to_text())
        return self._key.sign_digest(self._consent.tally(number, attempt, tally.root, tally.total))

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _held(self, after: int, cut: int) -> _Papers:
        papers = _Papers()
        papers.vouchers = {voucher.session: voucher for voucher in self._book.ended(after, cut)[:MAX_SESSIONS]}
        papers.add_receipts(self._book.receipts(papers.vouchers))
        return papers

    def _checked(self, papers: _Papers, after: int, cut: int) -> _Papers:
        """Raises `Misbehaviour` for a paper that is forged, or does not belong here."""
        for voucher in papers.vouchers.values():
            if not after < voucher.expires <= cut or (self._gateways and voucher.gateway not in self._gateways):
                raise Misbehaviour(
                    f"session {voucher.session[:8]}… does not belong to this tally", evidence=voucher.session
                )
            try:
                voucher.check(self._terms, voucher.expires - 1)
            except Refused as error:
                raise Misbehaviour(f"a voucher is forged: {error.message}", evidence=voucher.to_value()) from error
        for receipt in papers.receipts.values():
            if receipt.session not in papers.vouchers:
                raise Misbehaviour("a receipt for a session without a voucher", evidence=receipt.to_row())
            receipt.check()
        return papers

    async def _paid(self, papers: _Papers) -> set[str]:
        """The sessions whose purchase has reached the run's payee."""
        paid = {voucher.purchase.name: voucher for voucher in papers.vouchers.values()}
        self._known_paid &= paid.keys()
        self._known_paid |= {name for name in paid.keys() - self._known_paid if await self._has_paid(paid[name])}
        return {session for session, voucher in papers.vouchers.items() if voucher.purchase.name in self._known_paid}

    async def _has_paid(self, voucher: Voucher) -> bool:
        """A metered payer has paid when its settlements cover this voucher: what it used cannot be told apart."""
        purchase = voucher.purchase
        if purchase.facilitator is not None:
            return await self._purchases.metered(purchase.payer) > 0
        try:
            return await self._purchases.paid(purchase, self._clock.time())
        except Refused:
            return False

    def _compute(self, number: int, cut: int, pool: int, papers: _Papers) -> Tally:
        servers = self._staff.servers()
        vouchers, receipts = papers.vouchers.values(), papers.receipts.values()
        return compute_tally(self._terms, number, cut, pool, vouchers, receipts, servers, self._staff.stages)

    async def _last_cut(self, number: int) -> int:
        return 0 if number == 0 else (await self._posted(number - 1)).cut

    def _cut(self) -> int:
        """The end of the last whole period whose receipts should all be here."""
        return int(self._clock.time() - self._config.grace_s) // self._config.period_s * self._config.period_s

    def _cut_with_room(self, after: int) -> int:
        """The newest cut of which a tally can hold all sessions; periods that hold more are too long."""
        cut, period = self._cut(), self._config.period_s
        while cut > after and len(self._book.ended(after, cut)) > MAX_SESSIONS:
            cut = min(cut - period, (after + cut) // 2 // period * period)
        return cut

    def _is_my_turn(self) -> bool:
        """Turns go round by the clock: who is away delays a tally by a few polls."""
        accounts = sorted(self._staff.servers()[record.id].account for record in self._staff.present())
        turn = int(self._clock.time() / max(1.0, 4 * self._config.poll_s))
        return bool(accounts) and accounts[turn % len(accounts)] == self._key.account

    def _others(self) -> list[PeerRecord]:
        return [record for record in self._staff.present() if record.id != self._transport.id]


class _Papers:
    """Vouchers by session, and receipts by session, worker and signer: the largest of each."""

    def __init__(self) -> None:
        self.vouchers: dict[str, Voucher] = {}
        self.receipts: dict[tuple[str, PeerId, PeerId], Receipt] = {}

    def add(self, other: _Papers) -> None:
        for session, voucher in other.vouchers.items():
            self.vouchers.setdefault(session, voucher)
        self.add_receipts(other.receipts.values())

    def add_receipts(self, receipts: Iterable[Receipt]) -> None:
        for receipt in receipts:
            name = (receipt.session, receipt.worker, receipt.signer)
            if name not in self.receipts or self.receipts[name].tokens < receipt.tokens:
                self.receipts[name] = receipt

    def only(self, sessions: set[str]) -> _Papers:
        papers = _Papers()
        papers.vouchers = {name: voucher for name, voucher in self.vouchers.items() if name in sessions}
        papers.receipts = {name: receipt for name, receipt in self.receipts.items() if name[0] in papers.vouchers}
        return papers

    def lacks(self, other: _Papers) -> int:
        """How many of `other`'s are not here, or smaller."""
        vouchers = other.vouchers.keys() - self.vouchers.keys()
        small = [
            name
            for name, receipt in other.receipts.items()
            if name not in self.receipts or self.receipts[name].tokens < receipt.tokens
        ]
        return len(vouchers) + len(small)

    def to_body(self) -> bytes:
        vouchers = [self.vouchers[session].to_value() for session in sorted(self.vouchers)]
        return encoding.encode([vouchers, [self.receipts[name].to_row() for name in sorted(self.receipts)]])

    @classmethod
    def from_body(cls, terms: Terms, body: bytes) -> _Papers:
        """Raises `Invalid`. Nothing is checked but the form."""
        value = encoding.decode(body, BODY_LIMIT)
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, list) for part in value):
            raise Invalid("papers are a list of vouchers and a list of receipts")
        vouchers, receipts = value
        if len(vouchers) > MAX_SESSIONS or len(receipts) > MAX_RECEIPTS:
            raise Invalid(f"{len(vouchers)} vouchers and {len(receipts)} receipts: too many for a tally")
        papers = cls()
        papers.vouchers = {v.session: v for v in (Voucher.from_value(terms, row) for row in vouchers)}
        papers.add_receipts(Receipt.from_row(terms.run_id, row) for row in receipts)
        return papers


def _number(request: dict[str, Any], name: str) -> int:
    value = request.get(name)
    if type(value) is not int or not 0 <= value < 2**53:
        raise Invalid(f"{name} is a number, not {str(value)[:40]!r}")
    return value

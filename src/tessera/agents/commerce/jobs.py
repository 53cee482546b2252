"""Jobs of one escrow, as an agent sees them on the chain: which there are, how they stand, what became of the money.

The chain is the only memory of a job's money. A job is found again by what its description names, so an agent that has
forgotten everything but its key can go on. Of several jobs that name one intent only the first counts: whoever makes a
second one by accident (a crash, two processes) funds neither that one nor both.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.agents.commerce.terms import Terms, named_in
from tessera.agents.intents import Coin as CoinName
from tessera.agents.mandates import asset_id
from tessera.chain.face import decode_events
from tessera.chain.faces import Coin, JobEscrow
from tessera.chain.jobs import funding_digest
from tessera.chain.types import Chain
from tessera.core.amount import Amount
from tessera.core.errors import Conflict, Refused
from tessera.core.ids import Account
from tessera.core.signing import AccountKey
from tessera.incentives.escrow_twin import ENDED, JobStatus

__all__ = ["Jobs", "Listed", "Outcome"]

NOBODY = Account("0x" + "00" * 20)
AGAIN_BLOCKS = 64  # that are read once more each time: a reorg may have changed them


@dataclass(frozen=True, slots=True)
class Listed:
    """A job that stands on the chain."""

    id: int
    client: Account
    evaluator: Account
    terms: str  # the digest that its description names
    intent: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a job's budget went, in units. `transactions` prove it."""

    status: JobStatus
    paid: int
    refunded: int
    transactions: tuple[str, ...]


class Jobs:
    """One escrow on one chain.

    Args:
        from_block: the escrow's own, so that nothing is read that was before it.
    """

    def __init__(self, escrow: JobEscrow, coin: Coin, asset: CoinName, *, grace_s: int, from_block: int = 0) -> None:
        self.escrow, self.coin, self._coin_name, self.grace_s = escrow, coin, asset, grace_s
        self.asset = asset.asset
        self.chain: Chain = escrow.chain
        self._next, self._from = from_block, from_block
        self._listed: dict[int, Listed] = {}

    @classmethod
    async def open(cls, chain: Chain, address: Account, *, from_block: int = 0) -> Jobs:
        """Ask the escrow and its coin what they are. Cost: five requests."""
        escrow = JobEscrow(chain, address)
        coin = Coin(chain, await escrow.asset())
        asset = asset_id(await chain.chain_id(), coin.address)
        named = CoinName(asset, await coin.name(), await coin.version())
        return cls(escrow, coin, named, grace_s=await escrow.grace(), from_block=from_block)

    @property
    def address(self) -> Account:
        return self.escrow.address

    # --- reading ----------------------------------------------------------------------------------------------------

    async def listed(self) -> list[Listed]:
        """Every job whose description names terms, the oldest first."""
        head = await self.chain.block_number()
        first = max(self._from, self._next - AGAIN_BLOCKS)
        created = {event.jobId: event for event in await self.escrow.events(JobEscrow.JobCreated, first, head)}
        for event in await self.escrow.events(JobEscrow.JobTerms, first, head):
            names, made = named_in(event.description), created.get(event.jobId)
            if names is not None and made is not None:
                self._listed[event.jobId] = Listed(event.jobId, made.client, made.evaluator, *names)
        self._next = head + 1
        return [self._listed[number] for number in sorted(self._listed)]

    async def find(self, client: Account, intent: str) -> Listed | None:
        """The one job of an intent."""
        jobs = await self.listed()
        return next((job for job in jobs if job.client == client and job.intent == intent), None)

    async def of(self, terms: Terms) -> int:
        """The one job of these terms' intent, if it names these very terms; 0 while there is none."""
        found = await self.find(terms.client, terms.intent)
        return found.id if found is not None and found.terms == terms.digest else 0

    async def job(self, number: int) -> JobEscrow.Job:
        return await self.escrow.jobs(number)

    async def agreed(self, number: int, terms: Terms) -> JobEscrow.Job | None:
        """The job, if it is what `terms` say in every field; its price is set before it is funded."""
        job = await self.job(number)
        wanted = (terms.client, terms.provider, terms.evaluator, terms.deadline, terms.on_silence, terms.bond, NOBODY)
        found = (job.client, job.provider, job.evaluator, job.expiredAt, job.on_silence, job.bond, job.hook)
        same_price = job.status == JobStatus.OPEN or job.budget == terms.price.units
        return job if wanted == found and same_price and terms.price.asset == self.asset else None

    async def outcome(self, number: int) -> Outcome | None:
        """None while the job is not over."""
        job = await self.job(number)
        if JobStatus(job.status) not in ENDED:
            return None
        topic = [number.to_bytes(32, "big")]
        paid = await self.escrow.events(JobEscrow.PaymentReleased, self._from, topics=topic)
        refunded = await self.escrow.events(JobEscrow.Refunded, self._from, topics=topic)
        proofs = tuple(dict.fromkeys(event.log.tx_hash for event in (*paid, *refunded)))
        sums = sum(event.amount for event in paid), sum(event.amount for event in refunded)
        return Outcome(JobStatus(job.status), *sums, proofs)

    async def funding(self, number: int) -> str:
        """The transaction that funded a job, or "" while there is none."""
        found = await self.escrow.events(JobEscrow.JobFunded, self._from, topics=[number.to_bytes(32, "big")])
        return found[0].log.tx_hash if found else ""

    async def submission(self, number: int) -> bytes | None:
        """The hash of the work that the provider has handed in; None while it has not."""
        found = await self.escrow.events(JobEscrow.JobSubmitted, self._from, topics=[number.to_bytes(32, "big")])
        return found[0].deliverable if found else None

    async def balance(self, account: Account) -> Amount:
        return Amount(await self.coin.balanceOf(account), self.asset)

    # --- acting -----------------------------------------------------------------------------------------------------

    async def create(self, key: AccountKey, terms: Terms) -> int:
        """Put an open job on the chain; no money moves. Twice makes two: see `find`."""
        receipt = await self.escrow.createJob(
            key, terms.provider, terms.evaluator, terms.deadline, terms.description, NOBODY, terms.on_silence,
            terms.bond,
        )  # fmt: skip
        (made,) = decode_events(JobEscrow.JobCreated, self.address, receipt)
        return made.jobId

    async def fund(self, key: AccountKey, number: int, job: JobEscrow.Job) -> str:
        """Fund this very job by a signature that fits no other. Returns: the transaction."""
        chain_id = await self.chain.chain_id()
        digest = funding_digest(
            chain_id, self.coin.address, self.address, number, job, 0, job.expiredAt,
            asset_name=self._coin_name.name, asset_version=self._coin_name.version,
        )  # fmt: skip
        signature = key.sign_digest(digest)
        parts = signature[64], signature[:32], signature[32:64]
        receipt = await self.escrow.fundWithAuthorization(key, number, job.budget, 0, job.expiredAt, *parts)
        return receipt.tx_hash

    async def settle(self, key: AccountKey, number: int, now: float) -> bool:
        """Close a job whose time is over; anybody may. False when there is nothing to close, or not yet."""
        job = await self.job(number)
        waits = {JobStatus.FUNDED: 0, JobStatus.SUBMITTED: self.grace_s}
        status = JobStatus(job.status)
        if status not in waits or now < job.expiredAt + waits[status]:
            return False
        try:
            await self.escrow.claimRefund(key, number)
        except (Conflict, Refused):  # somebody was first, or the chain's clock is behind ours
            return False
        return True

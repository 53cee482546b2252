"""Bounties: an open call, sealed bids, and a bond for whoever bids and then keeps silent.

    call ─▶ commit (a hash, with a bond in escrow) ─▶ reveal (price and salt) ─▶ award: the lowest price, its own bid

A commitment is a hash over the call, the bidder, the price and a random salt: nobody can read it, and whoever copies it
cannot open it, because the bidder is inside. The bond is a job of the same escrow: the bidder locks it for the poster
with the referee as evaluator, and silence refunds it. The poster claims it (`bond_service`) from who revealed nothing,
and lets all others have it back at once; the referee looks into what he took himself (`bond_judge`).

Invariants: nothing is taken before or after its time, by the clock of whoever takes it; each bidder has one commitment
and one reveal, the first; the award is a function of what was taken, so that poster and referee, who both take every
bid, come to the same one; a bond is lost by a missing or wrong reveal and by nothing else.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tessera.agents.commerce.buyer import Order
from tessera.agents.commerce.evaluator import Judge
from tessera.agents.commerce.jobs import Jobs
from tessera.agents.commerce.messages import Message, write_message
from tessera.agents.commerce.seller import Service
from tessera.agents.commerce.terms import Brief
from tessera.agents.mandates import parse_asset
from tessera.chain.jobs import REFUND
from tessera.core import encoding
from tessera.core.amount import Amount
from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Late, Refused
from tessera.core.hashing import keccak
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey
from tessera.incentives.escrow_twin import JobStatus

__all__ = [
    "Auction",
    "Bid",
    "Bounty",
    "bond_holds",
    "bond_judge",
    "bond_order",
    "bond_service",
    "commit_message",
    "reveal_message",
]

MOST_BIDDERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounty:
    """An open call.

    Args:
        brief: the brief's hash.
        most: the highest price, in units of `asset`; higher bids count as wrong reveals.
        bond: what a bidder locks, in units.
        commit_until, reveal_until: seconds since 1970, both exclusive.
        bond_until: the bonds' deadline; until then the poster can claim what was not revealed.
    """

    poster: Account
    referee: Account
    title: str
    brief: str
    asset: str
    most: int
    bond: int
    commit_until: int
    reveal_until: int
    bond_until: int

    def __post_init__(self) -> None:
        for name in ("poster", "referee"):
            object.__setattr__(self, name, parse_account(getattr(self, name)))
        parse_asset(self.asset)
        if self.poster == self.referee:
            raise Invalid("the poster cannot be the referee: bonds would be his to take")
        if not all(type(units) is int and 0 < units < 2**96 for units in (self.most, self.bond)):
            raise Invalid("the highest price and the bond are positive")
        if not 0 < self.commit_until < self.reveal_until < self.bond_until < 2**40:
            raise Invalid("bids are committed, then revealed, then judged")
        encoding.hex_bytes(self.brief, 32)
        if not 0 < len(self.title) <= 120 or not self.title.isprintable():
            raise Invalid("a title is one line of at most 120 characters")

    @property
    def digest(self) -> str:
        return keccak(b"tessera/bounty\0" + encoding.encode(self.to_dict())).hex()

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in Bounty.__dataclass_fields__}

    @classmethod
    def from_dict(cls, value: object) -> Bounty:
        try:
            return cls(**value)  # type: ignore[arg-type]
        except TypeError as error:
            raise Invalid(f"this is no bounty: {error}") from error


@dataclass(frozen=True, slots=True)
class Bid:
    """A price that is hidden until it is revealed."""

    units: int
    salt: str = field(default_factory=lambda: secrets.token_hex(32))

    def commitment(self, bounty: Bounty, bidder: Account) -> str:
        """64 hex digits."""
        encoding.hex_bytes(self.salt, 32)
        return keccak(b"tessera/bid\0" + encoding.encode([bounty.digest, bidder, self.units, self.salt])).hex()


def commit_message(key: AccountKey, to: Account, bounty: Bounty, bid: Bid, bond_job: int, now: float) -> Message:
    """To be sent to the poster and to the referee."""
    body = {"bounty": bounty.digest, "commitment": bid.commitment(bounty, key.account), "bond_job": bond_job}
    return write_message(key, to, "commit", body, now)


def reveal_message(key: AccountKey, to: Account, bounty: Bounty, bid: Bid, now: float) -> Message:
    body = {"bounty": bounty.digest, "units": bid.units, "salt": bid.salt}
    return write_message(key, to, "reveal", body, now)


def bond_order(bounty: Bounty, bidder: Account, mandate: str) -> Order:
    """What a bidder orders to lock its bond: the same for every bid of this bidder, under whatever mandate."""
    bid = {"bounty": bounty.digest, "bidder": bidder}
    return Order(
        intent=keccak(b"tessera/bond\0" + encoding.encode([bounty.digest, bidder])).hex(), mandate=mandate,
        provider=bounty.poster, evaluator=bounty.referee, price=Amount(bounty.bond, bounty.asset),
        deadline=bounty.bond_until, title="Bond of a bidder", brief=Brief("bond", bounty.title, bid), on_silence=REFUND,
    )  # fmt: skip


async def bond_holds(jobs: Jobs, bounty: Bounty, bidder: Account, bond_job: int) -> bool:
    """Whether this job is the bidder's bond for this bounty, and the money is there."""
    if bidder in (bounty.poster, bounty.referee):
        return False
    terms = bond_order(bounty, bidder, "").terms(bidder)
    if await jobs.of(terms) != bond_job:
        return False
    job = await jobs.agreed(bond_job, terms)
    return job is not None and job.status == JobStatus.FUNDED


def bond_service(auction: Auction, clock: Clock) -> Service:
    """For the poster's `Seller`, under the kind "bond"."""

    async def claim(brief: Brief) -> bytes:
        now = clock.time()
        if now < auction.bounty.reveal_until:
            raise Late("bids are still revealed")  # looked at again
        bidder = brief.inputs.get("bidder")
        if brief.inputs.get("bounty") != auction.bounty.digest or bidder not in auction.forfeits(now):
            raise Refused("nothing to claim: the bidder has the bond back", rule="revealed")
        return encoding.encode(brief.inputs)

    return Service(auction.bounty.bond, claim, notice_s=0, on_silence=REFUND)


def bond_judge(auction: Auction, clock: Clock) -> Judge:
    """For the referee's `Evaluator`, under the kind "bond": he believes his own book."""

    async def judge(brief: Brief, work: bytes) -> str:
        if brief.inputs.get("bounty") != auction.bounty.digest or clock.time() < auction.bounty.reveal_until:
            return "no bond of this bounty, or not yet"
        return "" if brief.inputs.get("bidder") in auction.forfeits(clock.time()) else "the bid was revealed"

    return judge


@dataclass(frozen=True, slots=True)
class _Sealed:
    commitment: str
    bond_job: int
    order: int  # who came first, where two prices are equal


class Auction:
    """What poster or referee keeps of one bounty. No input or output: who takes a message says when it came.

    Args:
        owner: whose messages these are.
    """

    def __init__(self, bounty: Bounty, owner: Account) -> None:
        self.bounty, self._owner = bounty, owner
        self._sealed: dict[Account, _Sealed] = {}
        self._open: dict[Account, int] = {}  # revealed prices
        self._wrong: set[Account] = set()

    def commit(self, message: Message, now: float, *, bonded: bool) -> None:
        """Take a sealed bid.

        Args:
            bonded: whether `bond_holds`.

        Raises: Late; Refused without a bond; Conflict for a second bid, or a commitment that somebody else made first.
        """
        body = self._read(message, now, "commit", {"bounty", "commitment", "bond_job"})
        if now >= self.bounty.commit_until:
            raise Late(f"bids were taken until {self.bounty.commit_until}")
        if not bonded:
            raise Refused("there is no bond for this bid", rule="bond")
        encoding.hex_bytes(body["commitment"], 32)
        if message.sender in self._sealed or len(self._sealed) >= MOST_BIDDERS:
            raise Conflict("one bid of each bidder, and no more than there is room for")
        if any(sealed.commitment == body["commitment"] for sealed in self._sealed.values()):
            raise Conflict("this commitment is somebody else's")
        self._sealed[message.sender] = _Sealed(body["commitment"], int(body["bond_job"]), len(self._sealed))

    def reveal(self, message: Message, now: float) -> None:
        """Open a bid. A wrong opening is final, or bidders would try what others have opened.

        Raises: Late, also when it is too early; Refused with the rule "reveal" for a wrong one; Conflict for a second.
        """
        body = self._read(message, now, "reveal", {"bounty", "units", "salt"})
        if not self.bounty.commit_until <= now < self.bounty.reveal_until:
            raise Late(f"bids are revealed from {self.bounty.commit_until} until {self.bounty.reveal_until}")
        sealed = self._sealed.get(message.sender)
        if sealed is None:
            raise Refused("there is no sealed bid of this sender", rule="no_commitment")
        if message.sender in self._open or message.sender in self._wrong:
            raise Conflict("this bid is revealed")
        units, salt = body["units"], body["salt"]
        fits = type(units) is int and 0 < units <= self.bounty.most and isinstance(salt, str)
        if not fits or not _opens(Bid(units, salt), self.bounty, message.sender, sealed.commitment):
            self._wrong.add(message.sender)
            raise Refused("this is not what was committed to", rule="reveal")
        self._open[message.sender] = units

    def award(self, now: float) -> list[tuple[Account, int]]:
        """Who may do it, the one to ask first, first: lowest price, then who came first. Raises: Conflict too early."""
        self._check_over(now)
        ranked = sorted(self._open.items(), key=lambda bid: (bid[1], self._sealed[bid[0]].order))
        return list(ranked)

    def forfeits(self, now: float) -> Mapping[Account, int]:
        """Bond jobs of those who have revealed nothing, or something else, by bidder. Raises: Conflict too early."""
        self._check_over(now)
        return {bidder: sealed.bond_job for bidder, sealed in self._sealed.items() if bidder not in self._open}

    def _read(self, message: Message, now: float, kind: str, fields: set[str]) -> dict[str, Any]:
        message.verify(self._owner, now)
        body = message.value()
        if message.kind != kind or body.keys() != fields or body["bounty"] != self.bounty.digest:
            raise Invalid(f"this is no {kind} for this bounty")
        if "bond_job" in fields and (type(body["bond_job"]) is not int or body["bond_job"] <= 0):
            raise Invalid("a bond is a job's number")
        return body

    def _check_over(self, now: float) -> None:
        if now < self.bounty.reveal_until:
            raise Conflict(f"bids are revealed until {self.bounty.reveal_until}")


def _opens(bid: Bid, bounty: Bounty, bidder: Account, commitment: str) -> bool:
    try:
        return bid.commitment(bounty, bidder) == commitment
    except Invalid:
        return False

"""What a run looks like at one moment: the data behind the page and the terminal view, and the feed that brings it.

A snapshot is immutable, complete and ready for JSON. Invariants: money and shares are integers of the smallest unit;
text that came from a peer holds no control characters and has a bounded length; a number that is not finite is absent.
Numbers that somebody can check carry what proves them: an account, an epoch's root, a transaction.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, get_args

import anyio

from tessera.core.errors import Invalid

__all__ = [
    "RECENT_LIMIT", "Boundary", "Epoch", "Event", "Feed", "Income", "LossPoint", "Model", "Owner", "Payment", "Peer",
    "Phase", "Snapshot", "SnapshotFeed", "Status", "Urls", "printable", "thinned",
]  # fmt: skip

Phase = Literal["starting", "seating", "training", "serving", "closed"]
Status = Literal["up", "down", "waiting", "left"]

NOTE_LIMIT = 300  # characters of a note, an event, a name
SAMPLE_LIMIT = 4_000  # characters of a sample
RECENT_LIMIT = 50  # payments and events that a snapshot carries; the newest stay
LOSS_LIMIT = 8_192  # points of the curve; use `thinned` for longer ones
SHARE_DECIMALS = 18


@dataclass(frozen=True, slots=True)
class Model:
    """What is being trained."""

    params: int = 0
    stages: int = 0
    vocab: int = 0
    width: int = 0
    codec: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        _clean(self, "codec", "name")


@dataclass(frozen=True, slots=True)
class LossPoint:
    """Loss in nats per token after `step` optimiser steps; `val` only where it was evaluated."""

    step: int
    tokens: int
    train: float | None
    val: float | None = None

    def __post_init__(self) -> None:
        _finite(self, "train", "val")


@dataclass(frozen=True, slots=True)
class Boundary:
    """What crossed between stage `index` and the next, both ways, headers included."""

    index: int
    bytes_per_token: float | None = None
    bytes_total: int = 0

    def __post_init__(self) -> None:
        _finite(self, "bytes_per_token")


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker as the host and the chain see it.

    Attributes:
        shares: all it was given, leaves that it has not redeemed included: the sum over holders is what was minted.
        claimable: income that waits for it, for leaves that it has not redeemed too.
        transaction: the last one that paid it, or empty.
    """

    peer: str
    account: str
    stage: int | None = None
    role: str = "worker"
    status: Status = "waiting"
    verified_tokens: int = 0
    shares: int = 0
    claimable: int = 0
    claimed: int = 0
    rtt_ms: float | None = None
    transaction: str = ""

    def __post_init__(self) -> None:
        _one_of("status", self.status, get_args(Status))
        _finite(self, "rtt_ms")
        _clean(self, "peer", "account", "role")


@dataclass(frozen=True, slots=True)
class Owner:
    """Somebody who owns shares without computing: role `data` or `creator`. Fields as a peer's."""

    account: str
    role: str
    shares: int = 0
    claimed: int = 0
    claimable: int = 0
    transaction: str = ""

    def __post_init__(self) -> None:
        _clean(self, "account", "role")


@dataclass(frozen=True, slots=True)
class Epoch:
    """A payout period that was posted: its Merkle root, the shares it minted, and the peers whose signatures it has."""

    number: int
    root: str
    shares: int
    transaction: str
    signers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Income:
    """What buyers paid and where it is, in the smallest unit of `asset`; all read from the chain.

    Attributes:
        undistributed: arrived and not yet spread over the shares.
        dust: remainder that the contract carries until it can be spread.
        contract: the share contract that holds it.
    """

    revenue: int = 0
    claimed: int = 0
    unclaimed: int = 0
    undistributed: int = 0
    dust: int = 0
    requests_paid: int = 0
    asset: str = "tUSD"
    decimals: int = 6
    contract: str = ""

    def __post_init__(self) -> None:
        _clean(self, "asset")

    @property
    def accounted(self) -> int:
        return self.claimed + self.unclaimed + self.undistributed + self.dust

    @property
    def adds_up(self) -> bool:
        return self.accounted == self.revenue


@dataclass(frozen=True, slots=True)
class Payment:
    """One request that was paid. `time` in seconds since 1970."""

    transaction: str
    payer: str
    units: int
    time: float


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, in one sentence. `time` in seconds since 1970."""

    time: float
    text: str
    transaction: str = ""

    def __post_init__(self) -> None:
        _clean(self, "text")


@dataclass(frozen=True, slots=True)
class Urls:
    """Where to reach what: empty until it runs."""

    gateway: str = ""
    page: str = ""
    chain: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of a run. Sequences may be given as lists; payments and events are oldest first.

    Attributes:
        phase_note: what it is doing now, in a few words that change seldom.
        sample: what the model wrote when it was asked `sample_prompt`.
        total_shares: what the chain says was minted, unredeemed leaves included.
    """

    run_id: str = ""
    chain_id: int = 0
    phase: Phase = "starting"
    phase_note: str = ""
    model: Model = field(default_factory=Model)
    step: int = 0
    steps: int = 0
    tokens: int = 0
    tokens_per_s: float | None = None
    losses: Sequence[LossPoint] = ()
    unigram_loss: float | None = None
    bigram_loss: float | None = None
    wire_bytes_per_token: float | None = None
    dense_bytes_per_token: float | None = None
    boundaries: Sequence[Boundary] = ()
    peers: Sequence[Peer] = ()
    owners: Sequence[Owner] = ()
    epochs: Sequence[Epoch] = ()
    income: Income = field(default_factory=Income)
    payments: Sequence[Payment] = ()
    sample: str = ""
    events: Sequence[Event] = ()
    urls: Urls = field(default_factory=Urls)
    total_shares: int = 0
    sample_prompt: str = ""

    def __post_init__(self) -> None:
        _one_of("phase", self.phase, get_args(Phase))
        _finite(self, "tokens_per_s", "unigram_loss", "bigram_loss", "wire_bytes_per_token", "dense_bytes_per_token")
        _clean(self, "phase_note")
        for name in ("sample", "sample_prompt"):
            object.__setattr__(self, name, printable(getattr(self, name), SAMPLE_LIMIT, lines=True))
        if len(self.losses) > LOSS_LIMIT:
            raise Invalid(f"a snapshot carries at most {LOSS_LIMIT} loss points, not {len(self.losses)}: use thinned()")
        for name in ("losses", "boundaries", "peers", "owners", "epochs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("payments", "events"):
            object.__setattr__(self, name, tuple(getattr(self, name))[-RECENT_LIMIT:])

    @property
    def train_loss(self) -> float | None:
        """The newest one measured."""
        return next((point.train for point in reversed(self.losses) if point.train is not None), None)

    @property
    def val_loss(self) -> float | None:
        """The newest one measured."""
        return next((point.val for point in reversed(self.losses) if point.val is not None), None)

    @property
    def holders(self) -> tuple[Peer | Owner, ...]:
        """Everybody who may hold shares: workers, then the other owners."""
        return (*self.peers, *self.owners)

    @property
    def held_shares(self) -> int:
        """Shares of all of them; equals `total_shares` when the table adds up."""
        return sum(holder.shares for holder in self.holders)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Integers stay exact; shares exceed 2^53, so a reader needs big integers."""
        return asdict(self)


class Feed(Protocol):
    """Where views get snapshots from."""

    def snapshot(self) -> Snapshot:
        """The newest one."""
        ...

    def changes(self) -> AsyncGenerator[Snapshot, None]:
        """The newest one at once, then each time it changed; a slow reader skips to the newest. Ends with the feed.

        Read it within `contextlib.aclosing`, so that a reader who leaves early leaves nothing behind.
        """
        ...


class SnapshotFeed:
    """A feed in memory: one publisher, any number of readers, and nothing queued for any of them.

    To be used from one event loop; `publish` and `close` may also be called before it starts.
    """

    def __init__(self, first: Snapshot | None = None) -> None:
        self._newest = first or Snapshot()
        self._version = 1
        self._closed = False
        self._waiting: set[anyio.Event] = set()

    def publish(self, snapshot: Snapshot) -> None:
        """Make it the newest. One that is equal wakes nobody. Raises: Invalid after `close`."""
        if self._closed:
            raise Invalid("this feed is closed: nothing more can be published")
        if snapshot != self._newest:
            self._newest = snapshot
            self._version += 1
            self._wake()

    def close(self) -> None:
        """No more changes: readers end once they have seen the newest one."""
        self._closed = True
        self._wake()

    def snapshot(self) -> Snapshot:
        return self._newest

    async def changes(self) -> AsyncGenerator[Snapshot, None]:
        seen = 0
        while True:
            while self._version == seen and not self._closed:
                await self._changed()
            if self._version == seen:
                return
            seen = self._version
            yield self._newest

    async def _changed(self) -> None:
        event = anyio.Event()
        self._waiting.add(event)
        try:
            await event.wait()
        finally:
            self._waiting.discard(event)

    def _wake(self) -> None:
        for event in self._waiting:
            event.set()


def thinned(points: Sequence[LossPoint], limit: int = 1_024) -> tuple[LossPoint, ...]:
    """At most about `limit` points that keep the curve's shape: every 2^n-th, each evaluated one, and the last.

    The stride doubles as the curve grows, so a longer curve keeps what a shorter one showed, or half of it.
    When evaluations alone exceed the limit, they are thinned as well.
    """
    stride = 1
    while len(points) > limit * stride:
        stride *= 2
    every_val = sum(point.val is not None for point in points) <= limit
    last = len(points) - 1
    return tuple(
        point
        for index, point in enumerate(points)
        if index % stride == 0 or index == last or (every_val and point.val is not None)
    )


def printable(text: str, limit: int = NOTE_LIMIT, *, lines: bool = False) -> str:
    """`text` without anything that moves a cursor, hides or reorders characters; cut at `limit`.

    Args:
        lines: keep line ends and tabs.

    >>> printable("a\\x1b[31mb\\n")
    'a�[31mb '
    """
    kept = "\n\t" if lines else ""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(char if char in kept or _harmless(char) else " " if char in "\r\n\t" else "�" for char in cut)


def _harmless(char: str) -> bool:
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _clean(record: Any, *names: str) -> None:
    for name in names:
        object.__setattr__(record, name, printable(getattr(record, name)))


def _finite(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if value is not None and not math.isfinite(value):
            object.__setattr__(record, name, None)


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise Invalid(f"a {what} is one of {', '.join(allowed)}, not {value!r}")

"""Facts: what the events of contracts say, each with the transaction that proves it.

A `Reducer` is the pure part: for each kind of event a function that says what it means. A `Source` is a reducer bound
to a deployed contract. Every event of a contract's ABI is either reduced or named as silent, which a test checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tessera.chain.face import Event
from tessera.chain.types import Log, Topic
from tessera.core.errors import Invalid
from tessera.core.ids import Account, parse_account

__all__ = ["Fact", "Place", "Reducer", "Said", "Source", "Value", "item_id"]

Value = str | int | bool | Sequence[str]
Place = tuple[int, int, str, int]  # block, log, source, part


class Said(NamedTuple):
    """What an event says; where it happened is added by the `Source`.

    `amount` adds up: for the kind, for the account and for the item.
    """

    kind: str
    account: str = ""  # empty where nobody in particular is meant
    item: str = ""  # what it is about: an epoch, a job, an agent
    amount: int = 0
    detail: Mapping[str, Value] = {}


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that happened."""

    source: str  # the name of the `Source`
    kind: str
    account: str
    item: str
    amount: int
    detail: Mapping[str, Any]
    block: int
    log_index: int
    part: int  # one event may say several things
    tx_hash: str
    time: int  # of the block, seconds since 1970

    @property
    def place(self) -> Place:
        """Later facts compare greater."""
        return self.block, self.log_index, self.source, self.part


@dataclass(frozen=True, slots=True)
class Reducer:
    """One contract's meaning.

    Args:
        name: the contract's artifact.
        says: what each event means. The functions must depend on nothing but the event.
        silent: the events that say nothing; they are not even asked for.
        version: another number than the stored one makes the tables be built again.
    """

    name: str
    says: Mapping[type[Event], Callable[[Any], Iterable[Said]]]
    silent: Sequence[type[Event]] = ()
    version: int = 1

    def at(self, address: str, narrow: Sequence[Topic] = (), name: str = "") -> Source:
        """The reducer for one deployed contract.

        Args:
            narrow: the indexed fields wanted, by position; None matches anything.
            name: another than the contract's, where one index follows two of a kind.
        """
        topics = (tuple(kind.TOPIC for kind in self.says), *narrow)
        return Source(name or self.name, parse_account(address), self, topics)


@dataclass(frozen=True, slots=True)
class Source:
    """A reducer bound to a contract; `topics` is what to ask a node for."""

    name: str
    address: Account
    reducer: Reducer
    topics: tuple[Topic, ...]
    _kinds: dict[bytes, type[Event]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_kinds", {kind.TOPIC: kind for kind in self.reducer.says})

    def facts(self, log: Log, time: int) -> list[Fact]:
        """What one log says, whose block is of this time. Raises `Invalid` for a log that is not of this contract."""
        kind = self._kinds.get(log.topics[0]) if log.topics else None
        if kind is None or log.address != self.address:
            raise Invalid(f"a log of {log.address} at block {log.block_number} is none of {self.name}'s")
        said = self.reducer.says[kind](kind.decode(log))
        place = log.block_number, log.log_index
        return [Fact(self.name, *what, *place, part, log.tx_hash, time) for part, what in enumerate(said)]


def item_id(value: int | bytes) -> str:
    """An id as an `item`: decimal, or 0x and hex digits."""
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)

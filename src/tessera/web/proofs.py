"""The small pages behind the numbers: what a transaction, an account, an epoch or a peer has to do with this run.

Each shows what the snapshot knows, then what `Lookup` finds on the chain. Invariants: an id has its form before
anybody is asked about it; an answer is bounded in time, rows and characters, whoever gives it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import anyio

from tessera.core.errors import Invalid, Late, Missing
from tessera.core.ids import parse_account, parse_peer_id
from tessera.devnet.figures import count, money, percent_down, shares_down
from tessera.devnet.snapshot import Epoch, Snapshot, printable
from tessera.web.render import TRANSACTION

__all__ = ["Fact", "Group", "Kind", "Lookup", "bounded", "checked_id", "proof"]

Kind = Literal["tx", "account", "epoch", "peer"]
Lookup = Callable[[Kind, str], Awaitable[Mapping[str, Any] | None]]
"""What the chain, or whoever knows, says about (kind, id); None for nothing.

Keys are names for people, with spaces or underscores; values are text, whole numbers, yes or no, nested mappings (a
group of their own) and lists of mappings (a table). Amounts come as text with their unit. A value under a key with
`transaction` in its name links to that transaction; addresses always link.
"""

LOOKUP_S = 10.0
ROWS = 200
TEXT = 2_000  # characters of one value
EPOCHS = 10**9


@dataclass(frozen=True, slots=True)
class Fact:
    """A name and its values, mostly one."""

    name: str
    values: Sequence[object]


@dataclass(frozen=True, slots=True)
class Group:
    """Facts under a title; `table` holds rows with the same names instead."""

    title: str
    facts: Sequence[Fact] = ()
    table: Sequence[Sequence[Fact]] = ()


def checked_id(kind: Kind, text: str) -> str:
    """The canonical form. Raises: Invalid for anything that cannot be a `kind`."""
    if kind == "account":
        return parse_account(text)
    if kind == "peer":
        return parse_peer_id(text)
    if kind == "epoch":
        if not (text.isascii() and text.isdecimal() and len(text) <= 9):
            raise Invalid(f"an epoch is a number below {EPOCHS}, not {text[:40]!r}")
        return str(int(text))
    lowered = text.lower()
    if TRANSACTION.fullmatch(lowered) is None:
        raise Invalid(f"a transaction is 0x and 64 hex digits, not {text[:80]!r}")
    return lowered


async def proof(snapshot: Snapshot, lookup: Lookup | None, kind: Kind, name: str) -> list[Group]:
    """Everything known about `name`, which `checked_id` returned.

    Raises: Missing when nobody knows it; Late when the chain takes too long; what `lookup` raises.
    """
    groups = list(_LOCAL[kind](snapshot, name))
    if lookup is not None:
        try:
            with anyio.fail_after(LOOKUP_S):
                found = await lookup(kind, name)
        except TimeoutError:
            raise Late(f"the chain did not answer within {LOOKUP_S:g} s") from None
        if found:
            groups += _from_mapping("On the chain", found)
    if not groups:
        raise Missing(f"this run knows no {kind} {name}")
    return groups


def bounded(lookup: Lookup, limit: int = 8) -> Lookup:
    """At most `limit` questions to the chain at once; the others wait, within their deadline."""
    turn = anyio.Semaphore(limit)

    async def ask(kind: Kind, name: str) -> Mapping[str, Any] | None:
        async with turn:
            return await lookup(kind, name)

    return ask


def _transaction(snapshot: Snapshot, name: str) -> Iterable[Group]:
    for epoch in snapshot.epochs:
        if epoch.transaction == name:
            yield _epoch_group(epoch)
    for payment in snapshot.payments:
        if payment.transaction == name:
            yield _group("A request paid", {"payer": payment.payer, "amount": money(payment.units, snapshot.income)})
    for holder in snapshot.holders:
        if holder.transaction == name:
            yield _group(
                "Income paid out", {"to": holder.account, "claimed so far": money(holder.claimed, snapshot.income)}
            )
    for event in snapshot.events:
        if event.transaction == name:
            yield _group("In the log", {"event": event.text})


def _account(snapshot: Snapshot, name: str) -> Iterable[Group]:
    income = snapshot.income
    for holder in snapshot.holders:
        if holder.account == name:
            facts: dict[str, object] = {
                "role": holder.role,
                "shares": shares_down(holder.shares, 18),
                "part of all": percent_down(holder.shares, snapshot.total_shares),
                "claimable": money(holder.claimable, income),
                "claimed": money(holder.claimed, income),
                "last paid by transaction": holder.transaction or None,
            }
            yield _group("In this run", facts)
    for peer in snapshot.peers:
        if peer.account == name:
            yield _group(
                "Its worker", {"stage": peer.stage, "peer": peer.peer, "verified tokens": count(peer.verified_tokens)}
            )
    if income.contract == name:
        parts = {
            part: money(getattr(income, part), income) for part in ("claimed", "unclaimed", "undistributed", "dust")
        }
        yield _group("The share contract of this run", {"revenue": money(income.revenue, income), **parts})
    paid = [payment for payment in snapshot.payments if payment.payer == name]
    if paid:
        rows = [{"transaction": payment.transaction, "amount": money(payment.units, income)} for payment in paid]
        yield _table("Recent payments for requests", rows)


def _peer(snapshot: Snapshot, name: str) -> Iterable[Group]:
    for peer in snapshot.peers:
        if peer.peer == name:
            facts: dict[str, object] = {
                "stage": peer.stage,
                "status": peer.status,
                "account": peer.account,
                "verified tokens": count(peer.verified_tokens),
                "shares": shares_down(peer.shares, 18),
                "round trip": None if peer.rtt_ms is None else f"{peer.rtt_ms:.2f} ms",
            }
            yield _group("In this run", facts)
    signed = [
        {"epoch": epoch.number, "transaction": epoch.transaction} for epoch in snapshot.epochs if name in epoch.signers
    ]
    if signed:
        yield _table("Epochs it signed", signed)


def _epoch(snapshot: Snapshot, name: str) -> Iterable[Group]:
    return (_epoch_group(epoch) for epoch in snapshot.epochs if epoch.number == int(name))


def _epoch_group(epoch: Epoch) -> Group:
    facts = [
        Fact("shares minted", [shares_down(epoch.shares, 18)]),
        Fact("Merkle root", [epoch.root]),
        Fact("transaction", [epoch.transaction or None]),
        Fact("signers", list(epoch.signers) or [None]),
    ]
    return Group(f"Epoch {epoch.number}", facts)


_LOCAL: dict[Kind, Callable[[Snapshot, str], Iterable[Group]]] = {
    "tx": _transaction, "account": _account, "epoch": _epoch, "peer": _peer,
}  # fmt: skip


def _from_mapping(title: str, found: Mapping[str, Any]) -> list[Group]:
    plain: dict[str, object] = {}
    groups: list[Group] = []
    for key, value in list(found.items())[:ROWS]:
        name = printable(str(key)).replace("_", " ")
        if isinstance(value, Mapping):
            groups.append(_group(name, value))
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            groups.append(_table(name, value))
        else:
            plain[name] = value
    return [_group(title, plain), *groups] if plain else groups


def _group(title: str, facts: Mapping[str, object]) -> Group:
    return Group(title, _facts(facts))


def _table(title: str, rows: Sequence[Mapping[str, object]]) -> Group:
    return Group(title, table=[_facts(row) for row in rows[:ROWS] if isinstance(row, Mapping)])


def _facts(mapping: Mapping[str, object]) -> list[Fact]:
    return [
        Fact(printable(str(name)).replace("_", " "), _values(value)) for name, value in list(mapping.items())[:ROWS]
    ]


def _values(value: object) -> list[object]:
    values = list(value)[:ROWS] if isinstance(value, list | tuple) else [value]
    return [one if one is None or isinstance(one, bool | int) else printable(str(one), TEXT) for one in values]

"""What a transaction would do, tried on a copy of the chain before anybody signs it.

    found = await simulate(chain, Planned(purse, shop, data), Claim(pays=(Pay(coin, shop, 500),)))
    guard.admit("buy", arguments, found)          # "differs" is refused, "unknown" asked about

A transaction says nothing about itself that must be true, and neither do its events. So what leaves the payer is
measured: balances, allowances, and who owns what, read before and after in the same copy; events only say where to
look. An embedded chain and any node with `eth_simulateV1` can be asked; of others nothing is known.

Invariants: whatever leaves the payer and is not in the claim makes the verdict "differs"; so does a payee that gets
less than left, a transaction that fails, and a coin that comes in and cannot leave again. What cannot be read is
"unknown". Between this look and the block others may act: the mandate's caps hold for what is signed, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from eth_abi.abi import encode as abi_encode

from tessera.core.errors import Invalid, Late, Refused, TesseraError, Unavailable
from tessera.core.hashing import keccak, sha256
from tessera.core.ids import Account, parse_account

__all__ = ["NATIVE", "Claim", "Pay", "Planned", "SimulatedChain", "Simulation", "simulate"]

NATIVE = Account("0x" + "00" * 20)  # the network's own coin, in place of a contract
PROBE = Account("0x" + "70" * 20)  # whom a coin that came in is sent to, to see whether it can leave
WATCHED_LIMIT = 40  # things that one transaction touches; one that does more is not understood
Verdict = Literal["same", "differs", "unknown"]

_TRANSFER = keccak(b"Transfer(address,address,uint256)").hex()
_APPROVAL = keccak(b"Approval(address,address,uint256)").hex()
_FOR_ALL = keccak(b"ApprovalForAll(address,address,bool)").hex()
_SINGLE = keccak(b"TransferSingle(address,address,address,uint256,uint256)").hex()
_BATCH = keccak(b"TransferBatch(address,address,address,uint256[],uint256[])").hex()
_OWNER = keccak(b"OwnershipTransferred(address,address)").hex()


class SimulatedChain(Protocol):
    """A chain's JSON-RPC; `chain.client.RpcChain` is one."""

    async def request(self, method: str, params: list[Any]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Planned:
    """A transaction before it is signed. The payer is `sender`."""

    sender: Account
    to: Account
    data: bytes
    wei: int = 0

    @property
    def digest(self) -> str:
        """What was looked at: only this may be signed afterwards."""
        words = abi_encode(
            ["address", "address", "bytes", "uint256"], [self.sender, self.to, self.data, self.wei]
        )  # fmt: skip
        return sha256(b"tessera/planned\0", words).hex()


@dataclass(frozen=True, slots=True)
class Pay:
    """At most so many units of a coin leave, and `payee` gets all that leaves."""

    coin: Account  # its contract, or NATIVE
    payee: Account
    units: int


@dataclass(frozen=True, slots=True)
class Claim:
    """All that a call says its transaction takes from the payer.

    Args:
        approves: allowances that it gives: coin, spender, units.
        receives: coins that come in, which must be able to leave again: a coin that only its maker can sell is none.
    """

    pays: tuple[Pay, ...] = ()
    approves: tuple[Pay, ...] = ()
    receives: tuple[Account, ...] = ()


@dataclass(frozen=True, slots=True)
class Simulation:
    """What was found. `findings` are what is not as the call says, in words that a person reads."""

    verdict: Verdict
    leaves: tuple[str, ...]
    findings: tuple[str, ...]
    digest: str

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "leaves": list(self.leaves), "findings": list(self.findings),
                "transaction": self.digest}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _View:
    """One question, asked before and after. `kind` is balance, allowance, operator, owner or holder."""

    kind: str
    contract: Account
    who: Account
    what: Any = None

    def call(self) -> dict[str, str]:
        name, types, values = {
            "balance": ("balanceOf", ["address"], [self.who]),
            "allowance": ("allowance", ["address", "address"], [self.who, self.what]),
            "operator": ("isApprovedForAll", ["address", "address"], [self.who, self.what]),
            "approved": ("getApproved", ["uint256"], [self.what]),
            "holder": ("ownerOf", ["uint256"], [self.what]),
            "lot": ("balanceOf", ["address", "uint256"], [self.who, self.what]),
            "owner": ("owner", [], []),
        }[self.kind]
        return _call(self.who, self.contract, _data(name, types, values))


async def simulate(chain: SimulatedChain, planned: Planned, claim: Claim) -> Simulation:
    """Try a transaction. Raises nothing that a node causes: what is not known is "unknown".

    Cost: two requests.
    """
    main = _call(planned.sender, planned.to, planned.data, planned.wei)
    try:
        (first,) = await _run(chain, [main])
        if not _ok(first):
            return _found(planned, "differs", [], [f"it fails: {_reason(first)}"])
        views = _views(planned, claim, first)
        asked = [view.call() for view in views]
        results = await _run(chain, [*asked, main, *asked])
        before, after = _words(results[: len(asked)]), _words(results[len(asked) + 1 :])
        if not _ok(results[len(asked)]):
            return _found(planned, "differs", [], ["it fails when it is tried a second time"])
        leaves, findings, unread = _compare(planned, claim, views, before, after)
        findings += await _stuck(chain, main, planned, claim, views, before, after)
    except (Invalid, Unavailable, Late, Refused) as error:
        return _found(planned, "unknown", [], [_why(error)])
    return _found(planned, "differs" if findings else "unknown" if unread else "same", leaves, findings or unread)


# --- where to look ----------------------------------------------------------------------------------------------------


def _views(planned: Planned, claim: Claim, first: dict[str, Any]) -> list[_View]:
    """Whatever the call names, whatever the transaction calls, and whatever its events speak of."""
    me = planned.sender
    coins = {planned.to, *claim.receives, *(pay.coin for pay in (*claim.pays, *claim.approves))} - {NATIVE}
    views = {_View("allowance", pay.coin, me, pay.payee) for pay in claim.approves}
    for event in _logs(first):
        contract, topics = event
        coins.add(contract)
        views |= set(_spoken_of(contract, topics, me))
    payees = {pay.payee for pay in claim.pays}
    views |= {_View("balance", coin, who) for coin in coins for who in {me, *payees}}
    if len(views) > WATCHED_LIMIT:
        raise Invalid(f"the transaction touches {len(views)} things, at most {WATCHED_LIMIT} are looked at")
    return sorted(views, key=lambda view: (view.kind, view.contract, view.who, str(view.what)))


def _spoken_of(contract: Account, topics: Sequence[str], me: Account) -> Iterable[_View]:
    kind = topics[0] if topics else ""
    named = [_account_of(topic) for topic in topics[1:3]]
    if kind == _TRANSFER and len(topics) == 4:
        yield _View("holder", contract, me, int(topics[3], 16))
    elif kind == _APPROVAL and len(topics) == 4:
        yield _View("approved", contract, me, int(topics[3], 16))
    elif kind == _APPROVAL and named[:1] == [me]:
        yield _View("allowance", contract, me, named[1])
    elif kind == _FOR_ALL and named[:1] == [me]:
        yield _View("operator", contract, me, named[1])
    elif kind == _OWNER and named[:1] == [me]:
        yield _View("owner", contract, me)
    elif kind in (_SINGLE, _BATCH) and me in [_account_of(topic) for topic in topics[2:3]]:
        raise Invalid("things of several kinds leave at once (ERC-1155): that is not read here")


# --- what was found ---------------------------------------------------------------------------------------------------


def _compare(
    planned: Planned, claim: Claim, views: list[_View], before: list[int | None], after: list[int | None]
) -> tuple[list[str], list[str], list[str]]:
    """What leaves, what of it is not in the claim, what could not be read."""
    leaves, findings, unread = [], [], []
    changes = {view: (old, new) for view, old, new in zip(views, before, after, strict=True)}
    for view, (old, new) in changes.items():
        if old is None and new is None:
            continue  # no contract of that kind
        if old is None or new is None:
            unread.append(f"{view.kind} at {view.contract} cannot be read")
        elif text := _loss(planned.sender, view, old, new):
            leaves.append(text)
            if not _is_claimed(claim, view, old, new, changes):
                findings.append(f"{text}, which the call does not say")
    if planned.wei:
        leaves.append(f"{planned.wei} wei to {planned.to}")
        claimed = sum(pay.units for pay in claim.pays if pay.coin == NATIVE and pay.payee == planned.to)
        if planned.wei > claimed:
            findings.append(f"{planned.wei} wei leave to {planned.to}, the call says {claimed}")
    return leaves, findings, unread


def _loss(me: Account, view: _View, old: int, new: int) -> str:
    """What the payer loses by a change, "" for nothing."""
    mine = int(me, 16)
    if view.kind == "balance" and view.who == me and new < old:
        return f"{old - new} units of {view.contract} leave"
    if view.kind == "allowance" and new > old:
        return f"{view.what} may take {new} units of {view.contract}"
    if view.kind == "operator" and new > old:
        return f"{view.what} may take everything at {view.contract}"
    if view.kind == "approved" and new not in (old, 0):
        return f"{_hex_account(new)} may take number {view.what} of {view.contract}"
    if view.kind in ("holder", "owner") and old == mine != new:
        thing = f"number {view.what} of {view.contract}" if view.kind == "holder" else f"{view.contract} itself"
        return f"{thing} goes to {_hex_account(new)}"
    return ""


def _is_claimed(
    claim: Claim, view: _View, old: int, new: int, changes: dict[_View, tuple[int | None, int | None]]
) -> bool:
    if view.kind == "allowance":
        return any((pay.coin, pay.payee) == (view.contract, view.what) and new <= pay.units for pay in claim.approves)
    if view.kind != "balance":
        return False
    pays = [pay for pay in claim.pays if pay.coin == view.contract]
    arrived = 0
    for payee in {pay.payee for pay in pays}:
        had, has = changes[_View("balance", view.contract, payee)]
        arrived += max((has or 0) - (had or 0), 0)
    return old - new <= min(sum(pay.units for pay in pays), arrived)


async def _stuck(
    chain: SimulatedChain, main: dict[str, str], planned: Planned, claim: Claim, views: list[_View],
    before: list[int | None], after: list[int | None],
) -> list[str]:  # fmt: skip
    """Coins that came in and cannot leave: each is sent on at once, in the same copy."""
    changes = dict(zip(views, zip(before, after, strict=True), strict=True))
    sends, came = [], []
    for coin in claim.receives:
        old, new = changes[_View("balance", coin, planned.sender)]
        if (units := (new or 0) - (old or 0)) <= 0:
            return [f"nothing of {coin} comes in"]
        came.append((coin, units))
        sends.append(_call(planned.sender, coin, _data("transfer", ["address", "uint256"], [PROBE, units])))
    if not sends:
        return []
    probes = [_View("balance", coin, PROBE).call() for coin, _ in came]
    results = await _run(chain, [main, *sends, *probes])
    sent, arrived = results[1 : 1 + len(sends)], _words(results[1 + len(sends) :])
    return [
        f"what comes in of {coin} cannot leave again: {_reason(result) if not _ok(result) else 'it does not arrive'}"
        for (coin, units), result, there in zip(came, sent, arrived, strict=True)
        if not _ok(result) or (there or 0) * 10 < units * 9  # a tenth may be a fee; what takes more is a trap
    ]


def _found(planned: Planned, verdict: Verdict, leaves: list[str], findings: list[str]) -> Simulation:
    return Simulation(verdict, tuple(leaves), tuple(findings), planned.digest)


# --- the node's words -------------------------------------------------------------------------------------------------


async def _run(chain: SimulatedChain, calls: list[dict[str, str]]) -> list[dict[str, Any]]:
    wanted = {"blockStateCalls": [{"calls": calls}], "validation": False}
    blocks = await chain.request("eth_simulateV1", [wanted, "latest"])
    try:
        results = [dict(result) for result in blocks[0]["calls"]]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise Invalid("the node's simulation cannot be read") from error
    if len(blocks) != 1 or len(results) != len(calls):
        raise Invalid(f"the node simulated {len(results)} calls, {len(calls)} were asked for")
    return results


def _ok(result: dict[str, Any]) -> bool:
    return result.get("status") == "0x1"


def _reason(result: dict[str, Any]) -> str:
    error = result.get("error")
    return str(error.get("message", "no reason"))[:200] if isinstance(error, dict) else "no reason given"


def _why(error: TesseraError) -> str:
    return f"it could not be tried: {error.message[:200]}"


def _logs(result: dict[str, Any]) -> list[tuple[Account, list[str]]]:
    try:
        return [
            (parse_account(log["address"]), [str(topic).removeprefix("0x").lower() for topic in log["topics"]])
            for log in result.get("logs", [])
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise Invalid("the node's simulated events cannot be read") from error


def _words(results: list[dict[str, Any]]) -> list[int | None]:
    """Each answer as one number; None where there is none."""
    values: list[int | None] = []
    for result in results:
        text = result.get("returnData")
        is_word = _ok(result) and isinstance(text, str) and len(text) == 66
        try:
            values.append(int(text, 16) if is_word and isinstance(text, str) else None)
        except ValueError as error:
            raise Invalid("the node's simulated answer is no hex") from error
    return values


def _call(sender: Account, to: Account, data: bytes, wei: int = 0) -> dict[str, str]:
    return {"from": sender, "to": to, "data": "0x" + data.hex(), "value": hex(wei)}


def _data(name: str, types: list[str], values: list[Any]) -> bytes:
    return keccak(f"{name}({','.join(types)})".encode())[:4] + abi_encode(types, values)


def _account_of(topic: str) -> Account | None:
    return parse_account("0x" + topic[-40:]) if len(topic) == 64 else None


def _hex_account(word: int) -> Account:
    return parse_account(f"0x{word & (1 << 160) - 1:040x}")

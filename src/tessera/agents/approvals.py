"""Approvals: a person's signature under one call, usable once, for a while.

What is signed (EIP-712) is the call itself: tool, arguments, mandate and nonce. So a wallet shows the person what will
happen, whatever a page says; arguments that change afterwards are another call; and a stolen operator's session, which
holds no approver's key, can deny but not approve.

Invariants: an approval is used at most once, in however many processes it is resumed at once; what was denied is not
used; nothing is used after it has expired.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select

from tessera.agents.intents import Intent
from tessera.agents.mandates import Mandate
from tessera.agents.tables import APPROVAL_GRANTS, APPROVAL_REQUESTS, APPROVAL_VERDICTS, LAYOUT
from tessera.core import encoding
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Conflict, Invalid, Late, Missing, Refused
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey, recover_account
from tessera.core.typed_data import domain, struct_hash, typed_digest
from tessera.storage.database import Transaction, open_database
from tessera.storage.location import MEMORY

__all__ = ["Answer", "Approval", "Approvals", "Call", "Request", "approve", "payment_call", "use_for"]

Answer = Literal["waiting", "expired", "denied", "used"]
LIFE_S = 3_600
BODY_LIMIT = 262_144  # bytes of a call and its evidence
NO_MANDATE = "00" * 32
_FIELDS = "string tool,string arguments,bytes32 mandate,bytes32 nonce"
_NAME, _VERSION = "Tessera approval", "1"
_DOMAIN = domain(_NAME, _VERSION)


@dataclass(frozen=True, slots=True)
class Call:
    """What somebody is asked to approve.

    Args:
        nonce: 64 hex digits: a payment's own nonce, or a random number, so that no two calls are alike.
    """

    tool: str
    arguments: Mapping[str, Any]
    mandate: str = NO_MANDATE
    nonce: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def text(self) -> str:
        """The arguments in their one spelling. Raises: Invalid for what has none."""
        return encoding.encode(dict(self.arguments)).decode()

    @property
    def digest(self) -> str:
        return struct_hash(f"Call({_FIELDS})", self._values()).hex()

    def signing_digest(self, expires_at: int) -> bytes:
        """The 32 bytes that the approver signs."""
        return typed_digest(_DOMAIN, f"Approval({_FIELDS},uint256 expiresAt)", (*self._values(), expires_at))

    def typed_data(self, expires_at: int) -> dict[str, Any]:
        """The same for a wallet: what `eth_signTypedData_v4` takes."""
        fields = [field.split() for field in f"{_FIELDS},uint256 expiresAt".split(",")]
        return {
            "domain": {"name": _NAME, "version": _VERSION},
            "types": {
                "EIP712Domain": [{"name": name, "type": "string"} for name in ("name", "version")],
                "Approval": [{"name": name, "type": kind} for kind, name in fields],
            },
            "primaryType": "Approval",
            "message": {
                "tool": self.tool, "arguments": self.text, "mandate": f"0x{self.mandate}", "nonce": f"0x{self.nonce}",
                "expiresAt": str(expires_at),
            },
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {"tool": self.tool, "arguments": dict(self.arguments), "mandate": self.mandate, "nonce": self.nonce}

    def _values(self) -> tuple[Any, ...]:
        return self.tool, self.text, bytes.fromhex(self.mandate), bytes.fromhex(self.nonce)


@dataclass(frozen=True, slots=True)
class Approval:
    """Signed consent to one call."""

    call: str  # its digest
    expires_at: int  # seconds since 1970
    signature: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """A call that waits for a person, with what the person should see."""

    call: Call
    evidence: Mapping[str, Any]
    expires_at: int


def approve(call: Call, key: AccountKey, expires_at: int) -> Approval:
    """Say yes, with the approver's key."""
    return Approval(call.digest, expires_at, key.sign_digest(call.signing_digest(expires_at)))


def payment_call(intent: Intent, mandate: Mandate) -> Call:
    """What is to be approved for a payment above the mandate's `approve_above`."""
    return Call("pay", intent.to_dict(), mandate.id, intent.nonce(mandate.agent).hex())


class Approvals:
    """The calls that wait, and what became of them; shared like the ledger, in the same tables.

    Args:
        approver: whose signature counts.
    """

    def __init__(
        self, approver: Account, where: str | Path = MEMORY, *, clock: Clock | None = None, schema: str = ""
    ) -> None:
        self.approver = parse_account(approver)
        self._clock = clock or SystemClock()
        self._db = open_database(where, LAYOUT, schema=schema, durability="full")

    def request(self, call: Call, evidence: Mapping[str, Any], life_s: int = LIFE_S) -> Request:
        """Write down that `call` waits."""
        now_ms = self._now_ms()
        request = Request(call, dict(evidence), now_ms // 1000 + life_s)
        body = encoding.encode({"call": call.to_dict(), "evidence": dict(evidence)})
        if len(body) > BODY_LIMIT:
            raise Invalid(f"a call and its evidence have {len(body)} bytes, at most {BODY_LIMIT} expected")
        row = {"call": call.digest, "body": body, "expires_at": request.expires_at, "at_ms": now_ms}
        self._db.apply(lambda db: db.add(APPROVAL_REQUESTS, [row]))
        return request

    def pending(self) -> list[Request]:
        """Those that nobody has answered yet, oldest first."""
        done, granted = select(APPROVAL_VERDICTS.c.call), select(APPROVAL_GRANTS.c.call)
        query = select(APPROVAL_REQUESTS).where(
            APPROVAL_REQUESTS.c.call.not_in(done), APPROVAL_REQUESTS.c.call.not_in(granted),
            APPROVAL_REQUESTS.c.expires_at * 1000 > self._now_ms(),
        )  # fmt: skip
        with self._db.read() as db:
            rows = db.execute(query.order_by(APPROVAL_REQUESTS.c.at_ms, APPROVAL_REQUESTS.c.call)).all()
        return [_request(row) for row in rows]

    def find(self, call: str) -> Request:
        """Raises: Missing."""
        with self._db.read() as db:
            row = db.execute(select(APPROVAL_REQUESTS).where(APPROVAL_REQUESTS.c.call == call)).first()
        if row is None:
            raise Missing(f"nobody asked for the call {call[:16]}…")
        return _request(row)

    def deny(self, call: str) -> None:
        """Say no, which needs no key. Raises: Missing; Conflict when it was used already."""
        self.find(call)
        self._db.apply(lambda db: _settle(db, call, "denied", self._now_ms()))

    def grant(self, approval: Approval) -> None:
        """Keep an approval for whoever waits for it.

        Raises: Missing when nobody does; Refused for another signer; Late; Conflict when it was denied or used.
        """
        call = self.find(approval.call).call
        _check(approval, call, self.approver, self._now_ms())
        row = {"call": approval.call, "signature": approval.signature, "expires_at": approval.expires_at}

        def work(db: Transaction) -> None:
            _check_open(db, approval.call)
            db.add(APPROVAL_GRANTS, [row | {"at_ms": self._now_ms()}])

        self._db.apply(work)

    def answer(self, call: str) -> Approval | Answer:
        """What became of a request: the approval, when there is one to use. Raises: Missing."""
        request = self.find(call)
        with self._db.read() as db:
            done = db.execute(select(APPROVAL_VERDICTS.c.kind).where(APPROVAL_VERDICTS.c.call == call)).scalar()
            grants = select(APPROVAL_GRANTS).where(APPROVAL_GRANTS.c.call == call)
            grant = db.execute(grants.order_by(APPROVAL_GRANTS.c.expires_at.desc())).first()
        if done is not None:
            return "used" if done == "used" else "denied"
        now_ms = self._now_ms()
        if grant is not None and now_ms < grant.expires_at * 1000:
            return Approval(call, grant.expires_at, grant.signature)
        return "waiting" if now_ms < request.expires_at * 1000 else "expired"

    def use(self, approval: Approval, call: Call) -> None:
        """Take the approval for `call`, which may be made after this returns, once.

        Raises: Refused for another call or signer; Late when it has expired; Conflict when it was used or denied.
        """
        self._db.apply(lambda db: _use(db, approval, call, self.approver, self._now_ms()))

    def close(self) -> None:
        self._db.close()

    def _now_ms(self) -> int:
        return int(self._clock.time() * 1000)


def use_for(db: Transaction, approval: Approval, intent: Intent, mandate: Mandate, now_ms: int) -> bool:
    """Use an approval for a payment inside the ledger's transaction. Raises what `Approvals.use` raises."""
    _use(db, approval, payment_call(intent, mandate), mandate.approver, now_ms)
    return True


def _use(db: Transaction, approval: Approval, call: Call, approver: Account, now_ms: int) -> None:
    _check(approval, call, approver, now_ms)
    _settle(db, approval.call, "used", now_ms)


def _check(approval: Approval, call: Call, approver: Account, now_ms: int) -> None:
    if approval.call != call.digest:
        raise Refused("the approval is for another call: tool, arguments, mandate or nonce differ", rule="other_call")
    if now_ms >= approval.expires_at * 1000:
        raise Late(f"the approval ended at {approval.expires_at}")
    signer = recover_account(call.signing_digest(approval.expires_at), approval.signature)
    if signer != approver:
        raise Refused(f"the approval is signed by {signer}, the approver is {approver}", rule="not_the_approver")


def _check_open(db: Transaction, call: str) -> None:
    done = db.execute(select(APPROVAL_VERDICTS.c.kind).where(APPROVAL_VERDICTS.c.call == call)).first()
    if done is not None:
        raise Conflict(f"the call was {done.kind} already")


def _settle(db: Transaction, call: str, kind: str, now_ms: int) -> None:
    _check_open(db, call)
    db.add(APPROVAL_VERDICTS, [{"call": call, "kind": kind, "at_ms": now_ms}])


def _request(row: Any) -> Request:
    body = encoding.decode(row.body, BODY_LIMIT)
    return Request(Call(**body["call"]), body["evidence"], row.expires_at)

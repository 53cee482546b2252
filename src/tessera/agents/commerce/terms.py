"""What client and provider agree on before money moves, and the phase that a job is in.

Terms have one canonical form; its hash is what the provider accepts by signature and what stands in the job's
description on the chain, so that neither can later mean another job. The brief (the request's text and its inputs)
travels by message; the terms hold its hash. Phases are ACP's, statuses are ERC-8183's:

    REQUEST, NEGOTIATION   nothing funded yet: Open, or not on the chain at all
    TRANSACTION            Funded
    EVALUATION             Submitted
    COMPLETED, REJECTED, EXPIRED

A text in terms or brief is a text: it grants nothing, whatever it says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from tessera.agents.mandates import parse_asset
from tessera.chain.jobs import PAY
from tessera.core import encoding
from tessera.core.amount import Amount
from tessera.core.errors import Invalid
from tessera.core.hashing import keccak, sha256
from tessera.core.ids import Account, parse_account
from tessera.incentives.escrow_twin import JobStatus

__all__ = ["BRIEF_LIMIT", "Brief", "Phase", "Terms", "named_in", "phase_of"]

BRIEF_LIMIT = 131_072  # bytes
TITLE_LIMIT = 120  # characters
WHOLE_BPS = 10_000
_HEX = re.compile(r"[0-9a-f]{64}")
_NAMES = re.compile(r"\nterms ([0-9a-f]{64}) intent ([0-9a-f]{64})\Z")


class Phase(IntEnum):
    """As ACP counts them."""

    REQUEST = 0
    NEGOTIATION = 1
    TRANSACTION = 2
    EVALUATION = 3
    COMPLETED = 4
    REJECTED = 5
    EXPIRED = 6


_PHASES = {
    JobStatus.FUNDED: Phase.TRANSACTION, JobStatus.SUBMITTED: Phase.EVALUATION, JobStatus.COMPLETED: Phase.COMPLETED,
    JobStatus.REJECTED: Phase.REJECTED, JobStatus.EXPIRED: Phase.EXPIRED,
}  # fmt: skip


def phase_of(status: JobStatus | None, answered: bool) -> Phase:
    """The phase of a job with this status (None: not on the chain); `answered` is whether the provider has spoken."""
    if status is None or status is JobStatus.OPEN:
        return Phase.NEGOTIATION if answered else Phase.REQUEST
    return _PHASES[status]


@dataclass(frozen=True, slots=True)
class Brief:
    """What is to be done: the kind of work, a text, and named inputs in canonical values."""

    kind: str
    text: str
    inputs: dict[str, Any]

    @property
    def hash(self) -> str:
        """Raises: Invalid for inputs without a canonical form, or too many of them."""
        data = encoding.encode(self.to_dict())
        if len(data) > BRIEF_LIMIT:
            raise Invalid(f"a brief has at most {BRIEF_LIMIT} bytes, not {len(data)}: name large inputs by hash")
        return sha256(data).hex()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "text": self.text, "inputs": self.inputs}

    @classmethod
    def from_dict(cls, value: object) -> Brief:
        """Raises: Invalid for anything that `to_dict` does not make."""
        if not isinstance(value, dict) or value.keys() != {"kind", "text", "inputs"}:
            raise Invalid("a brief has the fields inputs, kind and text")
        if not (isinstance(value["kind"], str) and isinstance(value["text"], str) and type(value["inputs"]) is dict):
            raise Invalid("a brief has a kind, a text and named inputs")
        return cls(**value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """One job as both sides see it.

    Args:
        price: in the escrow's asset.
        deadline: until when work may be submitted, in seconds since 1970.
        title: one line, which everybody may read on the chain.
        brief: the brief's hash.
        intent: the client's purchase; one intent is one job, see `buyer`.
        on_silence: the provider's part, in 1/10,000, when the evaluator says nothing.
        bond: what the evaluator locks, and loses by silence.
    """

    client: Account
    provider: Account
    evaluator: Account
    price: Amount
    deadline: int
    title: str
    brief: str
    intent: str
    on_silence: int = PAY
    bond: int = 0

    def __post_init__(self) -> None:
        for name in ("client", "provider", "evaluator"):
            object.__setattr__(self, name, parse_account(getattr(self, name)))
        parse_asset(self.price.asset)
        if self.provider in (self.client, self.evaluator):
            raise Invalid("the provider is neither the client nor the evaluator")
        if not 0 < self.price.units < 2**96 or not 0 <= _int(self.bond) < 2**96:
            raise Invalid("price and bond are positive and below 2^96 units")
        if not 0 < _int(self.deadline) < 2**40 or not 0 <= _int(self.on_silence) <= WHOLE_BPS:
            raise Invalid("a deadline is in seconds since 1970, on_silence in 1/10,000")
        if not isinstance(self.title, str) or not 0 < len(self.title) <= TITLE_LIMIT or not self.title.isprintable():
            raise Invalid(f"a title is one line of at most {TITLE_LIMIT} characters")
        if not all(isinstance(text, str) and _HEX.fullmatch(text) for text in (self.brief, self.intent)):
            raise Invalid("brief and intent are named by 64 lower-case hex digits")

    @property
    def digest(self) -> str:
        return keccak(b"tessera/terms\0" + encoding.encode(self.to_dict())).hex()

    @property
    def description(self) -> str:
        """What stands on the chain."""
        return f"{self.title}\nterms {self.digest} intent {self.intent}"

    def at(self, price: Amount) -> Terms:
        """The same for another price."""
        return replace(self, price=price)

    def to_dict(self) -> dict[str, Any]:
        return {
            "client": self.client, "provider": self.provider, "evaluator": self.evaluator, "units": self.price.units,
            "asset": self.price.asset, "deadline": self.deadline, "title": self.title, "brief": self.brief,
            "intent": self.intent, "on_silence": self.on_silence, "bond": self.bond,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: object) -> Terms:
        """Raises: Invalid for anything that `to_dict` does not make."""
        try:
            fields = dict(data)  # type: ignore[call-overload]
            price = Amount(fields.pop("units"), fields.pop("asset"))
            return cls(price=price, **fields)
        except (TypeError, KeyError, ValueError) as error:
            raise Invalid(f"these are no terms: {error}") from error


def named_in(description: str) -> tuple[str, str] | None:
    """Terms' digest and intent that a job's description names; None where it names none."""
    found = _NAMES.search(description)
    return (found[1], found[2]) if found else None


def _int(value: object) -> int:
    if type(value) is not int:
        raise Invalid(f"expected an int, not {value!r:.40}")
    return value

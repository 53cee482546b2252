"""The error tree: the class tells the caller what to do, not where it happened.

Each class has a stable `code` and the HTTP `status` it maps to. Facts that a program may want stand in `fields`,
so that nobody parses the message. `to_dict` and `from_dict` carry an error over a wire without losing its class.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "Conflict",
    "Invalid",
    "Late",
    "Misbehaviour",
    "Missing",
    "PaymentRequired",
    "Refused",
    "TesseraError",
    "Unavailable",
    "UnitMismatch",
    "from_dict",
]

MESSAGE_LIMIT = 2_000  # characters kept of a message that a peer sent
RETRY_LIMIT_S = 3_600.0  # a peer that asks for more patience than this, or for nonsense, is not believed
_RESERVED = frozenset({"self", "message"})  # our constructors' own parameters


class TesseraError(Exception):
    """Any failure that Tessera names. `fields` must be JSON-encodable."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def to_dict(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "fields": self.fields}


class Invalid(TesseraError):
    """The input can never be right: fix it."""

    code, status = "invalid", 400


class UnitMismatch(Invalid):
    """Two amounts of different assets met."""

    code = "unit_mismatch"


class PaymentRequired(TesseraError):
    """Pay, then ask again."""

    code, status = "payment_required", 402


class Refused(TesseraError):
    """A policy said no; `rule` names it."""

    code, status = "refused", 403

    def __init__(self, message: str, *, rule: str = "unnamed", **fields: Any) -> None:
        super().__init__(message, rule=rule, **fields)
        self.rule = rule


class Missing(TesseraError):
    """The thing named does not exist here."""

    code, status = "missing", 404


class Conflict(TesseraError):
    """Someone was first: read again, then retry."""

    code, status = "conflict", 409


class Misbehaviour(TesseraError):
    """A peer is provably wrong; `evidence` is what proves it."""

    code, status = "misbehaviour", 422

    def __init__(self, message: str, *, evidence: Any = None, **fields: Any) -> None:
        super().__init__(message, evidence=evidence, **fields)
        self.evidence = evidence


class Unavailable(TesseraError):
    """Try another peer, or this one after `retry_after_s`."""

    code, status = "unavailable", 503

    def __init__(self, message: str, *, retry_after_s: float = 1.0, **fields: Any) -> None:
        super().__init__(message, retry_after_s=retry_after_s, **fields)
        self.retry_after_s = retry_after_s


class Late(TesseraError):
    """The deadline passed."""

    code, status = "late", 504


_CLASSES: dict[str, type[TesseraError]] = {
    cls.code: cls
    for cls in (
        TesseraError, Invalid, UnitMismatch, PaymentRequired, Refused,
        Missing, Conflict, Misbehaviour, Unavailable, Late,
    )
}  # fmt: skip


def from_dict(data: object) -> TesseraError:
    """The error that a peer sent. Never raises: what cannot be read becomes a plain `TesseraError`."""
    if not isinstance(data, dict):
        return TesseraError("the peer sent an error that cannot be read")
    code, message, fields = data.get("code"), data.get("message"), data.get("fields")
    cls = _CLASSES.get(code, TesseraError) if isinstance(code, str) else TesseraError
    text = message[:MESSAGE_LIMIT] if isinstance(message, str) else "the peer sent no message"
    return cls(text, **_checked(fields if isinstance(fields, dict) else {}))


def _checked(fields: dict[Any, Any]) -> dict[str, Any]:
    """The fields of a peer's error that can be trusted to have the type their reader expects; the rest is dropped."""
    kept = {name: value for name, value in fields.items() if isinstance(name, str) and name not in _RESERVED}
    rule, wait_s = kept.get("rule", ""), kept.get("retry_after_s", 0)
    if not isinstance(rule, str):
        del kept["rule"]
    if type(wait_s) not in (int, float) or not 0 <= wait_s <= RETRY_LIMIT_S:
        del kept["retry_after_s"]
    return kept

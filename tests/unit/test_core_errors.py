"""Errors: each class has a stable code, and nothing that a peer sends makes reading an error fail."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from tessera.core import errors
from tessera.core.errors import Misbehaviour, Refused, TesseraError, Unavailable, from_dict

CLASSES = [getattr(errors, name) for name in errors.__all__ if name != "from_dict"]


def test_codes_and_statuses_are_stable() -> None:
    assert {(cls.__name__, cls.code, cls.status) for cls in CLASSES} == {
        ("TesseraError", "error", 500),
        ("Invalid", "invalid", 400),
        ("UnitMismatch", "unit_mismatch", 400),
        ("PaymentRequired", "payment_required", 402),
        ("Refused", "refused", 403),
        ("Missing", "missing", 404),
        ("Conflict", "conflict", 409),
        ("Misbehaviour", "misbehaviour", 422),
        ("Unavailable", "unavailable", 503),
        ("Late", "late", 504),
    }


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_keeps_its_class_and_fields_over_a_wire(cls: type[TesseraError]) -> None:
    sent = cls("came 3, expected 4", came=3)
    received = from_dict(sent.to_dict())
    assert type(received) is cls
    assert received.to_dict() == sent.to_dict()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_survives_a_process_boundary(cls: type[TesseraError]) -> None:
    sent = cls("came 3, expected 4", came=3)
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is cls
    assert received.to_dict() == sent.to_dict()


def test_what_the_caller_needs_are_attributes() -> None:
    assert Refused("no", rule="cap").rule == "cap"
    assert Unavailable("later", retry_after_s=2.5).retry_after_s == 2.5
    assert Misbehaviour("lied", evidence={"hash": "00"}).evidence == {"hash": "00"}
    received = from_dict(Unavailable("later", retry_after_s=2.5).to_dict())
    assert isinstance(received, Unavailable)
    assert received.retry_after_s == 2.5


@pytest.mark.parametrize("wait_s", ["soon", -1, 1e9, None, True, float("nan"), [1]])
def test_a_peer_cannot_make_us_wait_for_nonsense(wait_s: Any) -> None:
    received = from_dict({"code": "unavailable", "message": "busy", "fields": {"retry_after_s": wait_s}})
    assert isinstance(received, Unavailable)
    assert received.retry_after_s == 1.0


def test_a_peer_cannot_pass_our_own_parameters() -> None:
    received = from_dict({"code": "refused", "message": "no", "fields": {"message": "other", "self": 1, "rule": 7}})
    assert isinstance(received, Refused)
    assert (received.message, received.rule) == ("no", "unnamed")


def test_a_peers_message_is_cut() -> None:
    assert len(from_dict({"code": "late", "message": "x" * 10_000}).message) == errors.MESSAGE_LIMIT


@pytest.mark.parametrize(
    "data",
    [None, 7, "text", [], {}, {"code": []}, {"code": "no such", "message": {}}, {"code": "late", "fields": [1]},
     {"code": "late", "fields": {1: 2}}],
)  # fmt: skip
def test_what_cannot_be_read_is_still_an_error(data: object) -> None:
    assert isinstance(from_dict(data), TesseraError)

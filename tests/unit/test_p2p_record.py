"""A peer's signed word on how to reach it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_world import key
from tessera.core.errors import Invalid
from tessera.p2p.transport import MAX_ADDRS, PeerRecord

RECORD = PeerRecord.sign(key(1), ("iroh:127.0.0.1:4433", "iroh:[::1]:4433", "zmq:x@h:1"), expires=1_800_000_000.9)


def test_a_record_reads_back_and_knows_its_schemes() -> None:
    assert PeerRecord.from_text(RECORD.to_text()) == RECORD
    assert RECORD.expires == 1_800_000_000
    assert RECORD.rests("iroh") == ["127.0.0.1:4433", "[::1]:4433"]
    assert RECORD.rests("zmq") == ["x@h:1"]
    assert not RECORD.expired(1_800_000_000)
    assert RECORD.expired(1_800_000_001)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("addrs", ["iroh:6.6.6.6:1"]),
        ("addrs", ["no scheme"]),
        ("addrs", ["iroh:" + "x" * 300]),
        ("addrs", ["iroh:x"] * (MAX_ADDRS + 1)),
        ("addrs", "iroh:x"),
        ("expires", 1_900_000_000),
        ("expires", 1.5),
        ("expires", True),
        ("expires", -1),
        ("id", key(2).id),
        ("id", "../../etc/passwd"),
        ("signature", "00" * 64),
        ("signature", "zz" * 64),
        ("signature", None),
        ("more", 1),
    ],
)
def test_a_changed_record_is_invalid(name: str, value: object) -> None:
    fields = json.loads(RECORD.to_text())
    fields[name] = value
    with pytest.raises(Invalid):
        PeerRecord.from_text(json.dumps(fields, sort_keys=True, separators=(",", ":")))


@pytest.mark.parametrize(
    "text", [None, 7, b"", "", "{}", "[]", RECORD.to_text() + " ", RECORD.to_text()[:-5], "\ud800"]
)
def test_what_is_no_record_is_invalid(text: object) -> None:
    with pytest.raises(Invalid):
        PeerRecord.from_text(text)


@given(st.text(max_size=300))
def test_no_text_breaks_the_reader(text: str) -> None:
    with pytest.raises(Invalid):
        PeerRecord.from_text(text)


@pytest.mark.parametrize("addrs", [("spaces are:out of it",), ("x" * 20 + ":y",), ("iroh:\n",), ("iroh",)])
def test_a_record_is_not_signed_for_addresses_that_others_would_refuse(addrs: tuple[str, ...]) -> None:
    with pytest.raises(Invalid, match="address"):
        PeerRecord.sign(key(1), addrs, expires=0)

"""What two peers must agree on to talk at all: messages, hellos, refusals, calls, and zmq's own link.

A change here means that peers of before and after cannot talk: `VERSION` says so to them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.core import encoding
from tessera.core.errors import from_dict
from tessera.core.signing import PeerKey
from tessera.p2p import calls, switchboard, zmq_keys
from tessera.p2p.framing import frame_header
from tessera.p2p.switchboard import hello
from tessera.p2p.transport import PeerRecord
from tessera.p2p.versions import VERSION, Speech, mismatch, seen_from_here
from tessera.p2p.zmq_keys import CurveKeys, greeting, parse_greeting
from tessera.p2p.zmq_wire import Kind, number, pack, pack_number, unpack

Golden = Callable[[str, Any], None]
DIALLER, LISTENER = PeerKey(bytes([1]) * 32), PeerKey(bytes([2]) * 32)


@pytest.fixture(autouse=True)
def product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors do not change with every release."""
    for module in (switchboard, zmq_keys):
        monkeypatch.setattr(module, "PRODUCT", "tessera 0.1.0")


def framed(message: bytes, *, last: bool = False) -> str:
    return (frame_header(len(message), last=last) + message).hex()


def test_links_are_as_recorded(golden: Golden) -> None:
    first = hello("tessera/blob/1", bulk=True, confirm=False)
    request = calls._join(encoding.encode({"op": "roster"}), b"\x00body")
    record = PeerRecord.sign(LISTENER, ("iroh:203.0.113.7:4433", "zmq:203.0.113.7:4434"), 2_000_000_000)
    golden(
        "specs/vectors/links.json",
        {
            "version": VERSION,
            "record": record.to_text(),
            "messages": {
                "one byte": framed(b"x"),
                "the last": framed(b"x", last=True),
                "an end alone": framed(b"", last=True),
            },
            "hello": first.decode(),
            "hello_framed": framed(first),
            "consent_framed": framed(encoding.encode({})),
            "refusals": [_refusal(ours, theirs) for ours, theirs in _DIFFERENCES],
            "call": {"request": request.hex(), "framed": framed(request, last=True)},
            "reply": calls._join(encoding.encode({"reply": {}}), b"").hex(),
            "zmq": _zmq(),
        },
    )


_DIFFERENCES = (
    (Speech(2, "tessera 0.4.0"), Speech(3, "tessera 0.5.0")),
    (Speech(3, "tessera 0.5.0"), Speech(2, "tessera 0.4.0")),
    (Speech("tessera/blob/1, tessera/blob/2", "tessera 0.4.0"), Speech("tessera/blob/3", "tessera 0.5.0")),
)


def _refusal(ours: Speech, theirs: Speech) -> dict[str, Any]:
    refused = mismatch(ours, theirs)
    return {**refused.to_dict(), "seen_by_the_other": seen_from_here(refused).message}


def _zmq() -> dict[str, Any]:
    keys, hello_ = CurveKeys.of(DIALLER), greeting(DIALLER, LISTENER.id)
    assert parse_greeting(hello_, us=LISTENER.id, proven=keys.public) == DIALLER.id
    return {
        "seed": DIALLER.seed.hex(),
        "peer": DIALLER.id,
        "curve_public": keys.public.hex(),
        "curve_secret": keys.secret.hex(),
        "to": LISTENER.id,
        "greeting": pack(Kind.GREETING, payload=hello_).hex(),
        "bye": pack(Kind.BYE).hex(),
        "data": pack(Kind.DATA, 3, b"x").hex(),
        "end": pack(Kind.END, 3).hex(),
        "credit": pack_number(Kind.CREDIT, 3, 131_072).hex(),
        "stop": pack_number(Kind.STOP, 2, 503).hex(),
    }


def test_what_is_recorded_reads_back(root: Path) -> None:
    recorded = json.loads((root / "specs/vectors/links.json").read_text(encoding="utf-8"))
    record = PeerRecord.from_text(recorded["record"])
    assert (record.id, record.rests("zmq")) == (LISTENER.id, ["203.0.113.7:4434"])
    parsed = switchboard._parse_hello(encoding.decode(recorded["hello"].encode(), 512))
    assert (parsed.protocol, parsed.product, parsed.bulk, parsed.confirm) == (
        "tessera/blob/1", "tessera 0.1.0", True, False,
    )  # fmt: skip
    kind, stream, payload = unpack(bytes.fromhex(recorded["zmq"]["greeting"]))
    proven = bytes.fromhex(recorded["zmq"]["curve_public"])
    assert (kind, stream) == (Kind.GREETING, 0)
    assert parse_greeting(bytes(payload), us=LISTENER.id, proven=proven) == DIALLER.id
    assert number(unpack(bytes.fromhex(recorded["zmq"]["credit"]))[2]) == 131_072
    for refusal in recorded["refusals"]:
        seen = seen_from_here(from_dict({key: refusal[key] for key in ("code", "message", "fields")}))
        assert seen.message == refusal["seen_by_the_other"]

"""What the rest of the code sees of other peers: who they are, how to reach them, and ordered, framed streams.

Every adapter keeps these promises (`tests/unit/test_p2p_contract.py` runs the same suite on each):

- A `PeerId` is proven by the link itself: nobody else can answer for it, whatever addresses a record names.
- A stream delivers whole messages, in order, once; its end is either said (`last=True`) or it is an error.
- A peer that is gone is `Unavailable` within about 3.5 s, even when it never said goodbye.
- A peer that breaks the framing or a limit is `Misbehaviour`, with evidence; memory follows what arrived,
  not what was announced.
- `recv` may be cancelled without losing anything. A cancelled `send` breaks the sending half, since half a message
  may be on its way.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.core.ids import PeerId, parse_peer_id
from tessera.core.signing import PeerKey, verify_peer

__all__ = ["MAX_ADDRS", "MAX_MESSAGE", "RECORD_TTL_S", "Handler", "PeerRecord", "Presence", "Stream", "Transport"]

MAX_MESSAGE = 1 << 30  # bytes of one message
RECORD_TTL_S = 30 * 24 * 3600
MAX_ADDRS = 16
ADDR_LIMIT = 256  # characters
RECORD_LIMIT = 8 * 1024  # characters
DOMAIN = "peer-record"

_ADDR = re.compile(r"[a-z0-9]{1,16}:[\x21-\x7e]+")

Presence = Literal["up", "down"]


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """A peer's own, signed word on how to reach it. Public; it gives no right.

    An address is `scheme:rest`, opaque to all but the adapter of that scheme (`iroh:203.0.113.7:4433`). `expires` is in
    seconds since 1970: after it the addresses are old news, though the key still proves whoever answers there.
    """

    id: PeerId
    addrs: tuple[str, ...]
    expires: int
    signature: bytes

    @classmethod
    def sign(cls, key: PeerKey, addrs: tuple[str, ...], expires: float) -> PeerRecord:
        """Raises `Invalid` for addresses that `from_text` would refuse."""
        until = int(expires)
        body = _body(key.id, _check_addrs(addrs), until)
        return cls(key.id, addrs, until, key.sign(DOMAIN, encoding.encode(body)))

    def to_text(self) -> str:
        """Canonical JSON, for invitations and messages."""
        value = {**_body(self.id, self.addrs, self.expires), "signature": self.signature.hex()}
        return encoding.encode(value).decode()

    @classmethod
    def from_text(cls, text: object) -> PeerRecord:
        """Raises `Invalid` unless this is a record that its own peer signed. Does not look at `expires`."""
        if not isinstance(text, str):
            raise Invalid(f"a peer record is a text, not {type(text).__name__}")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise Invalid("a peer record holds a lone surrogate") from error
        value = encoding.decode(data, RECORD_LIMIT)
        if not isinstance(value, dict) or value.keys() != {"addrs", "expires", "id", "signature"}:
            raise Invalid("a peer record has the fields addrs, expires, id, signature")
        peer, addrs, expires = parse_peer_id(value["id"]), _check_addrs(value["addrs"]), value["expires"]
        if type(expires) is not int or not 0 <= expires < 2**53:
            raise Invalid(f"a record expires at whole seconds since 1970, not {str(expires)[:40]}")
        signature = _signature(value["signature"])
        verify_peer(peer, DOMAIN, encoding.encode(_body(peer, addrs, expires)), signature)
        return cls(peer, addrs, expires, signature)

    def expired(self, now: float) -> bool:
        return now > self.expires

    def rests(self, scheme: str) -> list[str]:
        """What follows `scheme:` in the addresses that have it."""
        return [addr.removeprefix(f"{scheme}:") for addr in self.addrs if addr.startswith(f"{scheme}:")]


class Stream(Protocol):
    """One ordered, two-way exchange of messages with an authenticated peer."""

    @property
    def peer(self) -> PeerId: ...

    @property
    def sent_bytes(self) -> int:
        """Every byte handed to the engine for this stream, our own headers included."""
        ...

    @property
    def received_bytes(self) -> int:
        """Every byte that the engine delivered on this stream, our own headers included."""
        ...

    async def send(self, data: bytes | bytearray | memoryview, *, last: bool = False) -> None:
        """One message; waits while the peer is slow. With `last`, the end, with a final message unless it is empty.

        Raises: Invalid for an empty message that is not the last, or one over `MAX_MESSAGE`; Conflict after the last;
        Unavailable when the peer is gone or no longer listens. What the peer refused is raised as it said it.
        """
        ...

    async def recv(self, limit: int) -> bytes:
        """The next message, of at most `limit` bytes; b"" once the peer has sent its last, and ever after.

        Raises: Unavailable when the peer is gone or cut the stream without a last message; Misbehaviour for an
        oversize, empty or truncated message.
        """
        ...

    async def abort(self, code: int = 0) -> None:
        """Drop both directions at once; whatever waits raises Unavailable. Never raises; safe to repeat."""
        ...


Handler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """One node's way to all its peers."""

    @property
    def id(self) -> PeerId: ...

    def record(self) -> PeerRecord:
        """How to reach this node now, freshly signed."""
        ...

    def serve(self, protocol: str, handler: Handler, *, max_streams: int = 64) -> None:
        """Run `handler` for every stream that a peer opens under `protocol`; later calls replace the handler.

        When the handler returns, the stream ends in good order; when it raises, the stream is aborted. It is not
        cancelled when the peer goes away.

        Args:
            max_streams: at once, from one peer (all peers together: 16 times that). More wait a few seconds for a
                free place and are then refused with `Unavailable`.
        """
        ...

    async def open(
        self, peer: PeerRecord, protocol: str, *, timeout_s: float, bulk: bool = False, confirm: bool = True
    ) -> Stream:
        """A stream to `peer`, over the link that stands already or a new one.

        Args:
            bulk: both directions give way to other streams on the same link.
            confirm: wait for the peer's consent (one round trip). Without, a refusal is raised by what follows.

        Raises: Late; Unavailable when no address answers as `peer`, or the peer is full; Missing for a protocol that
        it does not serve; Refused for another version of this protocol; Invalid for our own id or a record
        without an address that this adapter understands.
        """
        ...

    def watch(self, peer: PeerId) -> AsyncIterator[Presence]:
        """Whether a link to `peer` stands: now, then at every change (only the newest, for a slow reader)."""
        ...

    async def close(self) -> None:
        """Leave in good order, in under a second. Safe to repeat."""
        ...


def _body(peer: PeerId, addrs: tuple[str, ...], expires: int) -> dict[str, Any]:
    return {"addrs": list(addrs), "expires": expires, "id": peer}


def _check_addrs(addrs: object) -> tuple[str, ...]:
    if not isinstance(addrs, list | tuple) or len(addrs) > MAX_ADDRS:
        raise Invalid(f"a record has up to {MAX_ADDRS} addresses")
    for addr in addrs:
        if not isinstance(addr, str) or len(addr) > ADDR_LIMIT or _ADDR.fullmatch(addr) is None:
            raise Invalid(f"an address is scheme:rest of up to {ADDR_LIMIT} visible characters, not {str(addr)[:80]!r}")
    return tuple(addrs)


def _signature(text: object) -> bytes:
    if not isinstance(text, str) or re.fullmatch(r"[0-9a-f]{128}", text) is None:
        raise Invalid("a record's signature is 128 lower-case hex digits")
    return bytes.fromhex(text)

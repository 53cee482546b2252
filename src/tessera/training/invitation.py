"""An invitation is all that a joiner needs: which run, on which chain, who answers, and over which relays.

It is signed by whoever gave it, so that nobody can bend it on its way; it ends at a time, serves a number of seats, and
can be taken back. It carries no key and no money: whoever holds it may ask for a seat, until the seats that it is for
are taken. Everything that is fetched through it is checked against the run id.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Invalid
from tessera.core.ids import RunId, parse_run_id
from tessera.core.paper import read_paper, write_paper
from tessera.core.signing import PeerKey, verify_peer
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import PeerRecord

__all__ = ["Invitation"]

PREFIX = "tessera1"
DOMAIN = "invitation"
MAX_PEERS, MAX_RELAYS, MAX_SEATS = 16, 8, 128
FIELDS = {"run_id", "chain_id", "peers", "relays", "id", "seats", "expires", "signature"}

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Invitation:
    """Made by `make`, read by `parse`. The first of `peers` is the host, who signed it."""

    run_id: RunId
    chain_id: int
    peers: tuple[PeerRecord, ...]
    relays: tuple[RelayUrl, ...]
    id: str  # 32 hex digits; what the host looks up
    seats: int  # how many may join with it
    expires: int  # seconds since 1970
    signature: bytes = b""

    @classmethod
    def make(
        cls,
        key: PeerKey,
        run_id: RunId,
        *,
        chain_id: int,
        host: PeerRecord,
        expires: int,
        seats: int,
        relays: Sequence[RelayUrl] = (),
        peers: Sequence[PeerRecord] = (),
    ) -> Invitation:
        """A new one, signed with the host's `key`. Raises `Invalid` for numbers that `parse` would refuse."""
        records = (host, *(peer for peer in peers if peer.id != host.id))[:MAX_PEERS]
        draft = cls(run_id, chain_id, records, tuple(relays)[:MAX_RELAYS], secrets.token_hex(16), seats, expires)
        return cls._from_value({**draft._body(), "signature": key.sign(DOMAIN, encoding.encode(draft._body())).hex()})

    @property
    def host(self) -> PeerRecord:
        return self.peers[0]

    @property
    def listen_on(self) -> str:
        """Where a member should listen: on loopback when every address here is loopback, since then nobody else takes
        part; else on all addresses. The port is any free one."""
        addresses = [address for peer in self.peers for address in peer.addrs]
        local = all("127.0.0.1" in address or "[::1]" in address for address in addresses)
        return "127.0.0.1:0" if local else "0.0.0.0:0"

    def to_text(self) -> str:
        return write_paper(PREFIX, {**self._body(), "signature": self.signature.hex()})

    @classmethod
    def parse(cls, text: str, clock: Clock, *, even_expired: bool = False) -> Invitation:
        """Raises `Invalid` for a text that is cut, altered, foreign or expired.

        Args:
            even_expired: for who has his seat already: it stays his.
        """
        invitation = read_paper(text, PREFIX, "an invitation", cls._from_value)
        if not even_expired and invitation.expires < clock.time():
            when, now = _utc(invitation.expires), _utc(clock.time())
            raise Invalid(
                f"the invitation expired at {when}, and this machine's clock says {now}: "
                f"ask whoever runs {invitation.run_id[:16]}… for a new one"
            )
        return invitation

    def _body(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "chain_id": self.chain_id,
            "peers": [peer.to_text() for peer in self.peers],
            "relays": [[relay.url, relay.token] for relay in self.relays],
            "id": self.id,
            "seats": self.seats,
            "expires": self.expires,
        }

    @classmethod
    def _from_value(cls, value: object) -> Invitation:
        if not isinstance(value, dict) or value.keys() != FIELDS:
            raise Invalid(f"an invitation has the fields {', '.join(sorted(FIELDS))}")
        peers, relays, name = value["peers"], value["relays"], value["id"]
        for field, most in (("chain_id", 2**53), ("expires", 2**53), ("seats", MAX_SEATS + 1)):
            if type(value[field]) is not int or not 1 <= value[field] < most:
                raise Invalid(f"{field} is a whole number from 1 to {most - 1}, not {str(value[field])[:40]}")
        if not isinstance(peers, list) or not 1 <= len(peers) <= MAX_PEERS:
            raise Invalid(f"an invitation names 1 to {MAX_PEERS} peers")
        if not isinstance(relays, list) or len(relays) > MAX_RELAYS:
            raise Invalid(f"an invitation names up to {MAX_RELAYS} relays")
        if not isinstance(name, str) or _ID.fullmatch(name) is None:
            raise Invalid("an invitation's id has 32 hex digits")
        invitation = cls(
            parse_run_id(value["run_id"]), value["chain_id"], tuple(PeerRecord.from_text(peer) for peer in peers),
            tuple(_relay(relay) for relay in relays), name, value["seats"], value["expires"],
            _signature(value["signature"]),
        )  # fmt: skip
        verify_peer(invitation.host.id, DOMAIN, encoding.encode(invitation._body()), invitation.signature)
        return invitation


def _relay(value: object) -> RelayUrl:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str) for part in value):
        raise Invalid("a relay is a URL and a token")
    return RelayUrl(*value)


def _signature(text: object) -> bytes:
    if not isinstance(text, str) or re.fullmatch(r"[0-9a-f]{128}", text) is None:
        raise Invalid("an invitation's signature has 128 hex digits")
    return bytes.fromhex(text)


def _utc(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))

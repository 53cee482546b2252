"""A ticket is all that a joiner needs: which run, on which chain, and who answers.

It is public: it carries no secret and gives no right but to ask for a seat. Everything fetched through it is
checked against the run id.
"""

from __future__ import annotations

import base64
import binascii
import time
from dataclasses import dataclass

from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Invalid
from tessera.core.ids import RunId, parse_run_id
from tessera.p2p.transport import PeerRecord

__all__ = ["Ticket"]

PREFIX = "tessera1"
TICKET_LIMIT = 16 * 1024  # characters
MAX_PEERS = 16


@dataclass(frozen=True, slots=True)
class Ticket:
    run_id: RunId
    chain_id: int
    peers: tuple[PeerRecord, ...]
    expires: int  # seconds since 1970

    def to_text(self) -> str:
        value = {
            "run_id": self.run_id,
            "chain_id": self.chain_id,
            "peers": [peer.to_text() for peer in self.peers],
            "expires": self.expires,
        }
        return PREFIX + base64.urlsafe_b64encode(encoding.encode(value)).decode().rstrip("=")

    @property
    def listen_on(self) -> str:
        """Where a member should listen: on loopback when every address here is loopback, since then nobody else takes
        part; else on all addresses. The port is any free one."""
        addresses = [address for peer in self.peers for address in peer.addrs]
        local = all("127.0.0.1" in address or "[::1]" in address for address in addresses)
        return "127.0.0.1:0" if local else "0.0.0.0:0"

    @classmethod
    def parse(cls, text: str, clock: Clock) -> Ticket:
        """Raises `Invalid` for a text that is cut, altered, foreign or expired."""
        text = "".join(text.split())
        if not text.startswith(PREFIX):
            raise Invalid(f"a ticket starts with {PREFIX!r}, this one with {text[:8]!r}")
        if len(text) > TICKET_LIMIT:
            raise Invalid(f"a ticket has at most {TICKET_LIMIT} characters, this one {len(text)}")
        body = text[len(PREFIX) :]
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            ticket = cls._from_value(encoding.decode(data, TICKET_LIMIT))
        except (binascii.Error, Invalid, UnicodeDecodeError) as error:
            raise Invalid(f"the ticket is damaged or cut short: {error}") from error
        if ticket.expires < clock.time():
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ticket.expires))
            raise Invalid(f"the ticket expired at {when}: ask whoever runs {ticket.run_id[:16]}… for a new one")
        return ticket

    @classmethod
    def _from_value(cls, value: object) -> Ticket:
        if not isinstance(value, dict) or value.keys() != {"run_id", "chain_id", "peers", "expires"}:
            raise Invalid("a ticket has the fields run_id, chain_id, peers, expires")
        peers, chain_id, expires = value["peers"], value["chain_id"], value["expires"]
        if type(chain_id) is not int or type(expires) is not int or chain_id < 1:
            raise Invalid("chain_id and expires are positive integers")
        if not isinstance(peers, list) or not 1 <= len(peers) <= MAX_PEERS:
            raise Invalid(f"a ticket names 1 to {MAX_PEERS} peers")
        records = tuple(PeerRecord.from_text(peer) for peer in peers)
        return cls(parse_run_id(value["run_id"]), chain_id, records, expires)

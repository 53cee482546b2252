"""What another machine needs to hold a stage of a served model: which model, who asks, over which relays, and a secret.

It is signed by the host, ends at a time, and is good for any number of machines until then. Whoever has it may ask for
a stage, so it is for machines that the host trusts to compute honestly: nobody audits a served stage.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Invalid
from tessera.core.paper import read_paper, write_paper
from tessera.core.signing import PeerKey, verify_peer
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import PeerRecord

__all__ = ["StageInvitation"]

PREFIX = "tessera-stage1"
DOMAIN = "stage-invitation"
MAX_RELAYS = 8

_HEX_32, _HEX_64, _HEX_128 = (re.compile(rf"[0-9a-f]{{{digits}}}") for digits in (32, 64, 128))


@dataclass(frozen=True, slots=True)
class StageInvitation:
    """Made by `make`, read by `parse`."""

    digest: str  # of the model's card
    host: PeerRecord
    relays: tuple[RelayUrl, ...]
    secret: str  # 32 hex digits
    expires: int  # seconds since 1970
    signature: bytes = b""

    @classmethod
    def make(
        cls,
        key: PeerKey,
        digest: str,
        *,
        host: PeerRecord,
        expires: int,
        relays: Sequence[RelayUrl] = (),
        secret: str = "",
    ) -> StageInvitation:
        """A new one, signed with the host's `key`. `secret`: of an earlier one, which stays good with it."""
        draft = cls(digest, host, tuple(relays)[:MAX_RELAYS], secret or secrets.token_hex(16), expires)
        return cls._from_value({**draft._body(), "signature": key.sign(DOMAIN, encoding.encode(draft._body())).hex()})

    @property
    def listen_on(self) -> str:
        """Where a member listens: on loopback when the host does, since nobody else takes part then; else anywhere."""
        local = all("127.0.0.1" in address or "[::1]" in address for address in self.host.addrs)
        return "127.0.0.1:0" if local else "0.0.0.0:0"

    def to_text(self) -> str:
        return write_paper(PREFIX, {**self._body(), "signature": self.signature.hex()})

    @classmethod
    def parse(cls, text: str, clock: Clock) -> StageInvitation:
        """Raises `Invalid` for a text that is cut, altered, foreign or expired."""
        invitation = read_paper(text, PREFIX, "an invitation to hold a stage", cls._from_value)
        if invitation.expires < clock.time():
            raise Invalid("the invitation has expired: ask who serves the model for a new one")
        return invitation

    def _body(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "host": self.host.to_text(),
            "relays": [[relay.url, relay.token] for relay in self.relays],
            "secret": self.secret,
            "expires": self.expires,
        }

    @classmethod
    def _from_value(cls, value: object) -> StageInvitation:
        if not isinstance(value, dict) or value.keys() != {
            "digest", "host", "relays", "secret", "expires", "signature",
        }:  # fmt: skip
            raise Invalid("an invitation to hold a stage has digest, host, relays, secret, expires and signature")
        for field, form in (("digest", _HEX_64), ("secret", _HEX_32), ("signature", _HEX_128)):
            if not isinstance(value[field], str) or form.fullmatch(value[field]) is None:
                raise Invalid(f"the {field} of an invitation is {form.pattern}")
        relays, expires = value["relays"], value["expires"]
        if not isinstance(relays, list) or len(relays) > MAX_RELAYS:
            raise Invalid(f"an invitation names up to {MAX_RELAYS} relays")
        if type(expires) is not int or not 0 <= expires < 2**53:
            raise Invalid(f"an invitation expires at whole seconds since 1970, not {str(expires)[:40]}")
        host = PeerRecord.from_text(value["host"])
        signature = bytes.fromhex(value["signature"])
        invitation = cls(
            value["digest"], host, tuple(_relay(relay) for relay in relays), value["secret"], expires, signature
        )
        verify_peer(host.id, DOMAIN, encoding.encode(invitation._body()), signature)
        return invitation


def _relay(value: object) -> RelayUrl:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str) for part in value):
        raise Invalid("a relay is a URL and a token")
    return RelayUrl(*value)

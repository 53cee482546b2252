"""Messages between agents: signed, for one recipient, for a while, and each with a name of its own.

Invariants: a signature (EIP-712) covers sender, recipient, kind, body and times, so that a message fits nobody else and
no other purpose; its digest is its id, so that a second copy is known; after `expires_at` nobody takes it. A message
grants nothing: it can ask, answer and tell.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from tessera.core import encoding
from tessera.core.errors import Invalid, Late
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey, recover_account
from tessera.core.typed_data import domain, typed_digest

__all__ = ["LIFE_S", "MESSAGE_LIMIT", "SKEW_S", "Kind", "Message", "Post", "write_message"]

Kind = Literal["request", "accept", "decline", "counter", "appoint", "resign", "commit", "reveal", "fetch"]
MESSAGE_LIMIT = 524_288  # bytes of a whole message
LIFE_S = 7 * 86_400  # the longest
SKEW_S = 60  # how far a sender's clock may be ahead
_DOMAIN = domain("Tessera message", "1")
_TYPE = (
    "Message(address sender,address recipient,string kind,bytes body,uint256 sentAt,uint256 expiresAt,bytes32 nonce)"
)


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it travels."""

    sender: Account
    recipient: Account
    kind: str
    body: bytes  # canonical
    sent_at: int  # seconds since 1970
    expires_at: int
    nonce: str
    signature: bytes
    id: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", _digest(self).hex())

    def value(self) -> dict[str, Any]:
        """The body. Raises: Invalid for one that is no canonical object."""
        value = encoding.decode(self.body, MESSAGE_LIMIT)
        if type(value) is not dict:
            raise Invalid("a message's body is an object")
        return value

    def verify(self, recipient: Account, now: float) -> None:
        """Raises: Invalid for a wrong signature, kind, recipient or time; Late when it has expired."""
        if self.kind not in get_args(Kind):
            raise Invalid(f"a message is one of {', '.join(get_args(Kind))}, not {self.kind!r:.40}")
        if self.recipient != recipient:
            raise Invalid(f"this message is for {self.recipient}, not for {recipient}")
        if not self.sent_at < self.expires_at <= self.sent_at + LIFE_S or self.sent_at > now + SKEW_S:
            raise Invalid("a message is sent before now and lives at most a week")
        if now >= self.expires_at:
            raise Late(f"the message expired at {self.expires_at}")
        if recover_account(_digest(self), self.signature) != self.sender:
            raise Invalid("the message is not signed by its sender")

    def encode(self) -> bytes:
        fields = {
            "sender": self.sender, "recipient": self.recipient, "kind": self.kind, "body": self.body.decode(),
            "sent_at": self.sent_at, "expires_at": self.expires_at, "nonce": self.nonce,
            "signature": self.signature.hex(),
        }  # fmt: skip
        return encoding.encode(fields)

    @classmethod
    def decode(cls, data: bytes) -> Message:
        """Raises: Invalid for anything that `encode` does not make."""
        fields = encoding.decode(data, MESSAGE_LIMIT)
        try:
            body, signature = fields.pop("body").encode(), encoding.hex_bytes(fields.pop("signature"), 65)
            message = cls(body=body, signature=signature, **fields)
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise Invalid(f"this is no message: {error}") from error
        if message.encode() != data:
            raise Invalid("this is no message: its fields have another form")
        return message


class Post(Protocol):
    """What brings messages to others: by HTTP (`a2a`), or in one process (`street`)."""

    async def deliver(self, message: Message) -> None:
        """Into the recipient's inbox. Raises: Unavailable, Late; Refused or Invalid when it will never be taken."""
        ...

    async def fetch(self, message: Message) -> bytes:
        """What a `fetch` asks for. Raises the recipient's refusal."""
        ...


def write_message(
    key: AccountKey, recipient: Account, kind: Kind, body: dict[str, Any], now: float, *, life_s: int = 86_400
) -> Message:
    """A signed message; its id is new each time."""
    text, sent_at, nonce = encoding.encode(body), int(now), secrets.token_hex(32)
    bare = Message(key.account, parse_account(recipient), kind, text, sent_at, sent_at + life_s, nonce, b"")
    signature = key.sign_digest(bytes.fromhex(bare.id))
    return Message(bare.sender, bare.recipient, kind, text, sent_at, bare.expires_at, nonce, signature)


def _digest(message: Message) -> bytes:
    values = (
        message.sender, message.recipient, message.kind, message.body, message.sent_at, message.expires_at,
        encoding.hex_bytes(message.nonce, 32),
    )  # fmt: skip
    return typed_digest(_DOMAIN, _TYPE, values)

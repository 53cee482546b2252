"""One key for both names of a peer: its curve25519 key is computed from its ed25519 key.

CURVE proves to each end which curve25519 key the other holds. The one of a peer that we dial follows from its id, so
the link itself proves who answers, and no certificate is needed. The way back is ambiguous: two ed25519 keys of
opposite sign lead to one curve25519 key. So each end says its id in a greeting, signed for the peer it is meant for,
and the id must lead to the key that the link has proven. A greeting that somebody copies is worth nothing without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import nacl.bindings
import nacl.exceptions

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.ids import PeerId, parse_peer_id
from tessera.core.signing import PeerKey, verify_peer
from tessera.p2p.versions import PRODUCT, UNNAMED, VERSION, Speech, mismatch, parse_product

__all__ = ["GREETING_LIMIT", "CurveKeys", "curve_key", "greeting", "parse_greeting"]

DOMAIN = "zmq-link"
GREETING_LIMIT = 1024  # bytes
_FIELDS = {"from", "product", "signature", "to", "version"}


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """A node's curve25519 keys, 32 bytes each."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def of(cls, key: PeerKey) -> CurveKeys:
        _, signing = nacl.bindings.crypto_sign_seed_keypair(key.seed)
        return cls(curve_key(key.id), nacl.bindings.crypto_sign_ed25519_sk_to_curve25519(signing))


def curve_key(peer: PeerId) -> bytes:
    """The curve25519 key that `peer` proves a link with. Raises `Invalid` for an id that is no ed25519 key."""
    try:
        return nacl.bindings.crypto_sign_ed25519_pk_to_curve25519(bytes.fromhex(parse_peer_id(peer)))
    except (nacl.exceptions.CryptoError, ValueError) as error:
        raise Invalid(f"{peer[:16]}… is no ed25519 key") from error


def greeting(key: PeerKey, to: PeerId) -> bytes:
    """The first message of a link, in both directions."""
    body = _body(key.id, to, VERSION, PRODUCT)
    return encoding.encode({**body, "signature": key.sign(DOMAIN, encoding.encode(body)).hex()})


def parse_greeting(data: bytes, *, us: PeerId, proven: bytes) -> PeerId:
    """Who greets us.

    Args:
        proven: the curve25519 key that the link has proven.

    Raises: Refused for another version; Misbehaviour for everything else that does not fit.
    """
    value = _decode(data)
    version, product = value.get("version"), parse_product(value.get("product"))
    if type(version) is not int:
        raise _misbehaves("a greeting has a version", data)
    if version != VERSION:  # the version first: others may look different
        raise mismatch(Speech(VERSION, PRODUCT), Speech(version, product))
    if value.keys() != _FIELDS or product == UNNAMED:
        raise _misbehaves(f"a greeting has the fields {', '.join(sorted(_FIELDS))}", data)
    try:
        peer, signature = parse_peer_id(value["from"]), _signature(value["signature"])
        if value["to"] != us:
            raise Invalid("it is meant for another peer")
        if curve_key(peer) != proven:
            raise Invalid("the link proves another key than that of the peer it names")
        verify_peer(peer, DOMAIN, encoding.encode(_body(peer, us, version, product)), signature)
    except Invalid as error:
        raise _misbehaves(f"this greeting does not count: {error}", data) from error
    return peer


def _body(sender: PeerId, to: PeerId, version: int, product: str) -> dict[str, Any]:
    return {"from": sender, "product": product, "to": to, "version": version}


def _decode(data: bytes) -> dict[str, Any]:
    try:
        value = encoding.decode(data, GREETING_LIMIT)
    except Invalid as error:
        raise _misbehaves(f"a greeting cannot be read: {error}", data) from error
    if not isinstance(value, dict):
        raise _misbehaves("a greeting is an object", data)
    return value


def _signature(text: object) -> bytes:
    if not isinstance(text, str) or len(text) != 128:
        raise Invalid("a signature is 128 hex digits")
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise Invalid("a signature is 128 hex digits") from error


def _misbehaves(what: str, data: bytes) -> Misbehaviour:
    return Misbehaviour(what, evidence={"fault": what, "head": data[:64].hex()})

"""Two kinds of keys: ed25519 names and authenticates a peer, secp256k1 owns money on an EVM chain.

Every peer signature is bound to a `domain` ("receipt", "vote", ...), so that a signature given for one purpose
can never be shown as another. Account signatures cover a 32-byte digest, normally an EIP-712 one.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import coincurve
import nacl.exceptions
import nacl.signing

from tessera.core.errors import Invalid
from tessera.core.hashing import keccak
from tessera.core.ids import Account, PeerId, account_from_bytes, parse_peer_id

__all__ = ["AccountKey", "PeerKey", "recover_account", "verify_peer"]

_HALF_ORDER = 0x7FFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFF_5D576E73_57A4501D_DFE92F46_681B20A0  # of secp256k1


@dataclass(frozen=True, slots=True)
class PeerKey:
    """An ed25519 key. `seed` (32 bytes) is the secret and stays out of `repr`."""

    seed: bytes = field(repr=False)
    id: PeerId = field(init=False)

    def __post_init__(self) -> None:
        if len(self.seed) != 32:
            raise Invalid(f"an ed25519 seed has 32 bytes, not {len(self.seed)}")
        object.__setattr__(self, "id", PeerId(nacl.signing.SigningKey(self.seed).verify_key.encode().hex()))

    @classmethod
    def generate(cls) -> PeerKey:
        return cls(secrets.token_bytes(32))

    def sign(self, domain: str, message: bytes) -> bytes:
        """64 bytes over `domain` and `message`."""
        return bytes(nacl.signing.SigningKey(self.seed).sign(_bound(domain, message)).signature)


def verify_peer(peer: PeerId, domain: str, message: bytes, signature: bytes) -> None:
    """Raises `Invalid` unless `peer` signed exactly this message for exactly this domain."""
    try:
        nacl.signing.VerifyKey(bytes.fromhex(parse_peer_id(peer))).verify(_bound(domain, message), signature)
    except (nacl.exceptions.BadSignatureError, ValueError, TypeError) as error:
        raise Invalid(f"the signature is not {peer[:16]}…'s over this {domain}") from error


@dataclass(frozen=True, slots=True)
class AccountKey:
    """A secp256k1 key. `secret` (32 bytes) stays out of `repr`."""

    secret: bytes = field(repr=False)
    account: Account = field(init=False)

    def __post_init__(self) -> None:
        if len(self.secret) != 32:  # coincurve would pad a shorter one
            raise Invalid(f"a secp256k1 secret has 32 bytes, not {len(self.secret)}")
        try:
            public = coincurve.PrivateKey(self.secret).public_key.format(compressed=False)
        except (ValueError, TypeError) as error:
            raise Invalid(f"not a secp256k1 secret: {error}") from error
        object.__setattr__(self, "account", account_from_bytes(keccak(public[1:])[12:]))

    @classmethod
    def generate(cls) -> AccountKey:
        return cls(coincurve.PrivateKey().secret)

    def sign_digest(self, digest: bytes) -> bytes:
        """65 bytes r ‖ s ‖ v over a 32-byte digest, v in {27, 28}, s in the lower half (RFC 6979 nonce)."""
        if len(digest) != 32:
            raise Invalid(f"a digest has 32 bytes, not {len(digest)}")
        signature = coincurve.PrivateKey(self.secret).sign_recoverable(digest, hasher=None)
        return signature[:64] + bytes([signature[64] + 27])


def recover_account(digest: bytes, signature: bytes) -> Account:
    """Who signed `digest`.

    Raises: Invalid for anything but a 65-byte signature with v in {27, 28} and s in the lower half: each signature
    has a twin with s in the upper half, and whoever stores or counts signatures must see one form only (EIP-2).
    """
    if len(digest) != 32 or len(signature) != 65 or signature[64] not in (27, 28):
        raise Invalid("an account signature is 65 bytes over a 32-byte digest, with v 27 or 28")
    if int.from_bytes(signature[32:64], "big") > _HALF_ORDER:
        raise Invalid("the signature's s is in the upper half of the curve's order")
    raw = signature[:64] + bytes([signature[64] - 27])
    try:
        public = coincurve.PublicKey.from_signature_and_message(raw, digest, hasher=None)
    except Exception as error:  # coincurve raises bare Exception
        raise Invalid("the signature recovers to no account") from error
    return account_from_bytes(keccak(public.format(compressed=False)[1:])[12:])


def _bound(domain: str, message: bytes) -> bytes:
    if not domain or "\0" in domain:
        raise Invalid(f"a signing domain is a name without NUL, not {domain!r}")
    return b"tessera/" + domain.encode() + b"\0" + message

"""Signing: keys that leak nothing when printed, and signatures that say one thing only."""

from __future__ import annotations

from typing import Any

import pytest

from tessera.core.errors import Invalid
from tessera.core.hashing import keccak, sha256
from tessera.core.ids import PeerId
from tessera.core.signing import AccountKey, PeerKey, recover_account, verify_peer

ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141  # of secp256k1


def test_a_secret_stays_out_of_repr() -> None:
    secret = sha256(b"a secret")
    for key in (PeerKey(secret), AccountKey(secret)):
        assert repr(secret)[2:-1] not in repr(key)
        assert secret.hex() not in repr(key)


def test_the_peer_id_is_the_public_key_of_rfc_8032() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")  # section 7.1, test 1
    assert PeerKey(seed).id == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def test_the_account_is_the_one_that_every_wallet_shows() -> None:
    secret = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")  # anvil's first account
    assert AccountKey(secret).account == "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"


@pytest.mark.parametrize("size", [0, 1, 31, 33])
def test_a_key_has_32_bytes(size: int) -> None:
    for kind in (PeerKey, AccountKey):
        with pytest.raises(Invalid, match=f"32 bytes, not {size}"):
            kind(bytes([1]) * size)


@pytest.mark.parametrize("secret", [bytes(32), ORDER.to_bytes(32, "big"), b"\xff" * 32])
def test_a_secret_outside_the_curves_order_is_refused(secret: bytes) -> None:
    with pytest.raises(Invalid, match="not a secp256k1 secret"):
        AccountKey(secret)


def test_generated_keys_differ() -> None:
    assert PeerKey.generate().id != PeerKey.generate().id
    assert AccountKey.generate().account != AccountKey.generate().account


@pytest.mark.parametrize("domain", ["", "a\0b"])
def test_a_domain_is_a_name(domain: str) -> None:
    with pytest.raises(Invalid, match="a signing domain"):
        PeerKey(bytes(32)).sign(domain, b"")


def test_a_domain_cannot_lend_its_end_to_the_message() -> None:
    key = PeerKey(bytes(32))
    signature = key.sign("vote", b"s yes")
    with pytest.raises(Invalid, match="over this votes"):
        verify_peer(key.id, "votes", b" yes", signature)


@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65), b"\xff" * 64])
def test_a_malformed_peer_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(Invalid, match="the signature is not"):
        verify_peer(PeerKey(bytes(32)).id, "receipt", b"", signature)


def test_the_identity_point_is_nobodys_key() -> None:
    """With the identity as public key, R = identity and s = 0 would verify over any message."""
    identity = bytes([1]) + bytes(31)
    with pytest.raises(Invalid):
        verify_peer(PeerId(identity.hex()), "receipt", b"anything", identity + bytes(32))


def test_a_digest_has_32_bytes() -> None:
    with pytest.raises(Invalid, match="a digest has 32 bytes"):
        AccountKey(sha256(b"key")).sign_digest(b"short")


@pytest.mark.parametrize("signature", [b"", bytes(64), bytes(65), bytes(64) + b"\x1b", b"\xff" * 64 + b"\x1b"])
def test_a_malformed_account_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(Invalid):
        recover_account(keccak(b"digest"), signature)


def test_the_twin_of_a_signature_is_refused() -> None:
    """(r, n - s, v flipped) recovers to the same account on a lax verifier: it must not count as a second one."""
    digest = keccak(b"digest")
    signature = AccountKey(sha256(b"key")).sign_digest(digest)
    s = int.from_bytes(signature[32:64], "big")
    twin = signature[:32] + (ORDER - s).to_bytes(32, "big") + bytes([55 - signature[64]])
    with pytest.raises(Invalid, match="upper half"):
        recover_account(digest, twin)


@pytest.mark.parametrize("v", [0, 1, 26, 29, 255])
def test_other_recovery_numbers_are_refused(v: Any) -> None:
    digest = keccak(b"digest")
    signature = AccountKey(sha256(b"key")).sign_digest(digest)
    with pytest.raises(Invalid, match="v 27 or 28"):
        recover_account(digest, signature[:64] + bytes([v]))

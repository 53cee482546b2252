"""The test vectors in specs/vectors: the bytes that another implementation has to produce too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tessera.core.encoding import encode
from tessera.core.hashing import keccak, sha256
from tessera.core.ids import account_from_bytes
from tessera.core.merkle import MerkleTree, share_leaf
from tessera.core.signing import AccountKey, PeerKey, recover_account, verify_peer

Golden = Callable[[str, Any], None]

VALUES: list[Any] = [
    None, True, False, 0, -1, 2**64, -(2**256), 0.0, -0.0, 1.0, 0.1, 1e-05, 0.0001, 1e15, 1e16, 5e-324,
    1.7976931348623157e308, "", "é", "\u2028", "\x00\x1f\x7f", '"\\/', "𝄞", [], {}, [1, [2, [3]]],
    {"b": 1, "a": [True, None]}, {"é": 1, "z": 2, "𝄞": 3, "\uffff": 4, "": 5, "A": 6, "a": 7},
]  # fmt: skip


def test_canonical_encoding_is_as_recorded(golden: Golden) -> None:
    rows = [{"value": value, "hex": encode(value).hex(), "sha256": sha256(encode(value)).hex()} for value in VALUES]
    golden("specs/vectors/encoding.json", rows)


def test_signatures_are_as_recorded(golden: Golden) -> None:
    rows = []
    for number, (domain, message) in enumerate([("receipt", b""), ("vote", b"\x00\xff"), ("é", b"tessera")]):
        seed = sha256(b"vector", bytes([number]))
        peer, account, digest = PeerKey(seed), AccountKey(seed), keccak(message)
        signature, account_signature = peer.sign(domain, message), account.sign_digest(digest)
        verify_peer(peer.id, domain, message, signature)
        assert recover_account(digest, account_signature) == account.account
        rows.append({
            "secret": seed.hex(), "peer": peer.id, "account": account.account, "domain": domain,
            "message": message.hex(), "signature": signature.hex(),
            "digest": digest.hex(), "account_signature": account_signature.hex(),
        })  # fmt: skip
    golden("specs/vectors/signing.json", rows)


def test_merkle_trees_are_as_recorded(golden: Golden) -> None:
    rows = []
    for size in (1, 2, 3, 5, 8):
        entries = [(account_from_bytes(sha256(bytes([i]))[:20]), 10**18 * (i + 1)) for i in range(size)]
        leaves = [share_leaf(7, account, shares) for account, shares in entries]
        tree = MerkleTree(leaves)
        rows.append({
            "epoch": 7, "root": tree.root.hex(),
            "leaves": [
                {"account": account, "shares": str(shares), "leaf": leaf.hex(),
                 "proof": [node.hex() for node in tree.proof(index)]}
                for index, ((account, shares), leaf) in enumerate(zip(entries, leaves, strict=True))
            ],
        })  # fmt: skip
    golden("specs/vectors/merkle.json", rows)

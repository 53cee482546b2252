"""What makers, holders and restorers of a snapshot must agree on to the byte: headers, the code, the encryption.

A change here means that a stage cannot be restored from pieces of before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tessera.core.hashing import sha256
from tessera.core.ids import RunId
from tessera.training import erasure, snapshot_code
from tessera.training.snapshot_code import open_snapshot, seal_snapshot, share_hash
from tessera.training.snapshot_header import Moment
from training_world import peer_keys

Golden = Callable[[str, Any], None]
MAKER, *HOLDERS = peer_keys(6)
SHARES = ("the first share", "the second share", "the third share")


def test_a_snapshot_is_as_recorded(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shamir's coefficients are random, so the shares' words are set here; the header commits to them by hash."""
    for module in ("snapshot_code", "snapshot_header"):
        monkeypatch.setattr(f"tessera.training.{module}.SEGMENT", 100)
    monkeypatch.setattr(erasure, "split_secret", lambda secret, needed, count: list(SHARES))
    state, secret = bytes(range(250)), bytes(range(32))
    holders = [key.id for key in HOLDERS[:3]]
    sealed = seal_snapshot(
        state,
        run_id=RunId("ab" * 32),
        stage=1,
        moment=Moment(7, 100),
        holders=holders,
        needed=2,
        key=MAKER,
        secret=secret,
    )
    header = sealed.header
    monkeypatch.setattr(erasure, "join_secret", lambda shares, needed: secret)
    assert open_snapshot(header, {0: sealed.fragments[0], 2: sealed.fragments[2]}, {0: SHARES[0], 1: SHARES[1]})
    golden(
        "specs/vectors/snapshot.json",
        {
            "state": state.hex(),
            "segment_bytes": 100,
            "secret": secret.hex(),
            "core": header.core().decode(),
            "key": snapshot_code._key(secret, header).hex(),
            "fragments": [fragment.hex() for fragment in sealed.fragments],
            "share_hash": {SHARES[0]: share_hash(SHARES[0])},
            "maker_seed": MAKER.seed.hex(),
            "header": header.to_value(),
            "digest": header.digest,
            "code": {
                f"{needed} of {count}": [piece.hex() for piece in erasure.encode(bytes(range(20)), needed, count)]
                for needed, count in ((2, 2), (2, 3), (3, 5), (9, 16))
            },
        },
    )


def test_shares_of_today_open_tomorrow() -> None:
    """Recorded words: SLIP-39, one group, 2 of 3, no passphrase, exponent 0."""
    assert erasure.join_secret(RECORDED[:2], 2) == erasure.join_secret(RECORDED[1:], 2) == bytes(range(32))
    assert sha256(erasure.join_secret(RECORDED[::2], 2)).hex().startswith("630dcd29")


RECORDED = [
    "revenue manual academic acid ancient segment royal lungs avoid clinic activity warn width mental "
    "steady blanket teaspoon drink rebound should painting excuse lobe square unusual snapshot brave ugly "
    "vanish sweater lying welcome genuine",
    "revenue manual academic agency arcade marathon envelope mouse gross vampire that secret pupal "
    "tactics payroll prune triumph literary born platform pants repair founder traffic ranked flip quick "
    "column obesity smell educate mother acrobat",
    "revenue manual academic always alto facility silver purchase skunk exact system license sidewalk "
    "unfair damage frozen tracks silver type amount bedroom therapy company salon width acid findings "
    "belong level dominant spend width package",
]

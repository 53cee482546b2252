"""What the members of one run must agree on to the byte: its id, receipts, frames, seats, invitations and epochs.

A change here means that workers of before and after cannot share a run.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tessera.core import encoding
from tessera.core.hashing import sha256
from tessera.core.ids import parse_account
from tessera.core.merkle import share_leaf
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import PeerRecord
from tessera.training.epochs import compute_epoch
from tessera.training.frames import Frame, Kind
from tessera.training.invitation import Invitation
from tessera.training.receipts import Receipt, payloads_digest
from tessera.training.roster import seat_binding
from training_world import account_keys, all_receipts, peer_keys, small_manifest, work_of

Golden = Callable[[str, Any], None]
MANIFEST = small_manifest()


def test_a_run_is_as_recorded(golden: Golden) -> None:
    keys, accounts = peer_keys(), account_keys()
    receipt: Receipt = all_receipts(MANIFEST, keys, range(1))[0]
    done = [3 * MANIFEST.schedule.microbatches] * 4
    leaves = compute_epoch(MANIFEST, 0, work_of([key.account for key in accounts], done))
    record = PeerRecord.sign(keys[0], ("memory:x",), 2_000_000_000)
    relays = (RelayUrl("https://relay.example", "secret-token"),)
    shown = Invitation(MANIFEST.run_id, MANIFEST.chain_id, (record,), relays, "ab" * 16, 2, 1_900_000_000)
    shown = replace(shown, signature=keys[0].sign("invitation", encoding.encode(shown._body())))
    golden(
        "specs/vectors/run.json",
        {
            "manifest": MANIFEST.canonical.decode(),
            "run_id": MANIFEST.run_id,
            "receipt": {
                "message": receipt.message().decode(),
                "row": receipt.to_row(),
                "signer_seed": keys[1].seed.hex(),
            },
            "frames": {
                kind.name: Frame(kind, term=4, step=258, index=3, payload=b"\x01\x02").to_bytes().hex() for kind in Kind
            },
            "seat_binding": {
                "peer": keys[0].id,
                "account_secret": accounts[0].secret.hex(),
                "stage": 2,
                "signature": seat_binding(MANIFEST.run_id, keys[0].id, 2, accounts[0]).hex(),
            },
            "payloads_digest": {
                "payloads": {"0": "0102", "2": "03"},
                "digest": payloads_digest({0: sha256(b"\1\2"), 2: sha256(b"\3")}).hex(),
            },
            "invitation": shown.to_text(),
            "epoch": {
                "text": leaves.to_text(),
                "root": leaves.root.hex(),
                "first_leaf": share_leaf(0, parse_account(leaves.leaves[0][0]), leaves.leaves[0][1]).hex(),
            },
        },
    )

"""What the training tests share: a small manifest, keys, and a run's worth of signed receipts."""

from __future__ import annotations

from tessera.core.ids import PeerId
from tessera.core.signing import AccountKey, PeerKey
from tessera.models.config import CodecConfig, ModelConfig, ModelSpec
from tessera.training.manifest import Allocation, DataRecipe, Manifest, Part, Schedule
from tessera.training.receipts import Receipt, expected_receipts

DATA_OWNER = AccountKey(b"\x21" * 32).account
CREATOR = AccountKey(b"\x22" * 32).account


def peer_keys(count: int = 4) -> list[PeerKey]:
    return [PeerKey(bytes([i + 1]) * 32) for i in range(count)]


def account_keys(count: int = 4) -> list[AccountKey]:
    return [AccountKey(bytes([i + 1]) * 32) for i in range(count)]


def small_manifest(stages: int = 4, steps: int = 6, epoch_steps: int = 3) -> Manifest:
    model = ModelConfig(vocab_size=64, width=16, layers=stages, heads=2, kv_heads=1, ffn=32, context=8)
    return Manifest(
        name="small",
        chain_id=31337,
        model=ModelSpec(model=model, codec=CodecConfig(kind="codec", k=4), stages=stages, seed=7),
        data=DataRecipe(dataset="ab" * 32, tokenizer="cd" * 32),
        schedule=Schedule(
            steps=steps, microbatches=3, sequences=2, length=8, evaluate_every=2, evaluate_batches=2, epoch_steps=epoch_steps
        ),
        allocation=Allocation(work=8500, data=(Part(account=DATA_OWNER, bps=1000),), creator=Part(account=CREATOR, bps=500)),
        price_units=10_000,
    )


def all_receipts(manifest: Manifest, keys: list[PeerKey], steps: range) -> list[Receipt]:
    """Every receipt that honest neighbours sign in `steps`."""
    by_id: dict[PeerId, PeerKey] = {key.id: key for key in keys}
    peers = [key.id for key in keys]
    return [
        Receipt(manifest.run_id, step, peers[stage], signer, direction, manifest.tokens_per_step, bytes(32)).signed_by(
            by_id[signer]
        )
        for step in steps
        for stage in range(len(peers))
        for direction, signer in expected_receipts(peers, stage)
    ]

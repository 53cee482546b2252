"""Bytes that a hostile peer may send in place of messages, checkpoints, tokenizers and datasets."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.core.ids import BlobId
from tessera.models.config import CodecConfig, ModelSpec
from tessera.models.dataset import INDEX_LIMIT, DatasetIndex, Shard, open_shard
from tessera.models.presets import tiny_spec
from tessera.models.tokenizer import Tokenizer, train_tokenizer
from tessera.models.trainer import StageTrainer
from tessera.models.wire import Wire

SPEC = tiny_spec(2)
IDS = np.arange(34).reshape(2, 17)


def wire(number: str) -> Wire:
    codec = CodecConfig(kind="codec", k=2, wire=number)  # type: ignore[arg-type]
    return Wire(ModelSpec(model=SPEC.model, codec=codec, stages=2))


@pytest.mark.parametrize(
    ("number", "data", "reason"),
    [
        ("int8", b"", "4 bytes, not 0"),
        ("int8", b"\0" * 5, "4 bytes, not 5"),
        ("int8", b"\0" * 10_000_000, "4 bytes, not 10000000"),
        ("int8", struct.pack("<Hbb", 0x3F80, -128, 1), "-128"),
        ("int4", struct.pack("<HB", 0x3F80, 0x81), "code -8"),
        ("int4", struct.pack("<HBB", 0x3F80, 0x11, 0), "3 bytes, not 4"),
        ("int8", struct.pack("<Hbb", 0x7F80, 1, 1), "not finite"),
        ("int8", struct.pack("<Hbb", 0x7FC0, 1, 1), "not finite"),
        ("int8", struct.pack("<Hbb", 0xBF80, 1, 1), "negative"),
        ("int8", struct.pack("<Hbb", 0x8000, 1, 1), "negative"),
        ("int8", struct.pack("<Hbb", 0x7F7F, 127, 1), "overflow"),
        ("bfloat16", struct.pack("<HH", 0x7FC0, 0), "not finite"),
        ("bfloat16", struct.pack("<HH", 0xFF80, 0), "not finite"),
        ("float32", struct.pack("<ff", float("nan"), 0), "not finite"),
        ("float32", struct.pack("<ff", 0, float("-inf")), "not finite"),
    ],
)
def test_messages_that_nobody_packs_are_refused(number: str, data: bytes, reason: str) -> None:
    with pytest.raises(Invalid, match=reason):
        wire(number).unpack(data, 1, 1)


def test_a_refused_message_leaves_the_trainer_as_it_was() -> None:
    first, last = (StageTrainer(SPEC, stage, steps=2) for stage in range(2))
    code = first.forward(0, 0, IDS, None)
    assert code is not None
    before = last.save()
    for bad in (code[:-1], code + b"\0", b"\xff" * len(code)):
        with pytest.raises(Invalid):
            last.forward(0, 0, IDS, bad)
        with pytest.raises(Invalid):
            first.backward(0, 0, bad)
    assert last.save() == before
    last.forward(0, 0, IDS, code)
    first.backward(0, 0, last.backward(0, 0, None))
    assert last.finish_step(0, 32) is not None


def good_checkpoint() -> bytes:
    return StageTrainer(SPEC, 0, steps=2).save()


def reheaded(change: object) -> bytes:
    """The checkpoint with its header replaced."""
    data = good_checkpoint()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(change).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def forged(note: object, tensors: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(tensors, metadata={"tessera": json.dumps(note)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        (2**63).to_bytes(8, "little") + b"{}",
        good_checkpoint()[:-1],
        good_checkpoint() + b"\0",
        good_checkpoint()[:100],
        reheaded({}),
        reheaded([]),
        reheaded({"__metadata__": {"tessera": "{}"}}),
        reheaded({"__metadata__": {"tessera": "[" * 100_000}}),
        reheaded({"__metadata__": 7}),
        forged({"format": "tessera/stage/1"}, {}),
        forged([], {}),
    ],
)
def test_corrupt_checkpoints_are_refused_whole(data: bytes) -> None:
    trainer = StageTrainer(SPEC, 0, steps=2)
    before = trainer.save()
    with pytest.raises(Invalid):
        trainer.load(data)
    assert trainer.save() == before


@pytest.mark.parametrize("position", [0.3, 0.6, 0.99])
def test_one_flipped_bit_in_a_checkpoint_is_seen(position: float) -> None:
    data = bytearray(good_checkpoint())
    data[int(len(data) * position)] ^= 1
    with pytest.raises(Invalid, match="digest"):
        StageTrainer(SPEC, 0, steps=2).load(bytes(data))


def test_checkpoints_of_another_stage_seed_or_shape_are_refused() -> None:
    trainer = StageTrainer(SPEC, 0, steps=2)
    with pytest.raises(Invalid, match="stage is '1'"):
        trainer.load(StageTrainer(SPEC, 1, steps=2).save())
    with pytest.raises(Invalid, match="spec"):
        trainer.load(StageTrainer(tiny_spec(2, seed=1), 0, steps=2).save())


def test_a_checkpoint_with_right_digest_but_wrong_tensors_is_refused() -> None:
    from tessera.models.checkpoint import read_checkpoint, write_checkpoint

    want = {"a": torch.zeros(2, 2)}
    for tensors, reason in (
        ({"a": torch.zeros(4)}, "expected"),
        ({"a": torch.zeros(2, 2, dtype=torch.float64)}, "expected"),
        ({"a": torch.full((2, 2), float("nan"))}, "not finite"),
        ({"b": torch.zeros(2, 2)}, "others than expected"),
        ({**want, "b": torch.zeros(1)}, "others than expected"),
    ):
        with pytest.raises(Invalid, match=reason):
            read_checkpoint(write_checkpoint(tensors, {}), want, {})
    assert torch.equal(read_checkpoint(write_checkpoint(want, {}), want, {})[0]["a"], want["a"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": {"type": "Unigram"}}',
        train_tokenizer(["abc"], 257).to_bytes().replace(b"<|end|>", b"<|fin|>"),
        b" " * (33 * 2**20),
    ],
)
def test_files_that_are_no_tokenizer_of_ours_are_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        Tokenizer.from_bytes(data)


SHARD = Shard(BlobId("ab" * 32), 100)
INDEX = DatasetIndex(300, BlobId("cd" * 32), (SHARD,), SHARD, "text")


def reindexed(**changes: object) -> bytes:
    return encoding.encode({**json.loads(INDEX.to_bytes()), **changes})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b" " * (INDEX_LIMIT + 1),
        INDEX.to_bytes()[:-1],
        INDEX.to_bytes() + b" ",
        reindexed(format="tessera/data/1"),
        reindexed(more=1),
        reindexed(vocab_size=1),
        reindexed(vocab_size=2**40),
        reindexed(vocab_size="300"),
        reindexed(vocab_size=True),
        reindexed(train=[]),
        reindexed(train={}),
        reindexed(train=[SHARD.to_value()] * 65_537),
        reindexed(train=[["../../etc/passwd", 100]]),
        reindexed(train=[[SHARD.blob, 0]]),
        reindexed(train=[[SHARD.blob, -5]]),
        reindexed(train=[[SHARD.blob, 2**63]]),
        reindexed(train=[[SHARD.blob, 1.5]]),
        reindexed(train=[[SHARD.blob]]),
        reindexed(validation=None),
        reindexed(tokenizer="tokenizer"),
        reindexed(description="x" * 201),
        reindexed(description=None),
    ],
)
def test_what_is_no_index_of_a_data_set_is_refused(data: bytes) -> None:
    assert DatasetIndex.parse(INDEX.to_bytes()) == INDEX
    with pytest.raises(Invalid):
        DatasetIndex.parse(data)


def test_a_shard_that_is_not_what_its_index_says_is_refused(tmp_path: Path) -> None:
    good = np.arange(200, 300, dtype="<u2").tobytes()
    file = tmp_path / "shard"
    file.write_bytes(good)
    assert open_shard(file, SHARD, 300).tolist() == list(range(200, 300))
    outside = good[:-2] + (300).to_bytes(2, "little")
    for bad in (b"", good[:-1], good + b"\0\0", outside):
        file.write_bytes(bad)
        with pytest.raises(Invalid, match=r"shard|data set"):
            open_shard(file, SHARD, 300)

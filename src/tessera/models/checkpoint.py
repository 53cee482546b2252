"""A stage's state as bytes: safetensors, with a digest over the tensors and the facts that must match in its header.

`read_checkpoint` trusts nothing: header size, names, shapes, types, finiteness and the digest are checked before a
tensor is handed out, so a load either succeeds whole or changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tessera.core.errors import Invalid

__all__ = ["CHECKPOINT_HEAD", "checkpoint_facts", "read_checkpoint", "write_checkpoint"]

_HEADER_LIMIT = 16 * 2**20  # bytes
_FORMAT = "tessera/stage/1"
CHECKPOINT_HEAD = 8 + _HEADER_LIMIT  # bytes in which what a checkpoint says of itself lies


def write_checkpoint(tensors: dict[str, Tensor], facts: dict[str, str]) -> bytes:
    """The bytes of a safetensors file. Equal state gives equal bytes."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    bare = safetensors.torch.save(plain)
    digest = hashlib.sha256(memoryview(bare)[8 + int.from_bytes(bare[:8], "little") :]).hexdigest()
    del bare  # as large as the whole state, and the next line makes two more
    # safetensors writes metadata in no fixed order, so it gets one entry.
    note = json.dumps({"format": _FORMAT, "digest": digest, **facts}, sort_keys=True)
    return safetensors.torch.save(plain, metadata={"tessera": note})


def read_checkpoint(
    data: bytes, expected: dict[str, Tensor], facts: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, all facts of the file).

    Args:
        expected: names with tensors of the right shape and type.
        facts: what the file must say of itself, besides anything else.

    Raises: Invalid saying what is wrong with the file.
    """
    note = _note(data)
    for key, value in {"format": _FORMAT, **facts}.items():
        if note.get(key) != value:
            raise Invalid(f"the checkpoint's {key} is {str(note.get(key))[:80]!r}, expected {value!r}")
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise Invalid(f"the checkpoint cannot be read: {error}") from error
    _compare(tensors, expected)
    return tensors, note


def checkpoint_facts(head: bytes) -> dict[str, str]:
    """What a checkpoint says of itself, from its first `CHECKPOINT_HEAD` bytes; its numbers are not looked at.

    Raises: Invalid: it is none.
    """
    size = int.from_bytes(head[:8], "little")
    if len(head) < 8 or size > min(_HEADER_LIMIT, len(head) - 8):
        raise Invalid(f"the checkpoint is cut short: {len(head)} bytes")
    try:
        note: Any = json.loads(json.loads(head[8 : 8 + size])["__metadata__"]["tessera"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Invalid(f"not a stage's checkpoint: {error!r}") from error
    if not isinstance(note, dict) or not all(isinstance(v, str) for v in note.values()):
        raise Invalid("not a stage's checkpoint: its note is no map of texts")
    return note


def _note(data: bytes) -> dict[str, str]:
    note, size = checkpoint_facts(data), int.from_bytes(data[:8], "little")
    if note.get("digest") != hashlib.sha256(memoryview(data)[8 + size :]).hexdigest():
        raise Invalid("the checkpoint is corrupt: its digest differs")
    return note


def _compare(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())[:3]
        raise Invalid(f"the checkpoint's tensors are others than expected: {', '.join(odd)}")
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise Invalid(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(want.shape)} {want.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise Invalid(f"{name} holds numbers that are not finite")

"""What the replicas of a stage must agree on to the byte: names, signatures, gradients, partitions."""

from collections.abc import Callable
from typing import Any

import torch

from tessera.core.hashing import sha256
from tessera.core.ids import RunId
from tessera.core.signing import PeerKey
from tessera.models.gradients import GradientForm
from tessera.models.numbers import pack_numbers
from tessera.models.partitions import Partitions
from tessera.training.exchange_part import PartName, SignedPart

Golden = Callable[[str, Any], None]


def test_parts_are_as_recorded(golden: Golden) -> None:
    key, name = PeerKey(b"\1" * 32), PartName(RunId("ab" * 32), "partition", 7, 1)
    row = torch.arange(-150, 150, dtype=torch.float32) / 64  # exact in every format but int8
    form = GradientForm({"b": torch.Size([2]), "a": torch.Size([1, 2])}, "float32")
    gradient = form.pack(32, 1.5, {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0, 4.0])})
    layout = {"params.a": torch.zeros(20), "muon.a": torch.zeros(20)}
    state = {"params.a": torch.arange(20.0), "muon.a": torch.arange(20.0) / 2}
    partitions = Partitions(layout, 5, 3, "float32", moments=True)
    golden(
        "specs/vectors/averaging.json",
        {
            "part": {
                "name": name.to_value(),
                "owner_seed": key.seed.hex(),
                "bytes": b"four".hex(),
                "head": SignedPart.sign(key, name, b"four").head.to_value(),
            },
            "rows": {
                "numbers": "n / 64 for n = -150 ... 149",
                "sha256": {n: sha256(pack_numbers(row, n)).hex() for n in ("float32", "bfloat16", "int8")},  # type: ignore[arg-type]
                "int8": pack_numbers(row, "int8").hex(),
            },
            "gradient": {"a": [[1.0, 2.0]], "b": [3.0, 4.0], "tokens": 32, "loss_sum": 1.5, "bytes": gradient.hex()},
            "partitions": {
                "seed": 5,
                "parameter": "a",
                "entries": 20,
                "of": [[int(i) for i in partitions._indices(round_)[0][1]] for round_ in range(3)],
                "round_1": partitions.pack(1, state).hex(),
            },
        },
    )

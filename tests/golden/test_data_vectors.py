"""Which tokens a name stands for: what every worker of a run must agree on, whatever it is written in."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tessera.core.ids import BlobId
from tessera.models.dataset import DatasetIndex, Shard, rows, validation_windows
from tessera.models.dataset_order import Mix, WindowOrder, permutation
from tessera.training.data import apportion

RUN = "ab" * 32
SIZES = [[100, 57, 20, 16, 300], [64, 64]]
WEIGHTS, LENGTH, ACTIVE = [4, 2], 16, 2


def reading(window: int) -> list[int]:
    """Set, shard and start of a window of the run."""
    chosen, number = Mix(WEIGHTS, "mix", RUN).locate(window)
    found = WindowOrder(SIZES[chosen], length=LENGTH, active=ACTIVE, name=("set", RUN, chosen)).locate(number)
    return [chosen, found.shard, found.start]


def test_the_tokens_behind_a_name_are_as_recorded(golden: Callable[[str, Any], None]) -> None:
    shard = Shard(BlobId("12" * 32), 100)
    index = DatasetIndex(1024, BlobId("34" * 32), (shard, Shard(BlobId("56" * 32), 57)), shard, "Grüße")
    ids = np.arange(200)
    assert rows(ids, [3], 4).tolist() == [[3, 4, 5, 6, 7]]
    golden(
        "specs/vectors/data.json",
        {
            "index": index.to_bytes().decode(),
            "shuffle": {"count": 8, "name": ["example", 1], "value": permutation(8, "example", 1).tolist()},
            "windows": {
                "run_id": RUN,
                "weights": WEIGHTS,
                "tokens": SIZES,
                "length": LENGTH,
                "active": ACTIVE,
                "set_shard_start": [reading(window) for window in range(60)],
            },
            "apportioned": {"total": 64, "weights": [7, 11, 13], "value": apportion(64, [7, 11, 13])},
            "validation_starts": {
                "tokens": 200,
                "length": LENGTH,
                "count": 5,
                "value": validation_windows(ids, 5, LENGTH)[:, 0].tolist(),
            },
        },
    )

"""Bytes and numbers on which peers of different versions and machines must agree.

A change here is a change of the wire format or of initial values: runs of before and after cannot be mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tessera.core.hashing import sha256
from tessera.models.noise import integers, symmetric, uniform
from tessera.models.presets import tiny_spec
from tessera.models.stage import Stage
from tessera.models.wire import Wire

Golden = Callable[[str, Any], None]


def test_noise_is_as_recorded(golden: Golden) -> None:
    golden(
        "specs/vectors/noise.json",
        {
            "uniform": [int(v * 2**24) for v in uniform((4,), 7, "a")],
            "integers": integers(3, 1_000_000, "b", 1).tolist(),
            "symmetric_sha256": sha256(symmetric((5, 3), 0.3, 0, "table").tobytes()).hex(),
        },
    )


def test_messages_are_as_recorded(golden: Golden) -> None:
    x = torch.tensor([[[1.0, -2.0, 0.5, 0.0, 3.0, 127.0, -126.5, 64.25], [0.0] * 8]])
    engine = Wire(tiny_spec())
    golden(
        "specs/vectors/messages.json",
        {
            "numbers": x.tolist(),
            "nearest_hex": engine.pack(x).hex(),
            "random_hex": engine.pack(x, ("gradient", 0, 1, 2, 0)).hex(),
        },
    )


def test_initial_values_are_as_recorded(golden: Golden) -> None:
    """Without `encode` and `decode`, whose last bit is LAPACK's."""
    digests = {"spec": tiny_spec().digest()}
    for stage in range(2):
        for name, parameter in sorted(Stage(tiny_spec(), stage).named_parameters()):
            if not name.endswith(("encode", "decode")):
                digests[name] = sha256(parameter.detach().numpy().astype("<f4").tobytes()).hex()
    golden("specs/vectors/initial_values.json", digests)

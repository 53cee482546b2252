"""Devices: what is chosen, what is refused."""

import ctypes
import sys

import pytest
import torch

from tessera.core.errors import Invalid
from tessera.models.device import (
    choose_graphs,
    fast_compute,
    free_device_bytes,
    keep_freed_memory,
    native_bfloat16,
    pick_device,
)
from tessera.models.memory import estimate_memory
from tessera.models.presets import default_spec


def test_auto_is_the_gpu_where_there_is_one() -> None:
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["", "gpu", "cuda:99", "meta", "cpu:x"])
def test_devices_that_are_not_here_are_refused(name: str) -> None:
    with pytest.raises(Invalid, match="device"):
        pick_device(name)


def test_a_new_run_computes_in_what_the_machine_is_fast_at() -> None:
    assert fast_compute() == ("bfloat16" if native_bfloat16() else "float32")


def test_freed_memory_is_kept_where_glibc_is() -> None:
    glibc = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    assert keep_freed_memory() == glibc


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 0 < free_device_bytes("cpu") < 2**60


def test_a_memory_limit_takes_graphs_from_a_stage_and_then_refuses_it() -> None:
    spec = default_spec(4)
    shape = {"sequences": 2, "length": 256, "microbatches": 5}
    needs = [estimate_memory(spec, 1, **shape, graphs=graphs).together for graphs in range(6)]

    def choose(limit_bytes: int) -> int:
        return choose_graphs(spec, 1, **shape, device="cpu", limit_bytes=limit_bytes)

    assert choose(0) == 5
    assert choose(needs[5]) == 5
    assert needs[4] == needs[5]  # the one that is made again weighs as much as the one that would be kept
    assert choose(needs[4] - 1) == 3
    assert choose(needs[1]) == 1
    small = needs[0]
    assert choose(small) == 0
    with pytest.raises(Invalid, match=r"needs \d+ MiB of RAM, \d+ MiB are free"):
        choose(small - 1)
    with pytest.raises(Invalid, match="memory limit"):
        choose(-1)


def test_tf32_stays_off() -> None:
    assert torch.get_float32_matmul_precision() == "highest"

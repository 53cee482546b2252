"""Devices: what is chosen, what is refused."""

import ctypes
import sys

import pytest
import torch

from tessera.core.errors import Invalid
from tessera.models.device import fast_compute, keep_freed_memory, native_bfloat16, pick_device


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

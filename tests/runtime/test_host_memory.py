"""A rank on a CPU keeps what it frees: buffers of a step are not faulted in again by the next."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from meshwright.runtime.host_memory import keep_freed_memory
from meshwright.runtime.launch import Device, run_ranks

MIB = 2**20


def faults_of_repeated_buffers(keeps: bool) -> tuple[bool, int]:
    """Page faults of taking, filling and freeing 64 MiB ten times, once the heap has found its size."""
    kept = keep_freed_memory(Device("cpu", "gloo")) if keeps else False

    def use() -> None:
        torch.ones(64 * MIB, dtype=torch.uint8)

    for _ in range(20):  # small blocks that settle behind the large one make it move on at first
        use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        use()
    return kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_a_buffer_that_is_freed_and_taken_again_is_not_faulted_in_again() -> None:
    ((kept, faults),) = run_ranks(1, faults_of_repeated_buffers, True)
    if not kept:
        pytest.skip("another C library than glibc")
    ((_, usual),) = run_ranks(1, faults_of_repeated_buffers, False)
    assert faults * 10 < usual  # without, the kernel hands out the pages anew every time


def test_on_other_devices_nothing_changes() -> None:
    assert not keep_freed_memory(Device("cuda", "nccl", 0))

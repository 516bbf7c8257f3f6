"""Texts of out-of-memory errors, as PyTorch and Python write them."""

from __future__ import annotations

import pytest

from meshwright.doctor.out_of_memory import Refusal, refusal_in, refusal_of_kill
from meshwright.doctor.run_records import LauncherNote

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79.15 GiB of which 1.25 GiB is free."
    " Including non-PyTorch memory, this process has 77.89 GiB memory in use. Of the allocated memory 70.50 GiB is "
    "allocated by PyTorch, and 5.25 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "68719476736 bytes. Error code 12 (Cannot allocate memory)"
)


def test_a_gpus_refusal_says_what_was_asked_for_and_what_lay_unused():
    found = refusal_in("OutOfMemoryError", CUDA)
    assert found is not None
    assert (found.by, found.requested_bytes, found.free_bytes) == ("GPU", 2 * 2**30, int(1.25 * 2**30))
    assert found.unused_bytes == int(5.25 * 2**30)
    assert found.fragmented


def test_a_cpu_allocation_says_how_many_bytes():
    found = refusal_in("RuntimeError", CPU)
    assert found == Refusal("CPU", requested_bytes=68719476736)
    assert not found.fragmented


def test_numpy_says_no_bytes_but_it_is_memory_all_the_same():
    assert refusal_in("MemoryError", "") == Refusal("CPU")


def test_other_errors_are_not_about_memory():
    assert refusal_in("RuntimeError", "Connection closed by peer [127.0.0.1]:1234") is None


@pytest.mark.parametrize(
    ("code", "kills", "found"), [(-9, 1, Refusal("kernel")), (-9, 0, None), (-9, None, None), (-11, 1, None)]
)
def test_only_a_sigkill_while_the_kernels_count_grew_is_the_kernels(
    code: int, kills: int | None, found: Refusal | None
):
    assert refusal_of_kill(LauncherNote(3, "died", code, kills)) == found

"""Memory that the C library of a rank on a CPU keeps: a step frees its activations, and the next one takes them again.

glibc gives large blocks back to the kernel when they are freed, which then hands out zeroed pages one fault at a time:
50,000 to 175,000 faults a step of a dp2 rank or a last stage, and 3 to 12 % of their processor seconds in the kernel
where memory that is kept leaves 1 to 3 % (docs/log.md, 2026-11-26).
"""

from __future__ import annotations

import ctypes
import sys

from meshwright.runtime.launch import Device

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEPT_BLOCK_BYTES = 1 << 30
"""Blocks up to this size come from the heap, and stay in it."""
NEVER_TRIM = (1 << 31) - 1


def keep_freed_memory(device: Device) -> bool:
    """Let this process keep what it frees, up to its peak, where tensors live on the CPU and the C library is glibc.
    Returns whether it does; elsewhere nothing changes. For processes that train, not for a caller's own."""
    if device.type != "cpu" or sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has no such settings
        return False
    accepted = [library.mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES), library.mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)]
    return all(accepted)

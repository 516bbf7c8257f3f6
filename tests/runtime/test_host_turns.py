"""Ranks that outnumber their cores take long turns; everybody else is scheduled as usual."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading

import pytest

from meshwright.runtime.host_turns import TURN_NS, take_long_turns
from meshwright.runtime.launch import Device, run_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scheduling of Linux")
SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def policy_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(threading.get_native_id())))
    thread.start()
    thread.join()
    return found[0]


def turn_ns() -> int:
    attributes = ctypes.create_string_buffer(48)
    number = SCHED_GETATTR[platform.machine()]
    assert ctypes.CDLL(None).syscall(ctypes.c_long(number), 0, attributes, 48, 0) == 0
    return struct.unpack("=IIQiIQQQ", attributes.raw)[5]


def test_ranks_that_outnumber_cores_are_batch_work_with_their_threads() -> None:
    ranks = len(os.sched_getaffinity(0)) + 1
    assert set(run_ranks(ranks, policy_of_a_new_thread)) == {os.SCHED_BATCH}


def test_ranks_with_a_core_each_are_scheduled_as_usual() -> None:
    assert run_ranks(1, policy_of_a_new_thread) == [os.SCHED_OTHER]


def crowded() -> tuple[bool, int, int, int]:
    os.nice(3)
    changed = take_long_turns(1000)
    return changed, os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), turn_ns()


@pytest.mark.skipif(platform.machine() not in SCHED_GETATTR, reason="number of the system call")
def test_turns_are_long_and_the_niceness_stays() -> None:
    ((changed, policy, nice, turn),) = run_ranks(1, crowded)
    assert changed
    assert policy == os.SCHED_BATCH
    assert nice == os.getpriority(os.PRIO_PROCESS, 0) + 3
    version = tuple(int(part) for part in platform.release().split(".")[:2])
    assert turn == TURN_NS or version < (6, 12)  # older kernels have turns of one length


def crowded_but_idle() -> tuple[bool, int]:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    return take_long_turns(1000), os.sched_getscheduler(0)


def test_a_policy_that_somebody_chose_is_kept() -> None:
    assert run_ranks(1, crowded_but_idle) == [(False, os.SCHED_IDLE)]


def test_ranks_on_other_devices_are_scheduled_as_usual() -> None:
    ranks = len(os.sched_getaffinity(0)) + 1
    assert set(run_ranks(ranks, policy_of_a_new_thread, device=Device("cuda", "gloo"))) == {os.SCHED_OTHER}

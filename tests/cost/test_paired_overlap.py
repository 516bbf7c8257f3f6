"""DualPipeV runs two chunks at once: expert-parallel communication hides behind the other chunk's compute."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cost.evaluate import estimate
from meshwright.cost.stack import default_stack
from meshwright.cost.workload import Workload
from meshwright.hardware.load import load as load_cluster
from meshwright.hardware.load import resize
from meshwright.layout.config import HybridParallelConfig, Schedule
from meshwright.models import load

MODEL = load("deepseek-v2-lite")
CLUSTER = resize(load_cluster("h100-sxm"), gpus=64)
CONFIG = HybridParallelConfig(dp=16, pp=4, ep=16, vpp=2, global_batch=256, zero=1, schedule=Schedule.ZBV)


def ep_seconds(schedule: Schedule, paired: float) -> tuple[float, float]:
    """Exposed and hidden."""
    stack = replace(default_stack(), ep_overlap=0.0, ep_overlap_paired=paired)
    time = estimate(MODEL, CLUSTER, Workload(seq=4096), replace(CONFIG, schedule=schedule), stack).time
    return time.parts_s["ep"], time.hidden_s["ep"]


def test_dispatch_hides_under_dualpipev_alone() -> None:
    bare, hidden = ep_seconds(Schedule.ZBV, 0.9)
    assert hidden == 0
    paired, under = ep_seconds(Schedule.DUALPIPEV, 0.9)
    assert paired < bare
    assert under > 0


def test_nothing_hides_where_the_software_does_not_pair() -> None:
    assert ep_seconds(Schedule.DUALPIPEV, 0.0)[0] == pytest.approx(ep_seconds(Schedule.ZBV, 0.0)[0], rel=1e-9)

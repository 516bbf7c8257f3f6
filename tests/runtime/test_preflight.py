"""The start-up check: all well in one line; a rank that does not come, or is of another kind, named in time."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from meshwright.cli import main
from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.preflight import Needs, Preflight, facts_here

from .jobs import plan as tiny_plan
from .jobs import text
from .tiny import tiny

CPU = Device("cpu", "gloo")
LAYOUT = HybridParallelConfig(dp=2, tp=2, global_batch=2)
SOON = Needs(limit_s=4.0)


def check(
    changes: dict[int, dict[str, Any]], asleep: str = "", needs: Needs = SOON, late_s: float = 0.0
) -> tuple[str, int]:
    """Every rank's preflight; `changes`: of a rank's facts; rank 1 sleeps before the part `asleep`."""
    rank = dist.get_rank()
    own = replace(facts_here("digest", CPU), host=f"node-{rank // 2}", **changes.get(rank, {}))
    clock_s = late_s if rank == 3 else 0.0
    flight = Preflight(_get_default_store(), rank, dist.get_world_size(), needs, clock=lambda: time.time() + clock_s)
    if rank == 1 and asleep == "compare":
        time.sleep(100)
    flight.compare(own, LAYOUT)
    if rank == 1 and asleep == "reach":
        time.sleep(100)
    flight.reach(LAYOUT, CPU)
    return flight.summary(), len(flight.facts)


def test_ranks_that_are_well_say_so_in_one_line():
    needs = replace(SOON, limit_s=60.0, master_port=29500)
    summary, seen = run_ranks(4, check, {}, "", needs)[0]
    assert seen == 4
    assert "4 ranks on 2 hosts reach each other in every group; one plan, same versions" in summary
    assert "master port 29500 is " in summary
    assert len(summary.splitlines()) == 1


@pytest.mark.parametrize(
    ("asleep", "words"),
    [
        ("compare", r"rank 1 \(host unknown\) did not come within 4 s"),
        ("reach", r"rank 1 \(node-0\) did not start to join within 4 s"),
    ],
)
def test_a_rank_that_does_not_come_is_named_in_time(asleep: str, words: str):
    started = time.monotonic()
    with pytest.raises(InputError, match=words) as caught:
        run_ranks(4, check, {}, asleep)
    assert time.monotonic() - started < 30
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({2: {"torch": "1.0"}}, r"rank 2 \(node-1\) has torch 1.0, the others "),
        ({0: {"python": "3.1"}, 3: {"meshwright": "9"}}, r"rank 0 .* Python 3.1, .*; rank 3 .* meshwright 9, "),
        ({3: {"digest": "other"}}, r"rank 3 \(node-1\) has a plan that differs"),
        ({1: {"ports": (40000, 40003)}, 0: {"ports": (40000, 40003)}}, r"rank 0 \(node-0\) may use ports 40000 to"),
        ({2: {"free_bytes": 2**30}}, r"rank 2 \(node-1\) has 1.0 GiB free where 2.0 are needed"),
    ],
)
def test_a_rank_that_is_not_like_the_others_is_named_with_its_host(changes: dict[int, dict[str, Any]], words: str):
    with pytest.raises(InputError, match=words):
        run_ranks(4, check, changes, "", replace(SOON, limit_s=60.0, rank_bytes=2**30))


def test_a_clock_that_is_ahead_is_named():
    with pytest.raises(InputError, match=r"the clock of rank 3 \(node-1\) is \d+\.\d s ahead"):
        run_ranks(4, check, {}, "", replace(SOON, limit_s=60.0), 30.0)


def test_the_command_checks_forked_ranks_before_it_trains(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    tiny_plan(tiny(vocab=264), 1, dp=2).write(tmp_path / "plan.yaml")
    common = (tmp_path / "plan.yaml", "--data", text(tmp_path), "--out", tmp_path / "run", "--preflight")
    assert main([str(argument) for argument in ("train", *common)]) == 0
    assert "preflight: 2 ranks on 1 host reach each other" in capfd.readouterr().err  # said by a rank

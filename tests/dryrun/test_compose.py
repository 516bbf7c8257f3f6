"""Stages that are not run have the traces that they would have had."""

from __future__ import annotations

from typing import Any

import pytest
from tests.runtime.layouts import SEQ, layout
from tests.runtime.tiny import tiny

from meshwright.dryrun.compose import Composer
from meshwright.dryrun.job import DryJob
from meshwright.dryrun.proof import trace_ranks
from meshwright.dryrun.roles import distinct_ranks, stage_contents
from meshwright.layout.config import Precision, Schedule
from meshwright.layout.grid import rank_layout
from meshwright.models import ModelSpec
from meshwright.runtime.engine import pipeline_schedule

FP32 = {"precision": Precision.FP32}


@pytest.mark.parametrize(
    "sizes",
    [
        {"pp": 4, "tp": 2, "global_batch": 3},
        pytest.param({"pp": 4, "dp": 2, "zero": 2, "global_batch": 10}, marks=pytest.mark.slow),
        pytest.param({"pp": 4, "global_batch": 9, "schedule": Schedule.ZBV, "vpp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_composed_trace_is_that_of_the_stage_when_it_is_run(sizes: dict[str, Any]) -> None:
    config = layout(**sizes, **FP32)
    model = tiny(layers=8 if config.vpp > 1 else 4)
    spec = ModelSpec.from_config(model.to_dict())
    job = DryJob(config, model, SEQ)
    ranks = distinct_ranks(spec, config)
    grid = rank_layout(config)
    pipeline = [int(r) for r in grid.group_of(ranks[0], "pp")]
    contents = [stage_contents(spec, config, stage) for stage in range(config.pp)]
    composer = Composer(pipeline_schedule(config), grid, contents, trace_ranks(job, ranks))
    others = [r for r in pipeline if r not in ranks]
    assert others
    for trace in trace_ranks(job, others):
        assert composer.compose(trace.rank) == trace.events

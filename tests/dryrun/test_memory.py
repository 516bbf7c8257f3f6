"""The cost model's memory of the runtime is what the runtime holds: state to the byte, the rest within 3 %."""

from __future__ import annotations

from statistics import median

import pytest
from tools.dryrun_memory import MEDIAN, WORST, measured
from tools.memory_matrix import MATRIX, MemoryCase, layout

from meshwright.cost.program.own_runtime import predicted_memory
from meshwright.cost.workload import Workload
from meshwright.dryrun.compare import rank_place
from meshwright.dryrun.job import DryJob
from meshwright.dryrun.proof import trace_ranks
from meshwright.dryrun.tracker import STATE
from meshwright.layout.config import HybridParallelConfig, Precision, Recompute, Schedule
from meshwright.models import ModelSpec

SMALL = {"num_hidden_layers": 2, "vocab_size": 4096}
FAST = [
    MemoryCase(
        "tp2 sp x pp2, recompute", layout(tp=2, pp=2, sequence_parallel=True, recompute=Recompute.FULL), "llama", SMALL
    ),
    MemoryCase("ZB-H1", layout(pp=2, schedule=Schedule.ZB_H1, global_batch=2), "qwen3", SMALL),
    MemoryCase("ZeRO-3, experts", layout(dp=4, ep=2, zero=3, global_batch=8), "mixtral", SMALL),
]


UNEVEN = {
    "num_hidden_layers": 2,
    "vocab_size": 1003,
    "hidden_size": 120,
    "intermediate_size": 246,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 20,
}
"""Shards of 4 divide few of these rows, and tp 2 not the vocabulary."""


@pytest.mark.parametrize("case", FAST, ids=lambda c: c.name)
def test_the_model_holds_what_the_runtime_holds(case: MemoryCase) -> None:
    for rank in measured(case):
        assert rank.state_is_equal, rank.state
        assert abs(rank.difference) <= WORST, rank


@pytest.mark.parametrize(
    "config",
    [
        layout(dp=4, zero=1, global_batch=8),
        layout(dp=4, tp=2, zero=3, global_batch=8),
        pytest.param(layout(dp=4, zero=1, global_batch=4), marks=pytest.mark.slow),
        pytest.param(layout(dp=8, zero=2, zero_shards=4, global_batch=16), marks=pytest.mark.slow),
        pytest.param(layout(dp=4, tp=2, pp=2, zero=1, global_batch=8), marks=pytest.mark.slow),
        pytest.param(layout(dp=4, zero=1, global_batch=8, precision=Precision.FP32), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_state_is_exact_on_every_rank_where_shards_do_not_divide_a_tensor(config: HybridParallelConfig) -> None:
    case = MemoryCase("uneven", config, "llama", UNEVEN)
    model = ModelSpec.from_config(case.model_config.to_dict())
    for trace in trace_ranks(DryJob(config, case.model_config, case.seq), range(config.world_size)):
        place = rank_place(config, trace.coordinate)
        predicted = predicted_memory(model, Workload(seq=case.seq), config, trace.coordinate["pp"], place)
        assert {k: predicted.get(k, 0) for k in STATE} == {k: trace.memory.largest.get(k, 0) for k in STATE}


@pytest.mark.slow
def test_thirty_layouts_are_within_three_percent_and_half_of_them_within_one() -> None:
    assert len({case.name for case in MATRIX}) == len(MATRIX) == 30
    worst: list[float] = []
    for case in MATRIX:
        ranks = measured(case)
        assert all(r.state_is_equal for r in ranks), ranks
        worst.append(max(abs(r.difference) for r in ranks))
    assert max(worst) <= WORST
    assert median(worst) <= MEDIAN

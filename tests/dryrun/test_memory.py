"""The cost model's memory of the runtime is what the runtime holds: state to the byte, the rest within 3 %."""

from __future__ import annotations

from statistics import median

import pytest
from tools.dryrun_memory import MEDIAN, WORST, measured
from tools.memory_matrix import MATRIX, MemoryCase, layout

from meshwright.layout.config import Recompute, Schedule

SMALL = {"num_hidden_layers": 2, "vocab_size": 4096}
FAST = [
    MemoryCase(
        "tp2 sp x pp2, recompute", layout(tp=2, pp=2, sequence_parallel=True, recompute=Recompute.FULL), "llama", SMALL
    ),
    MemoryCase("ZB-H1", layout(pp=2, schedule=Schedule.ZB_H1, global_batch=2), "qwen3", SMALL),
    MemoryCase("ZeRO-3, experts", layout(dp=4, ep=2, zero=3, global_batch=8), "mixtral", SMALL),
]


@pytest.mark.parametrize("case", FAST, ids=lambda c: c.name)
def test_the_model_holds_what_the_runtime_holds(case: MemoryCase) -> None:
    for rank in measured(case):
        assert rank.state_is_equal, rank.state
        assert abs(rank.difference) <= WORST, rank


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

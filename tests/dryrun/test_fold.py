"""A folded step is the step: the same calls in the same order, the same memory all along, on every kind of plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.runtime.layouts import DUALPIPEV, INTERLEAVED, SEQ, ZB_H1, ZBV, layout
from tests.runtime.tiny import tiny

from meshwright.dryrun.fold import Fold, FoldedStep, NotAlikeError, find_fold
from meshwright.dryrun.job import DryJob, trace_rank
from meshwright.dryrun.tracker import MemoryTracker
from meshwright.layout.config import Precision, Recompute, Schedule
from meshwright.layout.grid import rank_layout
from meshwright.runtime.engine import pipeline_schedule
from meshwright.schedules.actions import Action
from meshwright.schedules.communication import batches

FP32 = {"precision": Precision.FP32}
MIXTURE = {"family": "mixtral"}
LATENT = {"family": "deepseek_v3"}

PLANS: list[Any] = [
    ({"pp": 2, "dp": 2, "zero": 1, "global_batch": 20}, {}),
    *(
        pytest.param(sizes, model, marks=pytest.mark.slow)
        for sizes, model in (
            ({"dp": 2, "global_batch": 16}, {}),
            ({"pp": 4, "tp": 2, "sequence_parallel": True, "global_batch": 12}, {"tie_word_embeddings": True}),
            ({"pp": 2, "dp": 2, "zero": 2, "global_batch": 20, "recompute": Recompute.SELECTIVE}, {}),
            ({"pp": 2, "dp": 2, "zero": 3, "global_batch": 20, "recompute": Recompute.FULL}, {}),
            ({"pp": 2, "dp": 4, "zero": 3, "zero_shards": 2, "global_batch": 40}, {"family": "gpt_neox"}),
            ({"pp": 2, "cp": 2, "tp": 2, "global_batch": 10}, {}),
            ({"pp": 2, "global_batch": 24} | INTERLEAVED, {"layers": 8}),
            ({"pp": 2, "dp": 2, "zero": 2, "global_batch": 32} | ZB_H1, {}),
            ({"pp": 2, "dp": 2, "zero": 3, "global_batch": 40} | ZBV, {"layers": 8}),
            ({"pp": 2, "global_batch": 20} | DUALPIPEV, {"layers": 8}),
            ({"pp": 2, "dp": 2, "ep": 2, "zero": 1, "global_batch": 20}, MIXTURE),
            ({"pp": 2, "dp": 2, "tp": 2, "ep": 4, "zero": 3, "sequence_parallel": True, "global_batch": 20}, MIXTURE),
            ({"pp": 2, "dp": 2, "tp": 2, "ep": 2, "expert_tp": 2, "global_batch": 20}, MIXTURE),
            ({"pp": 2, "dp": 2, "ep": 2, "zero": 1, "global_batch": 40} | DUALPIPEV, LATENT | {"layers": 8}),
        )
    ),
]


@pytest.mark.parametrize(("sizes", "model"), PLANS, ids=str)
def test_a_folded_step_is_the_whole_step(sizes: dict[str, Any], model: dict[str, Any]) -> None:
    config = layout(**sizes, **FP32)
    job = DryJob(config, tiny(**model), SEQ)
    for stage in range(config.pp):
        rank = int(rank_layout(config).rank(pp=stage))
        folded, whole = trace_rank(job, rank), trace_rank(replace(job, fold=False), rank)
        assert whole.folded == 0
        if config.zero_shards is None:  # HSDP holds a reduced shard one block longer, and may be run whole
            assert folded.folded > 0
        assert folded.events == whole.events
        assert folded.memory == whole.memory  # the most of each kind, both peaks with action and module, the curve


@pytest.mark.parametrize("schedule", list(Schedule))
def test_what_is_run_and_what_is_repeated_are_the_schedule(schedule: Schedule) -> None:
    vpp = 2 if schedule in (Schedule.INTERLEAVED, Schedule.ZBV, Schedule.DUALPIPEV) else 1
    whole = pipeline_schedule(layout(pp=4, vpp=vpp, global_batch=48, schedule=schedule))
    for stage in range(4):
        steps = batches(whole.actions[stage])
        fold = find_fold(steps)
        if schedule is Schedule.GPIPE:
            assert fold is None
        else:
            assert fold is not None
            assert unfolded(fold) == steps
            assert len(fold.run()) == len(steps) - fold.repeats * fold.length


def unfolded(fold: Fold) -> list[tuple[Action, ...]]:
    """All steps, from those that are run alone."""
    run, block = fold.run(), fold.run()[fold.cut - fold.length : fold.cut]
    repeated = [later(step, n * fold.stride) for n in range(1, fold.repeats + 1) for step in block]
    return [*run[: fold.cut], *repeated, *(later(step, fold.microbatches) for step in run[fold.cut :])]


def later(step: tuple[Action, ...], by: int) -> tuple[Action, ...]:
    return tuple(replace(a, microbatch=a.microbatch + by) for a in step)


def test_blocks_that_are_not_alike_are_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that stays behind in one block is enough, and the stage is run whole."""
    job = DryJob(layout(pp=2, global_batch=10, **FP32), tiny(layers=2), SEQ)
    whole = trace_rank(replace(job, fold=False), 0)
    refused: list[NotAlikeError] = []
    changes, repeat = MemoryTracker.new_changes, FoldedStep._repeat

    def grown(tracker: MemoryTracker) -> list[Any]:
        found = changes(tracker)
        return [(kind, nbytes + 1) for kind, nbytes in found]

    def watched(step: FoldedStep) -> None:
        try:
            repeat(step)
        except NotAlikeError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(MemoryTracker, "new_changes", grown)
    monkeypatch.setattr(FoldedStep, "_repeat", watched)
    found = trace_rank(job, 0)
    assert len(refused) == 1
    assert found.folded == 0
    assert (found.events, found.memory) == (whole.events, whole.memory)

"""Plan -> train -> compare: what was predicted of a run beside what it measured - step, memory, every axis.

In: a `Run` and its plan in the cost model's terms. Out: `Comparison`, as rows and as one error of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cost.estimate import Estimate
from meshwright.cost.evaluate import estimate
from meshwright.doctor.cures import Question
from meshwright.doctor.oom import rank_bytes
from meshwright.doctor.run_records import Run
from meshwright.doctor.step_times import LEAST_STEPS, breakdown, step_times
from meshwright.errors import InputError

COMPARISON_FILE = "comparison.json"
COMPUTING = ("forward", "backward", "recompute", "optimizer", "host")


@dataclass(frozen=True)
class Row:
    """One thing, predicted and measured, in seconds or bytes."""

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one; None where nothing was measured."""
        return self.predicted / self.measured - 1.0 if self.measured > 0 else None


@dataclass(frozen=True)
class Comparison:
    """The first row is the step. `best_step_s` is the shortest tenth of the steps: what a busy machine hides."""

    rows: tuple[Row, ...]
    best_step_s: float
    predicted: Estimate

    @property
    def step(self) -> Row:
        return self.rows[0]

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        rows = [
            {"name": r.name, "unit": r.unit, "predicted": r.predicted, "measured": r.measured, "error": r.error}
            for r in self.rows
        ]
        return {"rows": rows, "best_step_s": self.best_step_s}


def compare_run(run: Run, question: Question) -> Comparison | None:
    """The comparison, None where the run has too few steps to say."""
    if any(len(rank.steps) < LEAST_STEPS for rank in run.ranks) or not run.ranks:
        return None
    try:
        times = step_times(run, question.config)
    except InputError:
        return None
    parts = breakdown(times)
    predicted = estimate(question.model, question.cluster, question.workload, question.config, question.stack)
    seconds = predicted.time.parts_s
    rows = [Row("step", "s", predicted.time.step_s, float(np.median(times.step_s.mean(axis=1))))]
    rows.append(Row("computing", "s", sum(seconds[name] for name in COMPUTING), parts.compute_s))
    waiting = {"pp": seconds["pp"], "dp": seconds["dp"], "tp": seconds["tp"], "cp": seconds["cp"], "ep": seconds["ep"]}
    for axis in sorted(parts.transfer_s):
        measured = parts.transfer_s[axis] + (parts.transfer_s.get("embedding", 0.0) if axis == "dp" else 0.0)
        if axis in waiting:
            rows.append(Row(f"{axis} transfers", "s", waiting[axis], measured))
    if question.config.pp > 1:
        rows.append(Row("bubble and slowest stage", "s", seconds["bubble"], parts.bubble_s + parts.imbalance_s))
    rows.append(Row("waiting for slower ranks", "s", 0.0, parts.skew_s))
    rows += _memory(run, question, predicted)
    best = float(np.quantile(times.step_s.mean(axis=1), 0.1))
    return Comparison(tuple(rows), best, predicted)


def _memory(run: Run, question: Question, predicted: Estimate) -> list[Row]:
    """Peak of the fullest rank of each distinct stage."""
    found: list[Row] = []
    for stage in predicted.memory.stages:
        seen = [
            rank_bytes(rank, {stage.stage: stage.total_bytes}, question.config.pp, question.cluster.reserved_bytes)
            for rank in run.ranks
            if rank.coordinates.get("pp") == stage.stage
        ]
        peaks = [s.peak_bytes for s in seen if s.peak_bytes]
        if peaks:
            found.append(Row(f"peak memory, stage {stage.stage}", "bytes", stage.total_bytes, max(peaks)))
    return found

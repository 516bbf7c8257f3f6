"""What a person sees while a job trains: a bar on a terminal, a line now and then in a log. Rank 0 only."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from meshwright.runtime.metrics import StepMetrics

LINES = 20
"""Of a run's log, where there is no terminal."""


class TrainingProgress:
    """A context manager; `show` after every step. Everything goes to stderr."""

    def __init__(self, first: int, total: int, enabled: bool) -> None:
        self._total = total
        self._every = max(1, (total - first) // LINES)
        self._first = first
        self._enabled = enabled
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._enabled and sys.stderr.isatty():
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._total, completed=self._first)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, metrics: StepMetrics) -> None:
        if not self._enabled:
            return
        if self._bar is not None and self._task is not None:
            text = f"loss {metrics.loss:.4f}  {metrics.tokens_per_s:,.0f} tokens/s"
            self._bar.update(self._task, completed=metrics.step, description=text)
        elif (metrics.step - self._first) % self._every == 0 or metrics.step in (self._first + 1, self._total):
            print(line_of(metrics, self._total), file=sys.stderr, flush=True)


def line_of(metrics: StepMetrics, total: int) -> str:
    """'step 10/100  loss 3.2101  gradient norm 1.23  lr 3.0e-04  12,345 tokens/s'"""
    text = (
        f"step {metrics.step}/{total}  loss {metrics.loss:.4f}  gradient norm {metrics.gradient_norm:.3f}  "
        f"lr {metrics.learning_rate:.1e}  {metrics.tokens_per_s:,.0f} tokens/s"
    )
    return text + ("  (skipped: fp16 overflow)" if metrics.skipped else "")

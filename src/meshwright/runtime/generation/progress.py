"""What a person sees while tokens are generated: a bar on a terminal, nothing in a log. Rank 0's replica only."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class GenerationProgress:
    """A context manager; `add` the number of tokens that came."""

    def __init__(self, total: int, enabled: bool) -> None:
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, console=Console(stderr=True), transient=True, disable=not (enabled and sys.stderr.isatty())
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def add(self, tokens: int) -> None:
        self._bar.advance(self._task, tokens)

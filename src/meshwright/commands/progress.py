"""Progress of a long search on stderr: shown past two seconds, only where a person watches. Out: a callback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import monotonic

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PATIENCE_S = 2.0


@contextmanager
def search_progress(what: str) -> Generator[Callable[[int, int], None]]:
    """A callback (done, total) that draws a bar once PATIENCE_S have passed; it vanishes at the end."""
    from meshwright.commands.output import console

    start = monotonic()
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed:,} of {task.total:,}"), TimeElapsedColumn())
    bar = Progress(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty())

    def show(done: int, total: int) -> None:
        if monotonic() - start > PATIENCE_S:
            if not bar.tasks:
                bar.add_task(what, total=total)
                bar.start()
            bar.update(bar.tasks[0].id, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()

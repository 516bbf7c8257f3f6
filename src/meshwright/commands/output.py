"""Where a command prints: tables to stdout, or exactly one JSON document there and everything else to stderr."""

from __future__ import annotations

import sys

from rich.console import Console, RenderableType

from meshwright.report.json_documents import dumps

LOG_WIDTH = 160
"""Columns where nobody's window limits them: a file or a pipe gets whole tables."""


class _Console(Console):
    """rich's console, but a reader that left is for `cli.main` to judge."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(stderr: bool = False) -> Console:
    """A console as wide as the window, or LOG_WIDTH where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return _Console(file=stream, width=None if stream.isatty() else LOG_WIDTH, highlight=False, soft_wrap=False)


def show(renderable: RenderableType, *, stderr: bool = False) -> None:
    """Print; into a file or pipe without the spaces that fill a window's lines."""
    target = console(stderr)
    if target.is_terminal:
        target.print(renderable)
        return
    with target.capture() as captured:
        target.print(renderable)
    lines = (line.rstrip() for line in captured.get().splitlines())
    target.file.write("\n".join(lines) + "\n")


def show_json(document: object) -> None:
    sys.stdout.write(dumps(document) + "\n")

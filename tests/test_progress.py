"""Progress of long searches, as a terminal shows it."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from meshwright.commands import output, progress


def test_a_long_search_draws_a_bar_on_a_terminal_and_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    for watched in (True, False):
        screen = io.StringIO()
        drawn = Console(file=screen, force_terminal=watched, width=80)
        monkeypatch.setattr(output, "console", lambda stderr=False, drawn=drawn: drawn)
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched, raising=False)
        with progress.search_progress("searching") as show:
            show(1, 12)
            show(12, 12)
        assert ("12 of 12" in screen.getvalue()) is watched

"""A few hundred hostile run folders, logs, dumps, plans and clusters (make fuzz: 10,000)."""

from __future__ import annotations

from tools.fuzz import fuzz


def test_hostile_input_is_answered_or_refused_and_runs_nothing() -> None:
    ended, wrong = fuzz(cases=250, seed=20261125)
    assert not wrong
    assert ended["answered"] > 20
    assert ended["refused"] > 100

"""Ranking within sweeps by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.validation.rows import row, write

from meshwright.validation import validate_file
from meshwright.validation.sweeps import kendall_tau, regret


def test_kendall_tau_counts_pairs_in_order() -> None:
    measured = np.array([1.0, 2.0, 3.0, 4.0])
    assert kendall_tau(measured, measured * 7) == 1.0
    assert kendall_tau(measured, -measured) == -1.0
    assert kendall_tau(measured, np.array([1.0, 3.0, 2.0, 4.0])) == pytest.approx((5 - 1) / 6)
    assert kendall_tau(measured, np.ones(4)) == 0.0
    # one tie of six pairs in the first: 5 / sqrt(5 * 6)
    assert kendall_tau(np.array([1.0, 2.0, 2.0, 4.0]), measured) == pytest.approx(5 / np.sqrt(30))


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(1, 1e6)), min_size=3, max_size=12))
def test_regret_is_a_share_and_nothing_where_the_best_is_chosen(pairs: list[tuple[float, float]]) -> None:
    measured, predicted = np.array(pairs).T
    assert 0.0 <= regret(measured, predicted) < 1.0
    assert regret(measured, measured) == pytest.approx(0.0, abs=1e-9)
    assert -1.0 <= kendall_tau(measured, predicted) <= 1.0 + 1e-12


def test_rows_that_differ_in_their_split_alone_are_a_sweep(tmp_path: Path) -> None:
    rows = [
        row(id="a", tp=1, dp=8),
        row(id="b", tp=2, dp=4),
        row(id="c", tp=8, dp=1),
        row(id="other batch", global_batch=128),
        row(id="other family", family="else"),
    ]
    report = validate_file(write(tmp_path / "r.jsonl", *rows))
    assert (report.sweeps.sweeps, report.sweeps.rows) == (1, 3)
    assert list(report.sweeps_by_family()) == ["tiny"]
    document = report.to_json_dict()["sweeps"]
    assert document["kendall_tau"] == 0.0  # the made-up rows all measured the same
    assert document["groups"]["tiny"]["regret"] == 0.0


def test_a_model_that_cannot_tell_configurations_apart_chooses_any_of_them() -> None:
    measured = np.array([100.0, 50.0, 75.0, 75.0])
    assert regret(measured, np.array([3.0, 3.0 * (1 + 1e-13), 1.0, 3.0])) == pytest.approx(0.25)

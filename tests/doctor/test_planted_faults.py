"""Faults of the matrix in real jobs of eight ranks (make faults: all kinds, 60 jobs)."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.faults.__main__ import run_fault, wrong_with
from tools.faults.plant import Fault


@pytest.mark.parametrize("fault", [Fault("sigkill", 6, 2), Fault("dtype", 1, 2)], ids=lambda fault: fault.kind)
def test_the_planted_fault_is_named(tmp_path: Path, fault: Fault) -> None:
    verdict, after_s, wrong = run_fault(fault, tmp_path / "run")
    assert wrong + wrong_with(fault, verdict, after_s) == []

"""What the cost model says of 40 configurations, as it was written down last (`make golden`): a change of any term or
constant shows here, and its size in the diff of the file.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from tools.golden import FILE, Case, cases

TOLERANCE = 1e-6
GOLDEN: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def now() -> dict[str, Case]:
    return {case.name: case for case in cases()}


def test_there_are_forty_configurations_and_all_are_written_down(now: dict[str, Case]) -> None:
    assert len(now) == 40
    assert set(GOLDEN) == set(now)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_an_estimate_is_what_was_written_down(name: str, now: dict[str, Case]) -> None:
    written, found = flat(GOLDEN[name]), flat(now[name].answer)
    assert found == pytest.approx(written, rel=TOLERANCE), "if this is meant, run `make golden` and look at its diff"


def flat(answer: dict[str, Any]) -> dict[str, float]:
    """Nested names joined by dots."""
    return {
        (f"{name}.{inner}" if inner else name): number
        for name, value in answer.items()
        for inner, number in (value.items() if isinstance(value, dict) else [("", value)])
    }

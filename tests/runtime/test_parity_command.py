"""`meshwright parity` from a plan file to its exit code."""

import json
from pathlib import Path

import pytest

from meshwright.cli import main

PLAN = """
version: 1
model: {{name: {model}}}
workload: {{seq: 4096}}
parallel: {{tp: 2, micro_batch: 1, global_batch: {batch}, dp: {dp}}}
"""


def plan(folder: Path, model: str = "qwen3-0.6b", dp: int = 1, batch: int = 2) -> str:
    path = folder / "plan.yaml"
    path.write_text(PLAN.format(model=model, dp=dp, batch=batch))
    return str(path)


def test_a_right_plan_exits_0_with_one_json_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["parity", plan(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True
    assert document["worst_relative_difference"] <= 1e-10
    assert document["parameters"] > 20
    assert document["loss"] == pytest.approx(4.85, abs=0.3)  # log(128) for a model that knows nothing
    assert document["model_shrunk"] is True
    assert [c["layout"] for c in document["combinations"]] == ["tp2"]
    assert document["first_divergent"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "glm-4.5"}, "cannot be run"),
        ({"dp": 32, "batch": 32}, "64 ranks, more than the 16"),
        ({"model": "no-such-model"}, "no-such-model"),
    ],
)
def test_what_cannot_be_compared_exits_2_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
):
    assert main(["parity", plan(tmp_path, **changes), "--whole-only"]) == 2  # type: ignore[arg-type]
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1

"""The format that a model is served in where nobody says one: the checkpoint's own, as far as the device has it."""

from __future__ import annotations

import pytest

from meshwright import hardware
from meshwright.cost.workload import WEIGHT_FORMAT_BYTES
from meshwright.layout.config import Precision
from meshwright.models import load
from meshwright.planner.serving_format import stored_format


@pytest.mark.parametrize(
    ("model", "cluster", "precision", "weights"),
    [
        ("llama-3.1-70b", "h100-sxm", Precision.BF16, None),
        ("deepseek-v3", "h200-sxm", Precision.FP8, None),
        ("deepseek-v3", "a100-sxm", Precision.BF16, "fp8"),
        ("llama-3.1-70b-fp8", "h100-sxm", Precision.FP8, None),
        ("gpt-oss-120b", "h100-sxm", Precision.BF16, "mxfp4"),
        ("qwen3-235b-a22b-nvfp4", "b200", Precision.NVFP4, None),
        ("qwen3-235b-a22b-nvfp4", "h100-sxm", Precision.BF16, "nvfp4"),
    ],
)
def test_a_checkpoint_is_served_as_it_is_stored(model: str, cluster: str, precision: Precision, weights: str | None):
    machine = hardware.load(cluster, nodes=1)
    found = stored_format(load(model), machine.accelerator)
    assert (found.precision, found.weight_format) == (precision, weights)


@pytest.mark.parametrize("model", ["gpt-oss-20b", "qwen3-235b-a22b-nvfp4", "deepseek-r1"])
def test_the_bytes_priced_are_those_that_the_checkpoint_stores(model: str):
    spec = load(model)
    found = stored_format(spec, hardware.load("a100-sxm", nodes=1).accelerator)
    assert found.weight_format is not None
    assert spec.weight_bits is not None
    assert WEIGHT_FORMAT_BYTES[found.weight_format] == pytest.approx(spec.weight_bits / 8, rel=0.001)

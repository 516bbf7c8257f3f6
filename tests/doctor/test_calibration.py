"""Calibration: constants that explain made-up samples are found; cores that ranks share stretch a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright import hardware
from meshwright.cost.device import device_of
from meshwright.cost.evaluate import estimate
from meshwright.cost.gemm import Gemm
from meshwright.cost.workload import Optimizer, Workload
from meshwright.doctor.calibration import fit_machine, predicted_step_s, runtime_stack
from meshwright.errors import InputError
from meshwright.hardware import Accelerator
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.measurements import LayerJob, MachineSamples, ProductSample, StepSample
from meshwright.models import ModelSpec

TRUE = Accelerator(
    "true", 2**33, 12e9, {"fp32": 70e9}, 1, "cpu", kernels={"gemm": 0.9, "k_half": 8.0, "memory": 0.4, "launch_s": 6e-5}
)
JOBS = [LayerJob(64, 2, 32, 1), LayerJob(64, 6, 32, 1), LayerJob(128, 4, 64, 4), LayerJob(256, 2, 128, 2)]


def made_up() -> MachineSamples:
    constants = device_of(replace(TRUE, kernels=TRUE.kernels | {"launch_s": 1e-6, "memory": 1.0}))
    engine = Gemm.of(TRUE, constants, 70e9, constants.gemm, operand_bytes=4.0)
    shapes = [(64, 64, 64), (256, 128, 128), (512, 512, 512), (1024, 1024, 1024)]
    products = [
        ProductSample("fp32", m, n, k, float(seconds))
        for (m, n, k), seconds in zip(shapes, engine.seconds(*np.array(shapes, float).T, result_bytes=4.0), strict=True)
    ]
    steps = [StepSample(job, predicted_step_s(TRUE, job)) for job in JOBS]
    return MachineSamples("a", "made up", 2, tuple(products), 12e9, tuple(steps), 2**28, 2**34)


def test_the_fit_explains_samples_that_the_model_made():
    fit = fit_machine(made_up(), "here")
    assert fit.step_error < 0.05
    assert fit.product_error < 0.1
    unseen = LayerJob(192, 3, 64, 2)
    assert predicted_step_s(fit.accelerator, unseen) == pytest.approx(predicted_step_s(TRUE, unseen), rel=0.1)


def test_an_unknown_constant_in_a_cluster_file_is_named():
    with pytest.raises(InputError, match=r"unknown constant kernels\.gem \(did you mean"):
        device_of(replace(TRUE, kernels={"gem": 1.0}))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_that_share_cores_take_turns(ranks: int):
    alone = replace(hardware.load("cpu", nodes=1, gpus_per_node=ranks), accelerator=TRUE, reserved_bytes=0)
    shared = replace(alone, shared_cores=2.0)
    config = HybridParallelConfig(dp=ranks, global_batch=2 * ranks, precision=Precision.FP32)
    work = Workload(seq=64, optimizer=Optimizer.ADAM_FP32)
    model = ModelSpec.from_config(JOBS[2].config())
    one, other = (estimate(model, cluster, work, config, runtime_stack(TRUE)).time for cluster in (alone, shared))
    assert other.step_s == pytest.approx(one.step_s * max(1.0, ranks / 2), rel=1e-9)
    assert sum(other.parts_s.values()) == pytest.approx(other.step_s)


def test_a_pipelines_idle_ranks_leave_their_core_to_the_others():
    alone = replace(hardware.load("cpu", nodes=1, gpus_per_node=4), accelerator=TRUE, reserved_bytes=0)
    config = HybridParallelConfig(pp=4, global_batch=2, precision=Precision.FP32)
    work = Workload(seq=64, optimizer=Optimizer.ADAM_FP32)
    model = ModelSpec.from_config(JOBS[2].config())
    one, other = (
        estimate(model, cluster, work, config, runtime_stack(TRUE)).time
        for cluster in (alone, replace(alone, shared_cores=2.0))
    )
    busy = one.step_s - one.parts_s["bubble"]
    assert other.step_s == pytest.approx(max(one.step_s, 2 * busy), rel=1e-9)
    assert other.step_s < 2 * one.step_s

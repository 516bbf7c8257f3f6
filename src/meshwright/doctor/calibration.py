"""Turn what was measured on a machine into the constants of a cluster file, with the cost model's own formulas.

In: `MachineSamples`. Out: a measured `Accelerator` and how far it is off on the samples themselves. Products give the
peak and the shape constants; steps of small models give what a kernel costs to start and what element-wise work moves.
No step of a job with axes is looked at: predictions of those stay predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost.device import device_of
from meshwright.cost.evaluate import estimate
from meshwright.cost.gemm import Gemm
from meshwright.cost.stack import Stack, stacks
from meshwright.cost.workload import Optimizer, Workload
from meshwright.hardware import Accelerator, Cluster, Link
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.measurements import LayerJob, MachineSamples, ProductSample, StepSample
from meshwright.models import ModelSpec

RUNTIME_STACKS = {"cpu": "meshwright-cpu"}
"""Stack of this project's runtime by architecture; `meshwright` elsewhere."""
BOUNDS = {"gemm": (0.05, 1.0), "k_half": (0.1, 500.0), "launch_s": (1e-7, 1e-2), "memory": (0.01, 2.0)}
"""Of the fitted constants: beyond them a fit answers noise."""
MEASURED_PRODUCTS = "best of the products measured, all processes at once"


def runtime_stack(accelerator: Accelerator) -> Stack:
    """How well our own runtime uses a device: what a plan is priced with that `meshwright train` runs."""
    return stacks()[RUNTIME_STACKS.get(accelerator.architecture, "meshwright")]


@dataclass(frozen=True)
class Fit:
    """A measured device. `product_error` (of bare products, before it is known what starting a model's kernels costs)
    and `step_error` are the median relative errors on the samples."""

    accelerator: Accelerator
    product_error: float
    step_error: float


def fit_machine(samples: MachineSamples, name: str) -> Fit:
    """The accelerator that explains the samples best: one process of this machine."""
    peaks = {p: best for p in ("fp32", "bf16", "fp16") if (best := _best_rate(samples.products, p)) > 0}
    source = f"measured by meshwright calibrate on {samples.processes} processes at once, {samples.software}"
    device = Accelerator(
        name=name,
        memory_bytes=int(samples.memory_bytes // samples.processes),
        memory_bandwidth=samples.copy_bytes_per_s,
        peak_flops=peaks,
        sm_count=1,
        architecture="cpu",
        reserved_bytes=samples.resident_bytes,
        kernels={"gemm": 1.0, "k_half": 1.0, "memory": 1.0, "launch_s": 1e-6},
        sources={
            "memory_bytes": "the machine's memory over the processes that its cores keep busy",
            "memory_bandwidth": f"{source}: a copy, bytes read and written",
            "peak_flops": f"{source}: {MEASURED_PRODUCTS}",
            "kernels": f"{source}: products by shape, steps of small Llamas",
            "reserved_bytes": "resident before a model is built",
        },
    )
    wide = [p for p in samples.products if p.precision == "fp32"]
    device = _fitted(device, ("gemm", "k_half"), lambda d: _product_errors(d, wide))
    product_error = float(np.median(np.abs(np.expm1(_product_errors(device, wide)))))
    device = _fitted(device, ("launch_s", "memory"), lambda d: _step_errors(d, samples.steps))
    return Fit(device, product_error, float(np.median(np.abs(np.expm1(_step_errors(device, samples.steps))))))


def _best_rate(products: Sequence[ProductSample], precision: str) -> float:
    rates = [2.0 * p.m * p.n * p.k / p.seconds for p in products if p.precision == precision]
    return max(rates, default=0.0)


def _fitted(
    device: Accelerator,
    names: Sequence[str],
    errors: Callable[[Accelerator], np.ndarray[tuple[int, ...], np.dtype[np.float64]]],
) -> Accelerator:
    """Constants that make the squared log error least: a coordinate search in factors that shrink from 4 to 1.02."""
    best, least = device, float(np.sum(errors(device) ** 2))
    factor = 4.0
    while factor > 1.02:
        better = False
        for name in names:
            for step in (factor, 1.0 / factor):
                least_value, most = BOUNDS[name]
                value = min(max(best.kernels[name] * step, least_value), most)
                kernels = best.kernels | {name: value}
                tried = _with_kernels(best, kernels)
                found = float(np.sum(errors(tried) ** 2))
                if found < least:
                    best, least, better = tried, found, True
        if not better:
            factor = factor**0.5
    return best


def _with_kernels(device: Accelerator, kernels: dict[str, float]) -> Accelerator:
    return replace(device, kernels=kernels)


def _product_errors(
    device: Accelerator, products: Sequence[ProductSample]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """log(predicted / measured) of every product."""
    constants = device_of(device)
    engine = Gemm.of(device, constants, device.peak_flops["fp32"], constants.gemm, operand_bytes=4.0)
    m, n, k = (np.array([float(getattr(p, side)) for p in products]) for side in "mnk")
    predicted = engine.seconds(m, n, k, result_bytes=4.0)
    return np.log(predicted / np.array([p.seconds for p in products]))


def _step_errors(device: Accelerator, steps: Sequence[StepSample]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """log(predicted / measured) of every step."""
    return np.log([predicted_step_s(device, s.job) / s.step_s for s in steps])


def predicted_step_s(device: Accelerator, job: LayerJob) -> float:
    """What the cost model says of a step of one rank."""
    nothing = Link("none", 1e12, 0.0)
    cluster = Cluster("one", device, 1, 1, 1, nothing, nothing)
    config = HybridParallelConfig(
        micro_batch=job.micro_batch, global_batch=job.micro_batch * job.microbatches, precision=Precision.FP32
    )
    work = Workload(seq=job.seq, optimizer=Optimizer.ADAM_FP32)
    model = ModelSpec.from_config(job.config())
    return estimate(model, cluster, work, config, runtime_stack(device)).time.step_s

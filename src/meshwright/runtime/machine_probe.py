"""Measure what this machine computes: products by shape, copies, and whole layers through the engine.

In: how many processes keep the cores busy at once (a rank is never alone on its machine). Out: plain samples that
`doctor.calibration` turns into the constants of a cluster file. Runs where torch is, and only there.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.measurements import LayerJob, MachineSamples, ProductSample, StepSample
from meshwright.runtime.engine import EngineOptions, build_engine
from meshwright.runtime.families import family_of
from meshwright.runtime.host_memory import keep_freed_memory
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.model_config import config_from_values
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.rank_record import resident_bytes_now
from meshwright.runtime.weights import SeededWeights, meta_model

PRODUCTS: tuple[tuple[int, int, int], ...] = (
    *((64, 64, 64), (64, 128, 128), (256, 64, 64), (256, 128, 128), (256, 352, 128), (128, 256, 352)),
    *((512, 512, 512), (512, 1376, 512), (1024, 1024, 1024), (64, 1024, 1024), (1024, 64, 1024), (2048, 512, 512)),
)
"""(m, n, k): from the toys that a laptop trains to what fills its caches."""
PRECISIONS = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}
COPY_BYTES = 64 * 2**20
SAMPLE_S = 0.04
LIMIT_S = 300.0
STEPS = 7


LAYER_JOBS = (
    *(LayerJob(64, layers, 32, 1) for layers in (2, 6)),
    *(LayerJob(128, layers, 64, 4) for layers in (2, 6)),
    *(LayerJob(256, layers, 128, 2) for layers in (2, 4)),
    LayerJob(64, 2, 32, 1, microbatches=8),
)


def measure_machine(processes: int) -> MachineSamples:
    """Every process measures at the same time as the others."""
    for job in LAYER_JOBS:
        meta_model(config_from_values(job.config(), "calibration"))  # the model's code is imported before the fork
    found: list[MachineSamples] = run_ranks(processes, _measure, timeout_s=LIMIT_S)

    def middle(values: list[float]) -> float:
        return statistics.median(values)

    first = found[0]
    return MachineSamples(
        processes=processes,
        products=tuple(
            replace(sample, seconds=middle([f.products[i].seconds for f in found]))
            for i, sample in enumerate(first.products)
        ),
        copy_bytes_per_s=middle([f.copy_bytes_per_s for f in found]),
        steps=tuple(
            replace(sample, step_s=middle([f.steps[i].step_s for f in found])) for i, sample in enumerate(first.steps)
        ),
        resident_bytes=max(f.resident_bytes for f in found),
        host=first.host,
        software=first.software,
        memory_bytes=first.memory_bytes,
    )


def _measure() -> MachineSamples:
    keep_freed_memory(Device("cpu", "gloo"))  # as a rank that trains does
    resident = resident_bytes_now()
    products = [_product(p, *shape) for p in PRECISIONS for shape in (PRODUCTS if p is Precision.FP32 else NARROW)]
    dist.barrier()
    copied = _copy()
    steps: list[StepSample] = []
    for job in LAYER_JOBS:
        dist.barrier()
        steps.append(StepSample(job, _step(job)))
    return MachineSamples(
        host=platform.node(),
        software=f"torch {torch.__version__}, {dist.get_backend()}",
        processes=dist.get_world_size(),
        products=tuple(products),
        copy_bytes_per_s=copied,
        steps=tuple(steps),
        resident_bytes=resident,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


NARROW = ((256, 256, 256),)
"""Narrow formats are measured at one shape: CPUs without units for them are slow at any."""


def _repeated(call: Callable[[], object]) -> float:
    """Median seconds of a call over about SAMPLE_S, after one that warms up. Processor time: other programs on the
    machine are not this device's speed."""
    call()
    times: list[float] = []
    until = time.perf_counter() + SAMPLE_S
    while len(times) < 5 or (time.perf_counter() < until and len(times) < 2000):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def _product(precision: Precision, m: int, n: int, k: int) -> ProductSample:
    left, right = torch.randn(m, k).to(PRECISIONS[precision]), torch.randn(k, n).to(PRECISIONS[precision])
    out = torch.empty(m, n, dtype=left.dtype)
    return ProductSample(precision.value, m, n, k, _repeated(lambda: torch.mm(left, right, out=out)))


def _copy() -> float:
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2.0 * COPY_BYTES / _repeated(lambda: target.copy_(source))


def _step(job: LayerJob) -> float:
    """Processor seconds of this rank in a step, with as many replicas beside it as there are processes. What they
    exchange is small beside what they compute, and is counted."""
    config = config_from_values(job.config(), "calibration")
    own = job.micro_batch * job.microbatches
    parallel = HybridParallelConfig(
        dp=dist.get_world_size(),
        micro_batch=job.micro_batch,
        global_batch=own * dist.get_world_size(),
        precision=Precision.FP32,
    )
    groups = ProcessGroupManager(parallel, Device("cpu", "gloo"))
    source = SeededWeights(config, family_of(config), 0)
    engine = build_engine(parallel, config, groups, source, EngineOptions(seq=job.seq))
    tokens = torch.randint(0, 256, (own, job.seq))
    times: list[float] = []
    for _ in range(STEPS):
        start = time.process_time()
        engine.step(tokens, tokens)
        times.append(time.process_time() - start)
    groups.close()
    return statistics.median(times[1:])

"""One serving measurement: `serving_case(row)` turns a row into what the serving model takes and what it is held to.

In: the typed fields of a row with a `kind`. Out: a `ServingCase`; SkippedError where the row says too little or its
kind is not predicted, InputError where it is malformed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meshwright.cost.serving_stack import ServingStack, serving_stack_for
from meshwright.cost.workload import ServingWorkload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.models.fields import Fields
from meshwright.models.spec import ModelSpec, MoeMlp
from meshwright.validation.clusters import ClusterFacts
from meshwright.validation.measured import positive
from meshwright.validation.scored import Group
from meshwright.validation.serving_readings import EIGHT_BIT_CACHE, formats, requests
from meshwright.validation.shapes import Shapes
from meshwright.validation.skip import SkippedError


class Kind(StrEnum):
    """What was measured, in the words of the rows."""

    THROUGHPUT = "throughput"  # output tokens/s with as many requests in flight as fit
    STATIC_LATENCY = "static_batch_latency"  # of one batch from prompt to last token
    STATIC_THROUGHPUT = "static_batch_throughput"
    DECODE = "batch1_decode"  # of one sequence after a short prompt
    TTFT = "ttft_batch1"  # of one prompt: scored as prompt tokens/s
    OOM = "oom"


SHORT_PROMPT, SHORT_OUTPUT = 8, 200
"""Where a decode row does not say its lengths."""


@dataclass(frozen=True)
class ServingCase:
    """A row ready to be predicted. `batch` is per replica, None where the engine takes what fits; `measured_rate` is in
    tokens/s per GPU: output tokens, but prompt tokens of a TTFT row."""

    group: Group
    kind: Kind
    model: ModelSpec
    cluster: Cluster
    workload: ServingWorkload
    stack: ServingStack
    config: HybridParallelConfig
    weight_bytes: float | None
    batch: int | None
    gpus: int
    measured_rate: float | None
    measured_gib: float | None
    assumed: tuple[str, ...]


def is_serving(row: Fields) -> bool:
    """Serving rows have a `kind`; training rows have none."""
    return row.values.get("kind") is not None


def serving_case(row: Fields, group: Group, shapes: Shapes) -> ServingCase:
    """The row as a case."""
    word = row.text("kind")
    if word not in tuple(Kind):
        raise SkippedError(f"kind {word[:40]} is not predicted")
    kind = Kind(word)
    assumed: list[str] = []
    model = shapes.model(row)
    facts = ClusterFacts.of(row)
    precision, weight_bytes = formats(row, shapes.cluster(facts).accelerator)
    config = _config(row, model, facts.gpus, precision)
    workload = _workload(row, kind, precision, assumed)
    batch = row.whole("batch")
    if batch is None and kind is not Kind.THROUGHPUT:
        raise SkippedError("batch is not stated")
    numbers = row.section("measured")
    per_replica = None if batch is None or kind is Kind.THROUGHPUT else -(-batch // config.dp)
    return ServingCase(
        group=group,
        kind=kind,
        model=model,
        cluster=shapes.cluster(facts),
        workload=workload,
        stack=serving_stack_for(row.text("framework")),
        config=config,
        weight_bytes=weight_bytes,
        batch=per_replica,
        gpus=facts.gpus,
        measured_rate=_measured_rate(numbers, kind, workload, batch or 1, facts.gpus) if numbers else None,
        measured_gib=positive(numbers, "peak_mem_gib") if numbers else None,
        assumed=tuple(assumed),
    )


def _measured_rate(numbers: Fields, kind: Kind, workload: ServingWorkload, batch: int, gpus: int) -> float | None:
    """Tokens/s per GPU as published, or from the published latency."""
    if kind is Kind.TTFT:
        ttft = positive(numbers, "ttft_ms")
        return batch * workload.prompt / (ttft / 1e3) / gpus if ttft else None
    published = positive(numbers, "tokens_per_s_per_gpu_output")
    if published is not None:
        return published
    latency = positive(numbers, "latency_ms")
    if latency is not None and kind is Kind.STATIC_LATENCY:
        return batch * workload.output / (latency / 1e3) / gpus
    return None


def _workload(row: Fields, kind: Kind, precision: Precision, assumed: list[str]) -> ServingWorkload:
    prompt, output = row.whole("isl"), row.whole("osl")
    if kind is Kind.DECODE and prompt is None and output is None:
        prompt, output = SHORT_PROMPT, SHORT_OUTPUT
        assumed.append(f"prompt {prompt}, output {output}")
    if prompt is None or output is None:
        raise SkippedError("isl or osl is not stated")
    cache = row.text("kv_precision").lower()
    if not cache:
        cache = "fp8" if precision in EIGHT_BIT_CACHE else "fp16"
        assumed.append(f"cache in {cache}")
    wide = {"fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "fp32": 4.0}
    if cache not in wide:
        raise SkippedError(f"kv_precision {cache[:40]} is not known")
    asked = requests(row, prompt, output, assumed) if kind is Kind.THROUGHPUT else None
    return ServingWorkload(prompt, output, kv_bytes_per_element=wide[cache], requests=asked)


def _config(row: Fields, model: ModelSpec, gpus: int, precision: Precision) -> HybridParallelConfig:
    """The row's split. Under attention-DP every rank of the group attends to its own sequences: tp becomes dp. Experts
    that are not spread over ep are split over tp."""
    tp, pp, ep = row.size("tp", default=1), row.size("pp", default=1), row.size("ep", default=1)
    if row.flag("attention_dp"):
        tp = 1
    if gpus % (tp * pp):
        raise SkippedError(f"tp x pp = {tp * pp} does not divide the {gpus} GPUs stated")
    dp = gpus // (tp * pp)
    if (dp * tp) % ep:
        raise SkippedError(f"ep {ep} does not divide the {dp * tp} ranks of a stage")
    routed = any(isinstance(kind.mlp, MoeMlp) for kind in model.kinds)
    expert_tp = tp // ep if routed and tp % ep == 0 else 1
    return HybridParallelConfig(dp=dp, tp=tp, pp=pp, ep=ep, expert_tp=max(expert_tp, 1), precision=precision)

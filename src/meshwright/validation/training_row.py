"""One training measurement: `training_case(row)` turns a row into what the cost model takes and what it is held to.

In: the typed fields of a row (schema: docs/validation.md). Out: a `TrainingCase`; SkippedError where the row says too
little, InputError where it is malformed. Unknown knobs take the defaults of `readings`, noted in `assumed`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from meshwright.cost.stack import Stack, stack_for
from meshwright.cost.workload import Optimizer, Workload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.models.fields import Fields
from meshwright.models.spec import DenseMlp, ModelSpec, MoeMlp
from meshwright.validation import readings
from meshwright.validation.clusters import ClusterFacts
from meshwright.validation.layer_split import split_by_cost
from meshwright.validation.measured import Measured, measured
from meshwright.validation.scored import Group
from meshwright.validation.shapes import Shapes
from meshwright.validation.skip import SkippedError

LARGEST_BATCH = 10**9
MOST_ASSUMED_MICRO_BATCH = 4


@dataclass(frozen=True)
class TrainingCase:
    """A row ready to be predicted. `configs` are tried in order until one fits: several only where the source does not
    say what was recomputed. `fit_counts` where the row can tell whether a fit was predicted rightly."""

    group: Group
    model: ModelSpec
    cluster: Cluster
    workload: Workload
    stack: Stack
    configs: tuple[HybridParallelConfig, ...]
    memory: readings.MemoryReading
    measured: Measured
    fit_counts: bool
    assumed: tuple[str, ...]


def training_case(row: Fields, group: Group, shapes: Shapes) -> TrainingCase:
    """The row as a case."""
    model = shapes.model(row)
    facts = ClusterFacts.of(row)
    cluster = shapes.cluster(facts)
    stack = stack_for(f"{row.text('framework')}; {row.text('overlap')}; schedule {row.text('schedule')};")
    precision = _precision(row)
    assumed: list[str] = []
    config, recompute = _config(row, facts, model, precision, assumed)
    if stack.splits_by_cost and config.pp > 1 and config.vpp == 1:
        config = replace(config, layer_split=split_by_cost(model, config.pp))
    early = readings.is_early_megatron(stack.name, cluster.accelerator.architecture, precision)
    workload = Workload(
        seq=_stated(row, "seq"),
        optimizer=Optimizer.ADAM_FP32 if precision is Precision.FP32 else Optimizer.ADAM_MIXED,
        gradient_bytes=readings.gradient_bytes(row, precision, stack.gradient_bytes),
        flash_attention=readings.flash_attention(row, early),
        attention=readings.attention_kernel(row),
        fused_norm=readings.fused_norm(row),
        dropout=early and _plain_mlp(model),  # Megatron's GPT trained with dropout 0.1
        capacity_factor=readings.capacity_factor(row),
    )
    if recompute.note:
        assumed.append(recompute.note)
    return TrainingCase(
        group=group,
        model=model,
        cluster=cluster,
        workload=workload,
        stack=stack,
        configs=tuple(replace(config, recompute=mode, recompute_every=n) for mode, n in recompute.choices),
        memory=readings.memory_kind(row),
        measured=measured(row, workload.seq, facts.gpus),
        fit_counts=recompute.stated and readings.device_memory_stated(row),
        assumed=tuple(assumed),
    )


def _stated(row: Fields, name: str, most: int = LARGEST_BATCH) -> int:
    """A size without which nothing can be predicted."""
    value = row.whole(name, most=most)
    if value is None:
        raise SkippedError(f"{name} is not stated")
    return value


def _precision(row: Fields) -> Precision:
    word = row.text("precision").lower()
    if not word:
        raise SkippedError("precision is not stated")
    if word not in tuple(Precision):
        raise SkippedError(f"precision {word[:40]} is not known")
    return Precision(word)


def _config(
    row: Fields, facts: ClusterFacts, model: ModelSpec, precision: Precision, assumed: list[str]
) -> tuple[HybridParallelConfig, readings.RecomputeReading]:
    """The row's split, mended where its sizes do not agree."""
    tp, pp, dp = (_stated(row, name) for name in ("tp", "pp", "dp"))
    cp = row.size("cp", default=1)
    if tp * pp * dp * cp != facts.gpus:
        raise SkippedError(f"tp x pp x dp x cp = {tp * pp * dp * cp} is not the {facts.gpus} GPUs stated")
    vpp = _chunks(row, pp, assumed)
    micro, batch = _batches(row, dp, pp, assumed)
    ep, expert_tp = _experts(row, model, dp * cp * tp, assumed)
    zero = readings.zero(row, dp * cp, pp, facts.gpus_per_node)
    sp = row.values.get("sp")
    if sp is None and tp > 1:
        assumed.append("sequence parallel: on")
    if zero.note:
        assumed.append(zero.note)
    config = HybridParallelConfig(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        expert_tp=expert_tp,
        vpp=vpp,
        sequence_parallel=tp > 1 and row.flag("sp", default=True),
        micro_batch=micro,
        global_batch=batch,
        schedule=readings.schedule(row, pp, vpp),
        zero=zero.stage,
        zero_shards=zero.shards,
        precision=precision,
    )
    return config, readings.recompute(row)


def _chunks(row: Fields, pp: int, assumed: list[str]) -> int:
    """Chunks per stage: 1 without a pipeline and where the source does not say."""
    vpp = row.whole("vpp")
    if pp == 1:
        return 1
    if vpp is None:
        assumed.append("vpp: 1")
        return 1
    return vpp


def _batches(row: Fields, dp: int, pp: int, assumed: list[str]) -> tuple[int, int]:
    """(micro batch, global batch). Where not said, a microbatch is one sequence in a pipeline and all of a replica's
    batch, up to four, without. A global batch that is no multiple of dp x micro batch is rounded to one."""
    batch, micro = _stated(row, "global_batch"), row.whole("micro_batch", most=LARGEST_BATCH)
    if micro is None:
        micro = 1 if pp > 1 else min(max(batch // dp, 1), MOST_ASSUMED_MICRO_BATCH)
        assumed.append(f"micro batch: {micro}")
    whole = max(1, round(batch / (dp * micro))) * dp * micro
    if whole != batch:
        assumed.append(f"global batch: {whole} for {batch}, a whole number of microbatches")
    return micro, whole


def _experts(row: Fields, model: ModelSpec, stage_ranks: int, assumed: list[str]) -> tuple[int, int]:
    """(ep, expert tp): 1 where not said; an ep that does not divide the stage's ranks is cut to one that does."""
    ep, expert_tp = row.size("ep", default=1), row.size("etp", "expert_tp", default=1)
    if not any(isinstance(kind.mlp, MoeMlp) for kind in model.kinds):
        if ep > 1:
            assumed.append("ep: 1, the model has no experts")
        return 1, 1
    if stage_ranks % expert_tp:
        raise SkippedError(f"expert tp {expert_tp} does not divide the {stage_ranks} ranks of a stage")
    room = stage_ranks // expert_tp
    if room % ep:
        assumed.append(f"ep: {gcd(room, ep)} for {ep}, which does not divide the {room} ranks of a stage")
        ep = gcd(room, ep)
    return ep, expert_tp


def _plain_mlp(model: ModelSpec) -> bool:
    """GPT's feed-forward block: two products with GELU between, no gate."""
    return all(isinstance(kind.mlp, DenseMlp) and not kind.mlp.gated for kind in model.kinds)

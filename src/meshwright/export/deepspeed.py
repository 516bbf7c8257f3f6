"""A plan as a DeepSpeed configuration. In: an `ExportJob`. Out: JSON for `deepspeed.initialize(config=...)`.

DeepSpeed's file holds batch sizes, formats, ZeRO, AutoTP and Ulysses sequence parallelism; pipeline stages and experts
are arguments of its Python classes, so plans with those are refused.
"""

from __future__ import annotations

import json
from typing import Any

from meshwright.export.job import Exported, ExportJob, refuse
from meshwright.layout.config import Precision, Recompute

FORMATS = {Precision.FP32: None, Precision.FP16: "fp16", Precision.BF16: "bf16"}


def deepspeed(job: ExportJob) -> Exported:
    """The file, with notes on what its caller must do."""
    config = job.config
    _check(job)
    zero: dict[str, Any] = {"stage": config.zero}
    if config.zero:
        zero |= {"overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": True}
    if config.zero == 3 and config.zero_shards not in (None, config.dp * config.cp):
        zero["mics_shard_size"] = config.zero_shards
    document: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.num_microbatches,
        "zero_optimization": zero,
        "gradient_clipping": job.run.gradient_clip,
        "optimizer": {"type": "AdamW", "params": {"lr": job.run.learning_rate, "weight_decay": job.run.weight_decay}},
    }
    name = FORMATS[config.precision]
    if name is not None:
        document[name] = {"enabled": True}
    if job.workload.gradient_bytes != 2 and config.precision is Precision.BF16:
        document["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.tp > 1:
        document["tensor_parallel"] = {"autotp_size": config.tp}
    if config.cp > 1:
        document |= {"sequence_parallel_size": config.cp, "data_parallel_size": config.dp}
    return Exported(json.dumps(document, indent=2) + "\n", _notes(job))


def _check(job: ExportJob) -> None:
    config = job.config
    if config.pp > 1:
        raise refuse("DeepSpeed's configuration", "stages are an argument of PipelineModule", "plan with --pp 1")
    if config.ep > 1 or config.expert_tp > 1:
        raise refuse("DeepSpeed's configuration", "expert sizes are arguments of its MoE layer", "plan with --ep 1")
    if config.precision not in FORMATS:
        raise refuse("DeepSpeed", f"{config.precision.value} is no format of its configuration", "plan with bf16")
    if config.tp > 1 and config.zero == 3:
        raise refuse("DeepSpeed", "AutoTP training goes with ZeRO stages up to 2", "plan with --zero 2 or --tp 1")
    if config.sequence_parallel and config.tp > 1:
        raise refuse("DeepSpeed", "AutoTP has no sequence parallelism", "plan with --no-sp")
    if job.workload.optimizer not in (None, "adam-mixed", "adam-fp32"):
        raise refuse("DeepSpeed", f"{job.workload.optimizer} is not exported", "plan with adam-mixed")
    if config.zero in (1, 2) and config.zero_shards not in (None, config.dp * config.cp):
        raise refuse("DeepSpeed", "it shards within groups for ZeRO-3 only (MiCS)", "plan with --zero 3")


def _notes(job: ExportJob) -> tuple[str, ...]:
    config = job.config
    nodes, gpus = job.cluster.nodes, job.cluster.gpus_per_node
    notes = [f"launch {config.world_size} ranks: deepspeed --num_nodes {nodes} --num_gpus {gpus} train.py"]
    if config.recompute is not Recompute.NONE:
        notes.append(f"recompute={config.recompute.value} is the model's own (gradient_checkpointing_enable())")
    return tuple(notes)

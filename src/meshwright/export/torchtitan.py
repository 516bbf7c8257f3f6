"""A plan as a configuration module for torchtitan: a function that returns its Trainer.Config.

In: an `ExportJob`. Out: Python text for `--module FILE --config planned`. Fields are those of torchtitan of August 2026
(`torchtitan/config/configs.py`); the model is one that torchtitan configures itself.
"""

from __future__ import annotations

import json
from typing import cast

from meshwright.export.job import Exported, ExportJob, refuse
from meshwright.layout.config import ContextVariant, Precision, Recompute, Schedule
from meshwright.layout.split import layer_ranges

RECIPES = {
    "llama-3-8b": ("llama3", "llama3_8b"), "llama-3.1-8b": ("llama3", "llama3_8b"),
    "llama-3-70b": ("llama3", "llama3_70b"), "llama-3.1-70b": ("llama3", "llama3_70b"),
    "llama-3.1-405b": ("llama3", "llama3_405b"),
    "qwen3-0.6b": ("qwen3", "qwen3_0_6b"), "qwen3-1.7b": ("qwen3", "qwen3_1_7b"), "qwen3-14b": ("qwen3", "qwen3_14b"),
    "qwen3-32b": ("qwen3", "qwen3_32b"), "qwen3-30b-a3b": ("qwen3", "qwen3_30b_a3b"),
    "deepseek-v3": ("deepseek_v3", "deepseek_v3_671b"),
    "gpt-oss-20b": ("gpt_oss", "gpt_oss_20b"), "gpt-oss-120b": ("gpt_oss", "gpt_oss_120b"),
}  # fmt: skip
"""Catalogue names with torchtitan's module and function of the same model."""
SCHEDULES = {
    Schedule.GPIPE: "GPipe",
    Schedule.ONE_F_ONE_B: "1F1B",
    Schedule.INTERLEAVED: "Interleaved1F1B",
    Schedule.ZBV: "ZBVZeroBubble",
    Schedule.DUALPIPEV: "DualPipeV",
}


def torchtitan(job: ExportJob) -> Exported:
    """The module."""
    _check(job)
    module, function = RECIPES[job.model.name]
    config, run = job.config, job.run
    training = {
        "num_tokens_per_microbatch_per_dp_rank": config.micro_batch * job.workload.seq,
        "num_tokens_per_train_step": config.global_batch * job.workload.seq,
        "max_context_length": job.workload.seq,
        "steps": run.steps,
        "max_norm": run.gradient_clip,
    }
    full = config.recompute is Recompute.FULL
    nodes, gpus = job.cluster.nodes, job.cluster.gpus_per_node
    lines = [
        f'"""{job.heading}.',
        "",
        f"On each node: torchrun --nnodes {nodes} --nproc-per-node {gpus} --rdzv-backend c10d",
        "--rdzv-endpoint HEAD:29400 -m torchtitan.train --module NAME_OF_THIS_MODULE --config planned",
        '"""',
        "",
        "from torchtitan.config import ParallelismConfig",
        *(["from torchtitan.distributed.activation_checkpoint import FullAC"] if full else []),
        f"from torchtitan.models.{module}.config_registry import {function}",
        "from torchtitan.trainer import Trainer",
        "",
        "",
        "def planned() -> Trainer.Config:",
        f"    config = {function}()",
        "    config.parallelism = ParallelismConfig(",
        *(f"        {name}={_literal(value)}," for name, value in _parallelism(job).items()),
        "    )",
        *(f"    config.training.{name} = {value!r}" for name, value in training.items()),
        f"    config.activation_checkpoint = {'FullAC.Config()' if full else 'None'}",
        "    return config",
    ]
    notes = ("optimizer, learning rate and data are the recipe's own; change them in planned()",)
    return Exported("\n".join(lines) + "\n", notes)


def _literal(value: object) -> str:
    """A Python literal, lists of lists one line each."""
    if isinstance(value, list):
        rows = cast("list[list[str]]", value)
        return "[\n" + "".join(f"            {json.dumps(row)},\n" for row in rows) + "        ]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _check(job: ExportJob) -> None:
    config = job.config
    if job.model.name not in RECIPES:
        raise refuse("torchtitan", f"it configures no {job.model.name}", f"it has {', '.join(sorted(RECIPES))}")
    if config.pp > 1 and config.schedule not in SCHEDULES:
        raise refuse(
            "torchtitan",
            f"torch has no {config.schedule.value} schedule",
            "plan with --schedule 1f1b or zbv",
        )
    if config.precision is not Precision.BF16:
        raise refuse("torchtitan", f"{config.precision.value} needs a recipe with converters", "plan with bf16")
    if config.recompute is Recompute.SELECTIVE or config.recompute_every > 1:
        raise refuse(
            "torchtitan", "it recomputes whole layers or by operator, not the core attention or one layer in n",
            "plan with --recompute full or none",
        )  # fmt: skip
    if job.workload.optimizer not in (None, "adam-mixed"):
        raise refuse("torchtitan", f"its recipes have no {job.workload.optimizer}", "plan with adam-mixed")
    if config.cp > 1 and config.cp_variant is ContextVariant.ALL_TO_ALL:
        raise refuse("torchtitan", "its context parallelism exchanges no heads", "plan with --cp-variant ring")
    if config.expert_tp > 1:
        raise refuse("torchtitan", "it has no tensor parallelism of experts", "plan with --expert-tp 1")
    _, shards, _ = _shards(job)
    within = shards * config.cp * config.tp
    if within % config.ep:
        raise refuse("torchtitan", f"ep={config.ep} does not divide {within} sharded ranks", "plan with more shards")


def _shards(job: ExportJob) -> tuple[int, int, str]:
    """(replicas, shards, when parameters are dropped). FSDP's mesh is dp_shard x cp."""
    config = job.config
    spread = config.dp * config.cp
    if config.zero == 0 and spread > 1:
        raise refuse(
            "torchtitan", "ZeRO-0 keeps every state whole, and its replicas share theirs by FSDP", "plan with --zero 3"
        )
    if config.zero == 1 and config.pp == 1 and spread > 1:
        raise refuse("torchtitan", "FSDP without a pipeline shards gradients too", "plan with --zero 2 or 3")
    shards = config.zero_shards or spread
    if shards % config.cp:
        raise refuse("torchtitan", f"shards ({shards}) are whole multiples of cp ({config.cp})", "plan with cp 1")
    return spread // shards, shards // config.cp, "always" if config.zero == 3 else "never"


def _parallelism(job: ExportJob) -> dict[str, object]:
    config = job.config
    replicas, shards, reshard = _shards(job)
    fields: dict[str, object] = {
        "data_parallel_replicate_degree": replicas,
        "data_parallel_shard_degree": shards,
        "fsdp_reshard_after_forward": reshard,
        "tensor_parallel_degree": config.tp,
        "enable_sequence_parallel": config.sequence_parallel,
        "context_parallel_degree": config.cp,
        "expert_parallel_degree": config.ep,
        "pipeline_parallel_degree": config.pp,
    }
    if config.pp > 1:
        fields["pipeline_parallel_schedule"] = SCHEDULES[config.schedule]
        fields["num_pp_microbatches"] = config.num_microbatches
        fields["module_fqns_per_model_part"] = _modules(job)
    return fields


def _modules(job: ExportJob) -> list[list[str]]:
    """The modules of every chunk in model order."""
    parts = [[f"layers.{i}" for i in chunk] for chunk in layer_ranges(job.config, job.model.num_layers)]
    parts[0].insert(0, "tok_embeddings")
    parts[-1] += ["norm", "lm_head"]
    return parts

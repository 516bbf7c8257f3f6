"""A plan as a torchrun script for Megatron-LM's pretrain_gpt.py.

In: an `ExportJob`. Out: a bash script; data, tokenizer and checkpoint arguments come from its caller. Arguments are
named as in Megatron-LM of August 2026 (`megatron/training/arguments.py` and the config classes that it reads).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from meshwright.export.job import Exported, ExportJob, refuse
from meshwright.export.megatron_model import model_arguments
from meshwright.layout.config import ContextVariant, Precision, Recompute, Schedule
from meshwright.layout.split import layer_ranges

RUNS = (Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED)
FORMATS: dict[Precision, list[str]] = {
    Precision.FP32: [],
    Precision.FP16: ["--fp16"],
    Precision.BF16: ["--bf16"],
    Precision.FP8: ["--bf16", "--fp8-format", "hybrid"],
    Precision.MXFP8: ["--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"],
    Precision.NVFP4: ["--bf16", "--fp4-format", "e2m1"],
}
FSDP = {2: "optim_grads", 3: "optim_grads_params"}


def megatron(job: ExportJob) -> Exported:
    """The script."""
    _check(job)
    groups = {
        "MODEL_ARGS": model_arguments(job.model, job.values(), job.workload.seq),
        "PARALLEL_ARGS": _parallel(job),
        "STEP_ARGS": _step(job),
    }
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.heading}",
        "# Run in a clone of Megatron-LM on every node, with NODE_RANK and MASTER_ADDR set and data, tokenizer and",
        "# checkpoint arguments behind, e.g. --mock-data --tokenizer-type NullTokenizer for a trial.",
        "set -euo pipefail",
        *_environment(job),
        "TORCHRUN_ARGS=(",
        f"  --nnodes {job.cluster.nodes} --nproc-per-node {job.cluster.gpus_per_node}",
        '  --node-rank "${NODE_RANK:-0}"',
        '  --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}"',
        ")",
    ]
    for name, words in groups.items():
        lines += [f"{name}=(", *_one_option_a_line(words), ")"]
    arrays = " ".join(f'"${{{name}[@]}}"' for name in groups)
    lines.append(f'torchrun "${{TORCHRUN_ARGS[@]}}" pretrain_gpt.py {arrays} "$@"')
    return Exported("\n".join(lines) + "\n")


def _check(job: ExportJob) -> None:
    config, optimizer = job.config, job.workload.optimizer
    if config.pp > 1 and config.schedule not in RUNS:
        raise refuse(
            "Megatron-LM",
            f"it has no {config.schedule.value} schedule",
            "plan with --schedule 1f1b",
        )
    if optimizer not in (None, "adam-mixed") and (optimizer, config.precision) != ("adam-fp32", Precision.FP32):
        raise refuse("Megatron-LM", f"{optimizer} is none of its optimizers as priced", "plan with adam-mixed")
    if _experts(job) and config.tp > 1 and not config.sequence_parallel:
        raise refuse("Megatron-LM", "experts with tp > 1 need sequence parallelism", "plan with --sp")
    if config.zero in FSDP and config.zero_shards not in (None, config.dp * config.cp):
        raise refuse("Megatron-LM", "sharding within groups (HSDP) is exported for ZeRO-1 only", "plan with --zero 1")


def _experts(job: ExportJob) -> bool:
    return any(kind.top_k for kind in job.model.kinds)


def _environment(job: ExportJob) -> list[str]:
    """Overlap of tp and cp communication wants one hardware queue; Megatron-FSDP refuses that."""
    fsdp = job.config.zero in FSDP and job.config.dp * job.config.cp > 1
    if job.config.tp * job.config.cp == 1 or fsdp:
        return []
    return ['export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"']


def _parallel(job: ExportJob) -> list[str]:
    """Sizes of the axes, the layers of each stage, and how data-parallel state is sharded."""
    config = job.config
    words = [
        "--tensor-model-parallel-size", str(config.tp),
        "--pipeline-model-parallel-size", str(config.pp),
        "--context-parallel-size", str(config.cp),
    ]  # fmt: skip
    words += ["--sequence-parallel"] if config.sequence_parallel and config.tp > 1 else []
    if config.cp > 1 and config.cp_variant is ContextVariant.ALL_TO_ALL:
        words += ["--cp-comm-type", "a2a"]  # its own default is the ring, p2p
    if _experts(job):
        words += ["--expert-model-parallel-size", str(config.ep)]
        words += ["--expert-tensor-parallel-size", str(config.expert_tp)]
    return words + _stages(job) + _sharding(job)


def _stages(job: ExportJob) -> list[str]:
    """Layers by chunk: nothing to say where Megatron's own even split is meant, else the layout in full."""
    config, ranges = job.config, layer_ranges(job.config, job.model.num_layers)
    if config.pp == 1:
        return []
    if len({len(r) for r in ranges}) == 1 and not job.model.mtp_layers:
        return ["--num-virtual-stages-per-pipeline-rank", str(config.vpp)] if config.vpp > 1 else []
    chunks = ["t" * len(r) for r in ranges]
    chunks[0], chunks[-1] = "E" + chunks[0], chunks[-1] + "m" * job.model.mtp_layers + "L"
    return ["--pipeline-model-parallel-layout", "|".join(chunks)]


def _sharding(job: ExportJob) -> list[str]:
    config = job.config
    replicas = config.dp * config.cp
    if replicas == 1:
        return []
    if config.zero == 0:
        return ["--overlap-grad-reduce"]
    words = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    if config.zero in FSDP:
        words += ["--use-megatron-fsdp", "--data-parallel-sharding-strategy", FSDP[config.zero]]
        words += ["--ckpt-format", "fsdp_dtensor"]
    elif config.zero_shards not in (None, replicas):
        words += ["--num-distributed-optimizer-instances", str(replicas // (config.zero_shards or replicas))]
    return words


def _step(job: ExportJob) -> list[str]:
    """Batch, formats, recomputation and the training run."""
    config, work, run = job.config, job.workload, job.run
    words = ["--micro-batch-size", str(config.micro_batch), "--global-batch-size", str(config.global_batch)]
    words += FORMATS[config.precision] + (["--grad-reduce-in-bf16"] if work.gradient_bytes == 2 else [])
    words += ["--attention-backend", "unfused" if work.flash_attention is False else "auto"]
    dropout = "0.1" if work.dropout else "0.0"
    words += ["--attention-dropout", dropout, "--hidden-dropout", dropout]
    if work.capacity_factor is not None:
        words += ["--moe-expert-capacity-factor", str(work.capacity_factor)]
    words += _recompute(job)
    words += ["--train-iters", str(run.steps), "--lr", str(run.learning_rate), "--lr-decay-style", "cosine"]
    words += ["--lr-warmup-iters", str(run.warmup_steps), "--weight-decay", str(run.weight_decay)]
    return [*words, "--clip-grad", str(run.gradient_clip)]


def _recompute(job: ExportJob) -> list[str]:
    config = job.config
    if config.recompute is Recompute.NONE:
        return []
    if config.recompute is Recompute.SELECTIVE:
        return ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"]
    words = ["--recompute-granularity", "full", "--recompute-method"]
    if config.recompute_every == 1:
        return [*words, "uniform", "--recompute-num-layers", "1"]
    fullest = max(len(r) for r in layer_ranges(config, job.model.num_layers))  # of a chunk: that is what 'block' counts
    return [*words, "block", "--recompute-num-layers", str(-(-fullest // config.recompute_every))]


def _one_option_a_line(words: Sequence[str]) -> list[str]:
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            lines.append([word])
        else:
            lines[-1].append(shlex.quote(word))
    return ["  " + " ".join(line) for line in lines]

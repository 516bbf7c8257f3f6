"""llm-analysis (PyPI) on the training rows: its own numbers, unpatched.

In: rows and an MFU per row for its `flops_efficiency` (it has no default that any job reaches: it assumes 1). Out:
predicted tokens/s per GPU and GiB per row id, and why it refuses the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.accuracy.environments import python_of, run
from tools.accuracy.store import kept
from tools.calibrate.problem import Case
from tools.calibrate.rows import Rows

from meshwright.cost.device import NARROW, peak_flops
from meshwright.layout.config import Precision
from meshwright.models.spec import Attention, DenseMlp, ModelSpec, MoeMlp

VERSION = "0.2.2"
ENVIRONMENT = "llm-analysis"
PEER = Path(__file__).with_name("llm_analysis_peer.py")
GIB = 2.0**30


@dataclass(frozen=True)
class Answers:
    """By row id: tokens/s per GPU, GiB; and how many rows got which refusal."""

    rate: dict[str, float]
    gib: dict[str, float]
    refused: dict[str, int]


def answers(rows: Rows, efficiency: Sequence[float], name: str) -> Answers:
    """What it says of every row that it can be asked about, with an efficiency for each."""
    jobs = [job_of(case, mfu) for case, mfu in zip(rows.cases, efficiency, strict=True)]
    asked = [i for i, job in enumerate(jobs) if isinstance(job, dict)]

    def work() -> Any:
        return run(python_of(ENVIRONMENT, f"llm-analysis=={VERSION}"), PEER, [jobs[i] for i in asked])

    found = kept(f"llm-analysis-{name}", [PEER], [VERSION, repr(jobs)], work)
    refused = Counter(job for job in jobs if isinstance(job, str))
    refused.update(answer for answer in found if isinstance(answer, str))
    rate: dict[str, float] = {}
    gib: dict[str, float] = {}
    for index, answer in zip(asked, found, strict=True):
        if isinstance(answer, str):
            continue
        _, _, workload, config, _ = rows.cases[index]
        rate[rows.ids[index]] = config.global_batch * workload.seq / config.world_size / answer[0]
        gib[rows.ids[index]] = answer[1] / GIB
    return Answers(rate, gib, dict(refused))


def job_of(case: Case, efficiency: float) -> dict[str, Any] | str:
    """The job in its words, or what it has no word for."""
    model, cluster, workload, config, _ = case
    shape = model_of(model, workload.seq)
    if isinstance(shape, str):
        return shape
    if config.cp > 1:
        return "has no context parallelism"
    chip = cluster.accelerator
    eight = config.precision in NARROW
    return {
        "model": shape,
        "gpu": {
            "name": chip.name,
            "mem_per_GPU_in_GB": chip.memory_bytes / GIB,
            "hbm_bandwidth_in_GB_per_sec": chip.memory_bandwidth / 1e9,
            "intra_node_bandwidth_in_GB_per_sec": cluster.intra.bandwidth / 1e9,
            "intra_node_min_message_latency": cluster.intra.latency_s,
            "inter_node_bandwidth_in_GB_per_sec": cluster.inter.bandwidth / 1e9,
            "peak_fp16_TFLOPS": peak_flops(chip, Precision.BF16) / 1e12,
            "peak_i8_TFLOPS": peak_flops(chip, config.precision) / 1e12 if eight else None,
        },
        "split": {
            "tp_size": config.tp,
            "pp_size": config.pp,
            "dp_size": config.dp,
            "ep_size": config.ep,
            "sp_size": config.tp if config.sequence_parallel else 1,
        },
        "bits": 8 if eight else 16,
        "flops_efficiency": min(efficiency, 1.0),
        "micro_batch": config.micro_batch,
        "global_batch": config.global_batch,
        "seq": workload.seq,
        "recompute": str(config.recompute),
        "zero": config.zero,
        "flash": workload.flash_attention,
        "gated": any(isinstance(k.mlp, DenseMlp) and k.mlp.gated for k in model.kinds),
    }


def model_of(model: ModelSpec, seq: int) -> dict[str, Any] | str:
    """Its ModelConfig: one kind of layer, full attention."""
    kind = model.kinds[-1]
    if not isinstance(kind.mixer, Attention):
        return "has no such attention"
    if kind.mlp is None:
        return "has no layer without a feed-forward block"
    experts = kind.mlp if isinstance(kind.mlp, MoeMlp) else None
    return {
        "name": "job",
        "num_layers": len(model.pattern),
        "n_head": kind.mixer.heads,
        "num_key_value_heads": kind.mixer.kv_heads,
        "hidden_dim": model.hidden,
        "vocab_size": model.vocab,
        "max_seq_len": seq,
        "ffn_embed_dim": kind.mlp.width,
        "expansion_ratio": 4,
        "moe_num_experts": experts.experts if experts else 1,
        "moe_top_k": experts.top_k if experts else 1,
    }

"""KV cache as vLLM will report it: blocks on every rank, tokens of an engine, requests of the longest length.

In: model, cluster, plan. Out: `VllmCache`. vLLM takes a share of the device's memory (0.92 unless told otherwise),
takes off weights and the peak of a profiled pass, and fills the rest with blocks of the fullest stage's layers; a tp
rank holds max(1, KV heads / tp) heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import Candidates
from meshwright.cost.kv_cache import BLOCK_TOKENS, sequence_cache_bytes
from meshwright.cost.serving import ServingEstimate
from meshwright.cost.stages import stages
from meshwright.cost.workload import ServingWorkload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.spec import ModelSpec

MEMORY_SHARE = 0.92
"""vLLM's default of --gpu-memory-utilization since 0.19 (0.9 before)."""


@dataclass(frozen=True)
class VllmCache:
    """Of one replica. `requests` of `longest` tokens fit at once (vLLM prints this as maximum concurrency)."""

    blocks: int
    tokens: int
    longest: int
    requests: float


def block_bytes(model: ModelSpec, config: HybridParallelConfig, kv_bytes: float) -> float:
    """Bytes of one block of tokens on a rank of the fullest stage."""
    one = Candidates.from_configs([config])
    roles = stages(model, one)
    tokens = np.array([float(BLOCK_TOKENS)])
    return float(sequence_cache_bytes(model, roles, one.tp, tokens, kv_bytes).max())


def vllm_cache(
    model: ModelSpec, config: HybridParallelConfig, kv_bytes: float, room_bytes: float, longest: int
) -> VllmCache:
    """What fits in `room_bytes` of every rank."""
    blocks = int(max(room_bytes, 0.0) // block_bytes(model, config, kv_bytes))
    per_request = -(-longest // BLOCK_TOKENS)
    return VllmCache(blocks, blocks * BLOCK_TOKENS, longest, blocks / per_request)


def predicted_cache(
    model: ModelSpec, cluster: Cluster, workload: ServingWorkload, priced: ServingEstimate, longest: int | None = None
) -> VllmCache:
    """What vLLM will report for a priced plan."""
    room = cluster.accelerator.memory_bytes * MEMORY_SHARE - priced.weights_bytes - priced.workspace_bytes
    full = longest or workload.prompt + workload.output
    return vllm_cache(model, priced.config, workload.kv_bytes_per_element, room, full)

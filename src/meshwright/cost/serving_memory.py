"""Memory of serving: weights and workspace on a rank of every stage, and how many sequences' caches fit beside them.

In: `Engine`, workload. Out: `ServingMemory`. A sequence reserves the cache of all its tokens, so that none is evicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import FloatArray, unit_keys
from meshwright.cost.kv_cache import sequence_cache_bytes
from meshwright.cost.serving_pass import Engine
from meshwright.cost.workload import ServingWorkload
from meshwright.layout.config import Precision
from meshwright.models.counting import per_rank_elements
from meshwright.models.spec import TensorSpec

END_BYTES = 2.0
"""Embedding, norms and head stay in 16 bits in every quantised format served (compressed-tensors, ModelOpt)."""

LOGIT_BYTES = 4.0  # sampling works on fp32 logits


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on a rank of every stage [n, S]: weights, one sequence's cache, room for caches; workspace [n]; sequences
    that fit on a replica [n]."""

    weights: FloatArray
    per_sequence: FloatArray
    room: FloatArray
    workspace: FloatArray
    max_sequences: FloatArray


def serving_memory(x: Engine, workload: ServingWorkload) -> ServingMemory:
    """What is left for caches after weights and workspace, and how many sequences it holds."""
    c = x.candidates
    weights = stage_weight_bytes(x)
    workspace = workspace_bytes(x, workload)
    full = np.full(len(c), float(workload.prompt + workload.output))
    per_sequence = sequence_cache_bytes(x.model, x.stages, c.tp, full, x.kv_bytes)
    free = float(x.cluster.usable_bytes) - weights - workspace[:, None]
    room = np.maximum(free, 0.0) * x.stack.cache_share
    fitting = np.where(per_sequence > 0, room / np.maximum(per_sequence, 1e-9), np.where(free > 0, np.inf, 0.0))
    most = np.minimum(np.floor(fitting.min(axis=1)), 1e9)
    return ServingMemory(weights, per_sequence, room, workspace, most)


def workspace_bytes(x: Engine, workload: ServingWorkload) -> FloatArray:
    """Activations of the largest pass: its tokens' hidden states and the widest product's output, and the logits."""
    c = x.candidates
    tokens = min(float(x.stack.max_tokens), float(max(workload.prompt, 1)) * x.stack.max_sequences)
    products = [m.n * m.tokens_factor for kind in x.model.kinds for m in kind.matmuls]
    columns = 2.0 * x.model.hidden + 2.0 * max(products, default=0.0) / c.tp
    logits = float(x.stack.max_sequences) * x.model.vocab / c.tp * LOGIT_BYTES
    return np.asarray(tokens * columns * 2.0 + logits, dtype=np.float64)


def stage_weight_bytes(x: Engine) -> FloatArray:
    """Weights on a rank of every stage [n, S]."""
    s = x.stages
    keys = unit_keys(x.candidates)
    k = keys.candidates

    def elements(tensors: tuple[TensorSpec, ...]) -> FloatArray:
        dense, expert = per_rank_elements(tensors, k.tp, k.ep, k.expert_tp)
        return (dense + expert)[keys.inverse].astype(np.float64)[:, None]

    layers = np.zeros(s.index.shape)
    for index, kind in enumerate(x.model.kinds):
        layers += s.layers[:, :, index] * elements(kind.tensors)
    ends = s.first * elements(x.model.embedding_tensors)
    ends = ends + s.last * elements(x.model.final_tensors + x.model.head_tensors)
    ends = ends + (s.last & ~s.first) * elements(x.model.tied_tensors)
    end_bytes = 4.0 if x.candidates.precision is Precision.FP32 else END_BYTES
    return layers * x.weight_bytes + ends * end_bytes

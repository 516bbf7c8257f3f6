"""`analyze_memory_usage`: what one GPU of a tp x pp split holds, for training and for inference.

In: the guide's seven numbers. Out: a `MemoryUsage`: a mapping with the guide's keys (GB = 1e9 bytes) and more, and the
stages in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from meshwright import hardware
from meshwright.cost.estimate import Memory
from meshwright.cost.evaluate import estimate
from meshwright.cost.serving import ServingEstimate, serve_estimate
from meshwright.cost.workload import ServingWorkload, Workload
from meshwright.errors import InputError
from meshwright.hardware import Cluster
from meshwright.layout.config import HybridParallelConfig, Recompute
from meshwright.ledger import MemoryKind
from meshwright.models.shapes import typical_shape
from meshwright.models.spec import ModelSpec
from meshwright.planner.legality import check

GB = 1e9


@dataclass(frozen=True)
class MemoryUsage(Mapping[str, float]):
    """The guide's keys in GB of one GPU - param_memory, activation_memory, kv_cache_memory, optimizer_memory,
    total_inference, total_training - and gradient_memory, logits_memory, buffer_memory, reserved_memory (training:
    context, communicators, allocator), workspace_memory and context_memory (inference). Training figures are those of
    the fullest pipeline stage; `training` has every stage in bytes, `inference` the serving side."""

    training: Memory
    inference: ServingEstimate
    sequences: int
    context_bytes: int

    def _values(self) -> dict[str, float]:
        kinds = self.training.peak.bytes_by_kind
        served = self.inference
        cache = served.cache_bytes_per_sequence * self.sequences
        inference = served.weights_bytes + cache + served.workspace_bytes + self.context_bytes
        buffers = kinds.get(MemoryKind.BUFFERS, 0) + kinds.get(MemoryKind.TEMPORARIES, 0)
        held = {
            "param_memory": kinds.get(MemoryKind.PARAMETERS, 0),
            "gradient_memory": kinds.get(MemoryKind.GRADIENTS, 0),
            "optimizer_memory": kinds.get(MemoryKind.OPTIMIZER, 0),
            "activation_memory": kinds.get(MemoryKind.ACTIVATIONS, 0),
            "logits_memory": kinds.get(MemoryKind.LOGITS, 0),
            "buffer_memory": buffers,
            "reserved_memory": kinds.get(MemoryKind.RESERVED, 0),
            "kv_cache_memory": cache,
            "workspace_memory": served.workspace_bytes,
            "context_memory": self.context_bytes,
            "total_inference": inference,
            "total_training": self.training.peak.total_bytes,
        }
        return {name: value / GB for name, value in held.items()}

    def __getitem__(self, key: str) -> float:
        return self._values()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())


def analyze_memory_usage(
    model_params_b: float,
    batch_size: int,
    seq_length: int,
    hidden_dim: int,
    num_layers: int,
    tp_size: int,
    pp_size: int,
    *,
    dp_size: int = 1,
    num_micro_batches: int = 1,
    zero: int = 0,
    recompute: str = "none",
    sequence_parallel: bool = False,
    gpu: str = "a100-80gb",
) -> MemoryUsage:
    """Memory of one GPU when `batch_size` sequences are trained on in `num_micro_batches` microbatches (one, as in the
    guide), and when they are served at once."""
    model = typical_shape(model_params_b, layers=num_layers, hidden=hidden_dim)
    world = dp_size * tp_size * pp_size
    if batch_size % (dp_size * num_micro_batches):
        raise InputError(
            f"batch_size {batch_size} is not a multiple of dp_size {dp_size} x num_micro_batches {num_micro_batches}"
        )
    config = HybridParallelConfig(
        dp=dp_size, tp=tp_size, pp=pp_size, micro_batch=batch_size // (dp_size * num_micro_batches),
        global_batch=batch_size, zero=zero, recompute=Recompute(recompute), sequence_parallel=sequence_parallel,
    )  # fmt: skip
    cluster = _cluster(gpu, world)
    check(config, model, cluster, seq_length)
    trained = estimate(model, cluster, Workload(seq=seq_length), config)
    sequences = batch_size // dp_size
    served = _served(model, cluster, seq_length, config, sequences)
    return MemoryUsage(trained.memory, served, sequences, cluster.reserved_bytes)


def _cluster(gpu: str, world: int) -> Cluster:
    """Just the GPUs that the split needs, on whole nodes or a part of one."""
    base = hardware.load(gpu)
    per_node = base.gpus_per_node
    return hardware.resize(base, gpus=world if world < per_node else -(-world // per_node) * per_node)


def _served(
    model: ModelSpec, cluster: Cluster, seq: int, config: HybridParallelConfig, sequences: int
) -> ServingEstimate:
    """The same tp x pp serving `sequences` whole sequences at once."""
    layout = HybridParallelConfig(dp=config.dp, tp=config.tp, pp=config.pp, global_batch=config.dp)
    return serve_estimate(model, cluster, ServingWorkload(prompt=seq, output=1), layout, batch=sequences)

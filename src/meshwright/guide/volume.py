"""`analyze_communication_volume`: the bytes that one GPU sends and receives in a training step, by axis.

In: the guide's eight numbers. Out: a `CommunicationVolume`: a mapping with the guide's names (GB = 1e9 bytes) and the
ledger behind it, line by line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from meshwright import hardware
from meshwright.cost.evaluate import estimate
from meshwright.cost.workload import Workload
from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import TrafficEntry
from meshwright.models.shapes import MLP_RATIO, typical_shape
from meshwright.models.spec import ModelSpec
from meshwright.planner.legality import check

GB = 1e9
MEMBERS = {
    "tp_total_comm": ("tp",),
    "pp_total_comm": ("pp",),
    "dp_comm": ("dp", "embedding"),
}


@dataclass(frozen=True)
class CommunicationVolume(Mapping[str, float]):
    """tp_total_comm, pp_total_comm, dp_comm and total_comm in GB of one GPU and step: the busiest pipeline stage's.
    `ledger` has every collective with its calls and bytes (a call's bytes as meshwright.ledger defines them)."""

    stage: int
    ledger: tuple[TrafficEntry, ...]

    def _values(self) -> dict[str, float]:
        totals = {
            name: sum(entry.total_bytes for entry in self.ledger if entry.axis in axes) / GB
            for name, axes in MEMBERS.items()
        }
        return {**totals, "total_comm": sum(totals.values())}

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of the total by axis."""
        values = self._values()
        total = values.pop("total_comm")
        return {name: value / total if total else 0.0 for name, value in values.items()}

    def __getitem__(self, key: str) -> float:
        return self._values()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())


def analyze_communication_volume(
    batch_size: int,
    seq_length: int,
    hidden_dim: int,
    num_layers: int,
    tp_size: int,
    pp_size: int,
    dp_size: int,
    num_micro_batches: int,
    *,
    model_params_b: float | None = None,
    sequence_parallel: bool = False,
    zero: int = 0,
) -> CommunicationVolume:
    """Traffic of one step of `batch_size` sequences in all. The model's size follows from hidden_dim and num_layers
    unless given."""
    model = shape_of(hidden_dim, num_layers, model_params_b)
    unit = dp_size * num_micro_batches
    if unit < 1 or batch_size < unit or batch_size % unit:
        raise InputError(
            f"batch_size {batch_size} is not a multiple of dp_size {dp_size} x num_micro_batches {num_micro_batches}"
        )
    config = HybridParallelConfig(
        dp=dp_size, tp=tp_size, pp=pp_size, micro_batch=batch_size // unit, global_batch=batch_size,
        sequence_parallel=sequence_parallel, zero=zero,
    )  # fmt: skip
    base = hardware.load("a100-80gb")
    cluster = hardware.resize(base, gpus_per_node=config.world_size, nodes=1)  # bytes do not depend on links
    check(config, model, cluster, seq_length)
    traffic = estimate(model, cluster, Workload(seq=seq_length), config).traffic
    stage = max(traffic, key=lambda number: sum(entry.total_bytes for entry in traffic[number]))
    return CommunicationVolume(stage, traffic[stage])


def shape_of(hidden_dim: int, num_layers: int, model_params_b: float | None) -> ModelSpec:
    """The typical model of that width and depth; its parameters where not given are those of its usual MLP width:
    (2 + 3 x MLP_RATIO) h^2 per layer (queries and output, gated MLP; the few KV heads and the tables are left to
    typical_shape's tolerance)."""
    if hidden_dim < 1 or num_layers < 1:
        raise InputError(f"hidden_dim and num_layers must be 1 or more, got {hidden_dim} and {num_layers}")
    usual = (2 + 3 * MLP_RATIO) * hidden_dim**2 * num_layers / 1e9
    return typical_shape(model_params_b or usual * 1.04, layers=num_layers, hidden=hidden_dim)

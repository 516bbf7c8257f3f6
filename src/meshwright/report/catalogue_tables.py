"""The catalogues as tables: models and clusters that can be named. In: their dataclasses. Out: rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from meshwright.hardware import Cluster
from meshwright.models import ModelSpec, MoeMlp, active_parameters
from meshwright.report.fitted_table import table
from meshwright.report.numbers import billions, gib

GIGA, TERA = 1e9, 1e12


def clusters_table(clusters: Iterable[Cluster]) -> Table:
    """One line per cluster in its default size."""
    made = table(
        "Clusters (sizes with --nodes, --gpus, --gpus-per-node)", "name", "accelerator", "GiB", "reserved",
        "bf16 TFLOP/s", "HBM GB/s", "GPUs/node", "fast domain", "fast link GB/s", "network GB/s", left=2,
        expendable=("reserved", "GPUs/node", "HBM GB/s"),
    )  # fmt: skip
    for cluster in clusters:
        device = cluster.accelerator
        peak = device.peak_flops.get("bf16") or device.peak_flops.get("fp16") or max(device.peak_flops.values())
        made.add_row(
            cluster.name,
            device.name,
            gib(device.memory_bytes),
            gib(cluster.reserved_bytes),
            f"{peak / TERA:,.0f}",
            f"{device.memory_bandwidth / GIGA:,.0f}",
            str(cluster.gpus_per_node),
            str(cluster.domain),
            f"{cluster.intra.bandwidth / GIGA:,.0f}",
            f"{cluster.inter.bandwidth / GIGA:,.1f}",
        )
    return made


def models_table(models: Sequence[ModelSpec]) -> Table:
    """One line per model."""
    made = table(
        f"{len(models)} models", "name", "family", "parameters", "active", "layers", "hidden", "vocabulary", "experts",
        "context", left=2, expendable=("vocabulary", "hidden", "family"),
    )  # fmt: skip
    for model in models:
        experts = routed_experts(model)
        made.add_row(
            model.name,
            model.model_type,
            billions(model.parameters),
            billions(active_parameters(model)) if experts else "",
            str(model.num_layers),
            f"{model.hidden:,}",
            f"{model.vocab:,}",
            f"{experts.top_k} of {experts.experts}" if experts else "",
            f"{model.max_positions:,}" if model.max_positions else "",
        )
    return made


def model_document(model: ModelSpec) -> dict[str, object]:
    """What the table shows, as plain values."""
    experts = routed_experts(model)
    return {
        "name": model.name,
        "model_type": model.model_type,
        "parameters": model.parameters,
        "active_parameters": active_parameters(model),
        "layers": model.num_layers,
        "hidden": model.hidden,
        "vocab": model.vocab,
        "experts": experts.experts if experts else 0,
        "top_k": experts.top_k if experts else 0,
        "max_positions": model.max_positions,
        "source": model.source,
    }


def routed_experts(model: ModelSpec) -> MoeMlp | None:
    """The mixture-of-experts block of the model, if it has one."""
    return next((kind.mlp for kind in model.kinds if isinstance(kind.mlp, MoeMlp)), None)

"""First lines of reports: which model on which machine does what. In: the dataclasses. Out: one line of text each."""

from __future__ import annotations

from meshwright.cost.workload import ServingWorkload
from meshwright.hardware import Cluster
from meshwright.models import ModelSpec, active_parameters
from meshwright.report.catalogue_tables import routed_experts
from meshwright.report.numbers import billions, gib, seconds


def model_words(model: ModelSpec) -> str:
    """'llama-3.1-70b (70.6 B parameters, 80 layers)'."""
    active = f", {billions(active_parameters(model))} active" if routed_experts(model) else ""
    return f"{model.name} ({billions(model.parameters)} parameters{active}, {model.num_layers} layers)"


def cluster_words(cluster: Cluster) -> str:
    """'64 x h100-80gb-sxm (8 nodes of 8, 79.2 GiB each)'."""
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} of {cluster.gpus_per_node}"
    return f"{cluster.gpus:,} x {cluster.accelerator.name} ({nodes}, {gib(cluster.accelerator.memory_bytes)} GiB each)"


def job_line(model: ModelSpec, cluster: Cluster, seq: int, global_batch: int) -> str:
    """Model, machine and the step that is planned."""
    return f"{model_words(model)} on {cluster_words(cluster)}, sequences of {seq}, global batch {global_batch}"


def serving_line(model: ModelSpec, cluster: Cluster, workload: ServingWorkload, weights: str) -> str:
    """Model, format of its `weights`, machine and the requests that are served."""
    targets = [f"first token within {seconds(workload.ttft_s)}"] if workload.ttft_s else []
    targets += [f"{seconds(workload.tpot_s)} per token"] if workload.tpot_s else []
    within = f", {' and '.join(targets)}" if targets else ""
    requests = f"prompts of {workload.prompt} and answers of {workload.output} tokens"
    return f"{model_words(model)} served in {weights} on {cluster_words(cluster)}, {requests}{within}"

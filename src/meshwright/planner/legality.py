"""The rules of `layout.validate` asked for a ModelSpec and a Cluster: one source of legality for the whole planner."""

from __future__ import annotations

from math import gcd

from meshwright.cost.candidates import BoolArray, Candidates
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.rules import ClusterFacts, ModelFacts
from meshwright.layout.validate import legal_mask, validate
from meshwright.models.spec import Attention, DenseMlp, LinearMixer, ModelSpec, MoeMlp


def model_facts(model: ModelSpec, seq: int | None = None) -> ModelFacts:
    """What the rules ask of a model; where layers differ, the common divisor."""
    softmax = [k.mixer for k in model.kinds if isinstance(k.mixer, Attention)]
    linear = [k.mixer for k in model.kinds if isinstance(k.mixer, LinearMixer)]
    dense = [k.mlp for k in model.kinds if isinstance(k.mlp, DenseMlp)]
    moe = [k.mlp for k in model.kinds if isinstance(k.mlp, MoeMlp)]
    heads = gcd(*(m.heads for m in softmax)) if softmax else gcd(*(m.heads for m in linear))
    return ModelFacts(
        heads=heads or None,
        # MLA's latent is shared by all heads: no key-value heads to divide
        kv_heads=gcd(*(m.kv_heads for m in softmax if not m.kv_replicated)) or None,
        layers=model.num_layers,
        hidden=model.hidden,
        mlp_width=gcd(*(m.width for m in dense)) or None,
        vocab=model.vocab,
        experts=gcd(*(m.experts for m in moe)),
        expert_width=gcd(*(m.width for m in moe)) or None,
        seq=seq,
    )


def cluster_facts(cluster: Cluster) -> ClusterFacts:
    return ClusterFacts(gpus=cluster.gpus, gpus_per_node=cluster.gpus_per_node)


def check(config: HybridParallelConfig, model: ModelSpec, cluster: Cluster, seq: int | None = None) -> None:
    """InputError in words for a configuration that breaks a rule."""
    validate(config, model_facts(model, seq), cluster_facts(cluster))


def legal(model: ModelSpec, cluster: Cluster | None, seq: int, candidates: Candidates) -> BoolArray:
    """Which candidates obey every rule, for all GPUs of the cluster (None: of whatever size)."""
    return legal_mask(
        model_facts(model, seq),
        ClusterFacts() if cluster is None else cluster_facts(cluster),
        dp=candidates.dp,
        tp=candidates.tp,
        pp=candidates.pp,
        cp=candidates.cp,
        ep=candidates.ep,
        expert_tp=candidates.expert_tp,
        vpp=candidates.vpp,
        micro_batch=candidates.micro_batch,
        global_batch=candidates.global_batch,
        sequence_parallel=candidates.sequence_parallel,
        schedule=candidates.schedule,
        zero_shards=candidates.zero_shards,
        heads_exchanged=candidates.heads_exchanged,
    )

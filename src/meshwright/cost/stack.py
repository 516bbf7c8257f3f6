"""Stacks: how well a training framework uses the machine - its overlaps, fusions, kernels, host costs and rank order.

In: the name of a framework as a person or a measurement row writes it. Out: a frozen `Stack` of traits that the cost
model reads. The values live in `data/stacks.toml`, each with its source or the date of its fit.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any, cast

from meshwright.cost.fitted import evidence, fitted_values


@dataclass(frozen=True)
class StallRule:
    """When messages between stages stall: where all of it holds. Sizes are the least for which it does."""

    nodes: int = 0  # 0: parts of a node too
    stages: int = 1
    tp: int = 1
    replicas: int = 1
    microbatches: int = 1
    zero: int | None = None  # with this stage only
    memory_share: float = 0.0  # of the device, filled beyond


@dataclass(frozen=True)
class Stack:
    """Traits of one software stack. Shares are 0..1; seconds are host time unless said otherwise."""

    name: str = "generic"
    frameworks: tuple[str, ...] = ()  # words by which its name is recognised (lower case; 'a & b': both occur)
    variant_of: str = ""  # the stack of which this is another setting: all but its own traits are that stack's
    own: tuple[str, ...] = ()  # the traits that a variant states itself
    rank_order: str = "tp-cp-ep-dp-pp"  # innermost axis first (Megatron-core's default order)
    schedules: tuple[str, ...] = ()  # the pipeline schedules that it has (none named: every one)
    splits_by_cost: bool = False  # cuts layers into stages by their weights and the head's, not by number
    gradient_bytes: int = 4  # of an accumulated gradient, where nothing else is said
    # kernels
    attention: str = "flash2"  # kernel generation used where the workload asks for flash attention
    fused_projections: bool = True  # q, k, v (and gate, up) run as one product
    elementwise_passes: float = 1.0  # memory traffic of norms, activations, residuals relative to fully fused kernels
    head_passes: float = 1.0  # memory traffic of the loss over the logits relative to a fused cross entropy
    cast_passes: float = 1.0  # memory traffic of casts to low-bit formats relative to one cast-and-transpose kernel
    permute_passes: float = 1.0  # memory traffic of expert permutation relative to one read and write each way
    gemm_scale: float = 1.0  # matrix products relative to the architecture's own surface
    # host
    layer_host_s: float = 0.0004  # host time to launch one layer's forward pass; the backward pass takes as long again
    tp_host_s: float = 0.00003  # more of it per further tensor-parallel rank that a layer's collectives wait for
    moe_host_s: float = 0.003  # more of it where the layer routes tokens to experts
    step_host_s: float = 0.01  # fixed time per step: data loading, logging, synchronisation
    microbatch_host_s: float = 0.0005  # fixed time per microbatch and pipeline chunk
    boundary_host_s: float = 0.0002  # fixed time per message over a stage boundary
    tp_wait_s: float = 0.0  # per layer pass and tp rank, where a pipeline leaves the fast domain or a job stalls
    # stalls (cost.stalls): none unless a stack was seen to stop
    message_stall_s: float = 0.0  # as a message between stages is sent, and again as it is received
    stall_rules: tuple[StallRule, ...] = ()  # where a job stalls: one of them holds
    bucket_bytes: float = 0.0  # of whole gradients in one call, each of which waits where a job stalls
    stall_s: float = 0.0  # per step, where there is no pipeline, from `stall_nodes` nodes on
    stall_nodes: int = 1_000_000
    # overlap: the share of a collective that may run behind compute
    dp_overlap: float = 0.9  # gradient reduction behind the backward pass of the last microbatch
    ddp_overlap: float = 0.0  # the same of replicated gradients (ZeRO-0), where more of it hides than `dp_overlap`
    gather_overlap: float = 0.5  # parameter gathering of ZeRO-1/2 behind the next forward pass
    fsdp_overlap: float = 0.9  # ZeRO-3 prefetch and reduction behind compute
    shard_messages: float = 1.0  # messages in which ZeRO-3 moves one layer: one where it is flattened
    piece_copy_s: float = 0.0  # host time of each rank's piece of such a message (torch's collectives over lists)
    tp_overlap: float = 0.0
    cp_overlap: float = 0.8
    ep_overlap: float = 0.0
    ep_overlap_paired: float = 0.9  # under DualPipeV: a chunk's dispatch behind its pair's compute (DeepSeek-V3, 3.2.1)
    pp_overlap: float = 0.0  # of 1F1B; interleaved schedules use pp_overlap_interleaved
    pp_overlap_interleaved: float = 0.8
    contention: float = 0.1  # share of hidden communication time by which the compute behind it slows down
    # mixture of experts and scale
    ep_domain_copies: bool = False  # a token crosses the network once per fast domain, not once per expert (DeepEP)
    moe_imbalance: float = 1.1  # slowest rank's routed tokens over the mean (1.0: forced balance)
    straggler: float = 0.005  # growth of the step per doubling of nodes
    optimizer_passes: float = 1.0  # memory traffic of the optimizer step relative to one fused pass over its state
    # memory (cost.layers, cost.memory)
    regathers_input: bool = True  # sequence-parallel block inputs are kept sharded, gathered again in backward
    fused_glu: bool = True  # a gated activation keeps only its two inputs and its output
    attention_copies: float = 0.0  # more copies of [tokens, heads x head size] kept: layout changes, transposes
    fused_norm: bool = True  # a norm keeps only its input (else an fp32 copy and the normalised values too)
    logit_bytes: float = 10.0  # alive per logit at the loss: the bf16 logits, an fp32 copy, its exponentials
    vocab_parallel_loss: bool = True  # False: logits are gathered over tp before the loss
    logit_kept_bytes: float = 4.0  # per logit between the loss and its backward pass (GPipe holds many)
    logit_carry_bytes: float = 0.0  # per logit of the previous microbatch, still referenced at the next one's loss
    router_copies: float = 2.0  # fp32 router tensors [tokens, experts] kept: logits and scores
    keeps_expert_output: bool = True  # expert outputs are kept to differentiate the routing weights
    half_gradients: float = 0.0  # bytes per parameter of gradients kept beside the accumulated ones
    bucket_gradients: float = 0.0  # the same where there are replicas to reduce over (the buckets of torch's DDP)
    step_bytes: float = 0.0  # per parameter that the optimizer works on: what its step needs beside the state
    pending_messages: float = 0.0  # buffers of tp collectives that wait for the device while the host is ahead of it
    master_is_parameter: bool = True  # ZeRO-3: the fp32 shard is both the stored parameter and the master weight
    gathered_layers: float = 2.0  # ZeRO-3: layers whose weights are gathered at once (current and prefetched)
    gathered_gradient_bytes: float = 6.0  # ZeRO-3: per parameter of a layer: its gradient and the reduction's input
    allocator_slack: float = 0.03  # what the caching allocator reserves beyond what is allocated, as a share of it
    workspace_bytes: float = (
        0.0  # that libraries hold in the allocator whatever the job: product and attention workspaces
    )
    pipeline_buffers: float = 2.0  # boundary activations held for sends and receives
    sources: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def stalls(self) -> bool:
        return bool(self.stall_rules)

    def reduction_overlap(self, zero: int) -> float:
        """The share of a gradient reduction that may hide under a ZeRO stage: whole gradients may go in buckets as they
        come where shards are reduced after the backward pass."""
        return max(self.dp_overlap, self.ddp_overlap) if zero == 0 else self.dp_overlap


@cache
def stacks(fitted: bool = True) -> dict[str, Stack]:
    """Every stack of the data file by name: its own traits over those of its `base`, fitted ones over assumed."""
    raw: dict[str, dict[str, Any]] = tomllib.loads(
        files("meshwright.cost").joinpath("data/stacks.toml").read_text(encoding="utf-8")
    )
    known = {f.name for f in fields(Stack)}
    resolved: dict[str, dict[str, Any]] = {}
    for name, table in raw.items():
        ancestor = str(table.get("variant_of", table.get("base", "")))
        inherited = resolved.get(ancestor, {})
        own = {key: value for key, value in table.items() if key != "base"}
        if "schedules" in own:
            own["schedules"] = tuple(cast(list[str], own["schedules"]))
        if unknown := set(own) - known:
            raise ValueError(f"stacks.toml: unknown trait {sorted(unknown)} in {name}")
        words = cast(list[str], own.pop("frameworks", []))
        if "stall_rules" in own:
            own["stall_rules"] = tuple(StallRule(**rule) for rule in own["stall_rules"])
        notes = cast(dict[str, str], inherited.get("sources", {})) | cast(dict[str, str], own.get("sources", {}))
        stated = {"frameworks": tuple(words), "name": name, "sources": notes, "own": tuple(own)}
        resolved[name] = inherited | {"variant_of": ""} | own | stated
    if fitted:
        _apply_fit(resolved)
    return {name: Stack(**traits) for name, traits in resolved.items()}


IDENTITY = ("name", "frameworks", "variant_of", "own", "sources")
"""Traits that a variant never shares with its main stack."""


def _apply_fit(resolved: dict[str, dict[str, Any]]) -> None:
    """Set the fitted traits: each stack's own, and a variant's from its main stack (which precedes it) where it does
    not state them."""
    for name, traits in resolved.items():
        if main := resolved.get(str(traits["variant_of"])):
            traits.update({k: v for k, v in main.items() if k not in traits["own"] and k not in IDENTITY})
        traits.update(fitted_values("stack", name))
        traits["sources"] = traits["sources"] | evidence("stack", name)


def fitted_as(stack: Stack, trait: str) -> str:
    """The stack in whose name a trait of `stack` is fitted: itself, or the main stack that shares the trait."""
    while stack.variant_of and trait not in stack.own:
        stack = stacks()[stack.variant_of]
    return stack.name


def stack_for(framework: str) -> Stack:
    """The stack whose longest recognising words occur in `framework`; the generic one where none do."""
    text = framework.lower()
    best, length = "generic", 0
    for name, stack in stacks().items():
        for words in stack.frameworks:
            parts = words.split(" & ")
            if all(part in text for part in parts) and len(words) > length:
                best, length = name, len(words)
    return stacks()[best]


def default_stack() -> Stack:
    """Megatron-core as of the newest release in the data file: what a plan assumes unless told otherwise."""
    return stacks()["megatron-core"]

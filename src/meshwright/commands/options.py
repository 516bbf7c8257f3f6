"""Options that several commands share, as annotated types: written once, the same name and help everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from meshwright.cost.workload import Optimizer, Workload
from meshwright.layout.config import ContextVariant, Precision, Recompute, Schedule
from meshwright.planner.objectives import Objective

LARGEST = 2**24  # of any size: far above every cluster, far below what overflows 64-bit products

SPLIT, RUN, CLUSTER, WORKLOAD, SERVING, SEARCH, OUTPUT = (
    "Sizes of the axes",
    "How the step is run",
    "Cluster",
    "Workload",
    "Serving",
    "Search",
    "Output",
)


def _size(name: str, text: str, panel: str) -> typer.models.OptionInfo:
    return typer.Option(name, help=text, min=1, max=LARGEST, rich_help_panel=panel, metavar="N", show_default=False)


Model: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODEL", help="Catalogue name, path of a config.json or its folder, or hub id.")
]
ModelOrPlan: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODEL|PLAN", help="As for plan, or a plan file (.yaml) that plan or estimate wrote.")
]

# How many ways each axis splits the job.
Dp: TypeAlias = Annotated[int | None, _size("--dp", "Data-parallel replicas.", SPLIT)]
Tp: TypeAlias = Annotated[int | None, _size("--tp", "Tensor-parallel ranks.", SPLIT)]
Pp: TypeAlias = Annotated[int | None, _size("--pp", "Pipeline stages.", SPLIT)]
Cp: TypeAlias = Annotated[int | None, _size("--cp", "Context-parallel ranks.", SPLIT)]
Ep: TypeAlias = Annotated[int | None, _size("--ep", "Expert-parallel ranks.", SPLIT)]
ExpertTp: TypeAlias = Annotated[int | None, _size("--expert-tp", "Tensor-parallel ranks of experts.", SPLIT)]
Vpp: TypeAlias = Annotated[int | None, _size("--vpp", "Virtual stages (chunks) per pipeline stage.", SPLIT)]

# How a step is run.
MicroBatch: TypeAlias = Annotated[int | None, _size("--micro-batch", "Sequences per microbatch.", RUN)]
GlobalBatch: TypeAlias = Annotated[int | None, _size("--global-batch", "Sequences per step.", WORKLOAD)]
Seq: TypeAlias = Annotated[int | None, _size("--seq", "Tokens per sequence.", WORKLOAD)]
Recomputation: TypeAlias = Annotated[
    Recompute | None,
    typer.Option("--recompute", help="Activations computed again.", rich_help_panel=RUN, show_default=False),
]
RecomputeEvery: TypeAlias = Annotated[
    int | None, _size("--recompute-every", "With full recompute: one layer of every N.", RUN)
]
Zero: TypeAlias = Annotated[
    int | None,
    typer.Option("--zero", help="ZeRO stage, 0 to 3 (3 is FSDP).", min=0, max=3, rich_help_panel=RUN,
                 show_default=False),
]  # fmt: skip
ZeroShards: TypeAlias = Annotated[
    int | None, _size("--zero-shards", "Ranks that sharded state is spread over (HSDP); default all dp x cp.", RUN)
]
ScheduleName: TypeAlias = Annotated[
    Schedule | None, typer.Option("--schedule", help="Pipeline schedule.", rich_help_panel=RUN, show_default=False)
]
SequenceParallel: TypeAlias = Annotated[
    bool | None,
    typer.Option("--sp/--no-sp", help="Megatron's sequence parallelism.", rich_help_panel=RUN, show_default=False),
]
CpVariant: TypeAlias = Annotated[
    ContextVariant | None,
    typer.Option("--cp-variant", help="Context parallelism by a ring of keys and values, or by exchange of heads.",
                 rich_help_panel=RUN, show_default="ring"),
]  # fmt: skip
PrecisionName: TypeAlias = Annotated[
    Precision | None,
    typer.Option("--precision", help="Format of the matrix products.", rich_help_panel=RUN,
                 show_default="bf16; with --serve as the checkpoint"),
]  # fmt: skip

# The cluster.
ClusterName: TypeAlias = Annotated[
    str | None,
    typer.Option("--cluster", help="Catalogue name (see: meshwright clusters) or a TOML file.", rich_help_panel=CLUSTER,
                 show_default=False),
]  # fmt: skip
Nodes: TypeAlias = Annotated[int | None, _size("--nodes", "Number of nodes.", CLUSTER)]
Gpus: TypeAlias = Annotated[int | None, _size("--gpus", "Number of GPUs, in place of --nodes.", CLUSTER)]
GpusPerNode: TypeAlias = Annotated[int | None, _size("--gpus-per-node", "GPUs of a node.", CLUSTER)]
ReservedGib: TypeAlias = Annotated[
    float | None,
    typer.Option("--reserved-gib", help="Memory kept for context, communicators, allocator.", min=0,
                 rich_help_panel=CLUSTER, show_default="the cluster's own"),
]  # fmt: skip

# What is computed.
OptimizerName: TypeAlias = Annotated[
    Optimizer | None,
    typer.Option("--optimizer", help="Optimizer and formats of its state.", rich_help_panel=WORKLOAD,
                 show_default=Workload(seq=1).optimizer.value),
]  # fmt: skip
Flash: TypeAlias = Annotated[
    bool | None,
    typer.Option("--flash/--no-flash", help="Flash attention kernels.", rich_help_panel=WORKLOAD, show_default="flash"),
]
Dropout: TypeAlias = Annotated[
    bool | None,
    typer.Option("--dropout/--no-dropout", help="Dropout masks are kept.", rich_help_panel=WORKLOAD,
                 show_default="no-dropout"),
]  # fmt: skip
StackName: TypeAlias = Annotated[
    str | None,
    typer.Option("--stack", "--framework", help="Software stack: its overlaps, kernels and host costs.",
                 rich_help_panel=WORKLOAD, show_default="megatron-core"),
]  # fmt: skip

# Serving.
Serve: TypeAlias = Annotated[bool, typer.Option("--serve", help="Plan for serving.", rich_help_panel=SERVING)]
Disaggregated: TypeAlias = Annotated[
    bool, typer.Option("--disaggregated", help="Prompts and answers on GPUs of their own: two pools, two plan files.",
                       rich_help_panel=SERVING)
]  # fmt: skip
KvTransfer: TypeAlias = Annotated[
    str | None, typer.Option("--kv-transfer", help="When a prompt's cache leaves its pool.", metavar="at-end|by-layer",
                             rich_help_panel=SERVING, show_default="at-end, as vLLM's NIXL connectors do")
]  # fmt: skip
Prompt: TypeAlias = Annotated[int | None, _size("--prompt", "Mean tokens of a prompt.", SERVING)]
Output: TypeAlias = Annotated[int | None, _size("--output", "Mean tokens generated.", SERVING)]
TtftMs: TypeAlias = Annotated[
    float | None, typer.Option("--ttft-ms", help="Longest time to first token.", rich_help_panel=SERVING,
                               show_default=False)
]  # fmt: skip
TpotMs: TypeAlias = Annotated[
    float | None, typer.Option("--tpot-ms", help="Longest time per output token.", rich_help_panel=SERVING,
                               show_default=False)
]  # fmt: skip

# The search.
ObjectiveName: TypeAlias = Annotated[
    Objective, typer.Option("--objective", help="What the best plan is best at.", rich_help_panel=SEARCH)
]
Top: TypeAlias = Annotated[
    int, typer.Option("--top", help="Plans to show.", min=1, max=1000, rich_help_panel=SEARCH, metavar="N")
]


def _sizes(name: str, text: str, panel: str) -> typer.models.OptionInfo:
    return typer.Option(name, help=text, metavar="N,N..", rich_help_panel=panel, show_default="search all")


# What plan may search: one size or several, like 4,8.
Dps: TypeAlias = Annotated[str | None, _sizes("--dp", "Data-parallel replicas allowed.", SPLIT)]
Tps: TypeAlias = Annotated[str | None, _sizes("--tp", "Tensor-parallel sizes allowed.", SPLIT)]
Pps: TypeAlias = Annotated[str | None, _sizes("--pp", "Pipeline stages allowed.", SPLIT)]
Cps: TypeAlias = Annotated[str | None, _sizes("--cp", "Context-parallel sizes allowed.", SPLIT)]
Eps: TypeAlias = Annotated[str | None, _sizes("--ep", "Expert-parallel sizes allowed.", SPLIT)]
ExpertTps: TypeAlias = Annotated[str | None, _sizes("--expert-tp", "Tensor-parallel sizes of experts.", SPLIT)]
Vpps: TypeAlias = Annotated[str | None, _sizes("--vpp", "Virtual stages allowed.", SPLIT)]
MicroBatches: TypeAlias = Annotated[str | None, _sizes("--micro-batch", "Sequences per microbatch allowed.", RUN)]
Zeros: TypeAlias = Annotated[str | None, _sizes("--zero", "ZeRO stages allowed.", RUN)]

# Output.
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=OUTPUT)
]
PlanOut: TypeAlias = Annotated[
    Path | None, typer.Option("-o", "--out", help="Write the plan to this file.", rich_help_panel=OUTPUT)
]
TraceOut: TypeAlias = Annotated[
    Path | None,
    typer.Option("--trace", help="Simulate the step and write its timeline, a Chrome trace.", rich_help_panel=OUTPUT),
]
KvFormat: TypeAlias = Annotated[
    str | None, typer.Option("--kv-format", help="16-bit, or fp8: one byte per cached element.", metavar="bf16|fp8",
                             rich_help_panel=SERVING, show_default="bf16")
]  # fmt: skip
WeightFormat: TypeAlias = Annotated[
    str | None, typer.Option("--weight-format", help="Of the products' weights alone; they are computed in 16 bits.",
                             metavar="fp8|int8|int4|mxfp4|nvfp4", rich_help_panel=SERVING,
                             show_default="as the checkpoint")
]  # fmt: skip
PrefixHits: TypeAlias = Annotated[
    float | None, typer.Option("--prefix-hit-rate", help="Share of prompt tokens found in the cache.", metavar="0..1",
                               rich_help_panel=SERVING, show_default="0")
]  # fmt: skip
PassTokens: TypeAlias = Annotated[
    int | None, _size("--pass-tokens", "Most tokens of one forward pass: longer prompts are read in chunks.", SERVING)
]
Plot: TypeAlias = Annotated[bool, typer.Option("--plot", help="Draw memory against speed too.", rich_help_panel=OUTPUT)]

"""The sections of a plan as pydantic models: which keys there are, of what type, and what they mean.

All are strict (a bool is no number, text is no number), refuse unknown keys and never change after reading.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.plan.wording import hint, short

LARGEST = 2**40
"""Of any count in a plan: beyond it a number is taken for a slip."""

Count: TypeAlias = Annotated[int, Field(ge=1, le=LARGEST)]
Positive: TypeAlias = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of the plan: keys known, types exact, no infinities, never changed after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The model: a catalogue name, a path (from the working directory) or a hub id; or its config in place."""

    name: Annotated[str, Field(min_length=1)]
    config: dict[str, Any] | None = None


class ClusterSection(Section):
    """The cluster: a catalogue name or the path of a TOML file, and what differs from it."""

    name: Annotated[str, Field(min_length=1)]
    nodes: Count | None = None
    gpus: Count | None = None
    gpus_per_node: Count | None = None
    reserved_bytes: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    oversubscription: Annotated[float, Field(ge=1)] | None = None


class TrainingWorkload(Section):
    """A training step, apart from how it is split; the cost model's `Workload` gives the meanings and defaults."""

    kind: Literal["training"] = "training"
    seq: Count
    optimizer: str | None = None
    gradient_bytes: Literal[2, 4] | None = None
    flash_attention: bool | None = None
    dropout: bool | None = None
    capacity_factor: Positive | None = None
    stack: str | None = None  # software stack of the estimate; None: the cost model's default


class ServingWorkload(Section):
    """Requests of `prompt` input and `output` generated tokens (means), and what they must meet."""

    kind: Literal["serving"]
    prompt: Count
    output: Count
    kv_bytes_per_element: Positive | None = None
    ttft_s: Positive | None = None
    tpot_s: Positive | None = None
    batch: Count | None = None  # sequences in flight per replica; None: as many as fit
    stack: str | None = None
    weight_format: Literal["fp8", "int8", "int4", "mxfp4", "nvfp4"] | None = (
        None  # of products' weights; None: as precision says
    )
    prefix_hit_rate: Annotated[float, Field(ge=0, lt=1)] | None = None  # share of prompt tokens found in the cache
    pass_tokens: Count | None = None  # most tokens of one forward pass (chunked prefill); None: the engine's
    max_len: Count | None = None  # longest prompt with its answer that is served; None: prompt + output
    pool: Literal["prefill", "decode"] | None = None  # of a disaggregated plan; None: prompts and answers together
    kv_connector: Literal["NixlConnector", "NixlPushConnector"] | None = None  # how vLLM's pools hand over caches


class TrainingRun(Section):
    """How `meshwright train` runs the plan. Everything has a default; the command line may override it."""

    steps: Count = 100
    learning_rate: Positive = 3e-4
    warmup_steps: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0  # of the global norm; 0: not clipped
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0


class EstimateSummary(Section):
    """What the planner expected of the plan when it was written."""

    step_s: Positive | None = None
    peak_bytes: Count | None = None
    tokens_per_s_per_gpu: Positive | None = None
    mfu: Positive | None = None


class Provenance(Section):
    """Where the plan comes from. No part of what ranks must agree on."""

    meshwright: str
    objective: str | None = None
    estimate: EstimateSummary | None = None


ALWAYS_WRITTEN = ("dp", "tp", "pp", "cp", "micro_batch", "global_batch", "precision")


def _parallel_from(value: Any) -> HybridParallelConfig:
    if isinstance(value, HybridParallelConfig):
        return value
    if not isinstance(value, dict):
        raise InputError("must be a mapping of sizes, like {dp: 2, tp: 4}")
    table = cast("dict[Any, Any]", value)
    known = [f.name for f in fields(HybridParallelConfig)]
    for key in table:
        if key not in known:
            raise InputError(f"unknown key {short(key)}{hint(str(key), known)}")
    split = table.get("layer_split")
    if split is not None and not isinstance(split, list):
        raise InputError(f"layer_split must be a list of layer counts, got {short(split)}")
    return HybridParallelConfig(**{str(k): v for k, v in table.items() if v is not None})


def _parallel_to(config: HybridParallelConfig) -> dict[str, Any]:
    """The fields that differ from their defaults, and those that a reader looks for; plain ints, strings and lists."""
    plain: dict[str, Any] = {}
    for f in fields(HybridParallelConfig):
        value = getattr(config, f.name)
        if value == f.default and f.name not in ALWAYS_WRITTEN:
            continue
        if isinstance(value, bool):
            plain[f.name] = value
        elif isinstance(value, tuple):
            plain[f.name] = [int(v) for v in cast("tuple[int, ...]", value)]
        else:
            plain[f.name] = int(value) if isinstance(value, int) else str(value)
    return plain


Parallel: TypeAlias = Annotated[
    HybridParallelConfig, PlainValidator(_parallel_from), PlainSerializer(_parallel_to, return_type=dict[str, Any])
]
AnyWorkload: TypeAlias = Annotated[TrainingWorkload | ServingWorkload, Field(discriminator="kind")]

"""The documents that `--json` prints: one per command, strict JSON (a number that is not finite becomes null).

In: the result dataclasses of cost, planner, layout and validation. Out: dicts of plain values; `dumps` writes them.
Bytes, seconds and fractions; never GiB or percent.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, cast

import numpy as np

from meshwright.cost.estimate import Estimate, Memory, StageMemory
from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import TrafficEntry

Document = dict[str, Any]


def dumps(document: object) -> str:
    """The document as strict JSON text."""
    return json.dumps(plain(document), indent=2, allow_nan=False, ensure_ascii=False)


def plain(value: object) -> Any:
    """Plain JSON values of dataclasses, enums, arrays, mappings and sequences; NaN and infinity become None."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.generic):
        return plain(cast(object, value.item()))
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return plain(cast(list[object], value.tolist()))
    if isinstance(value, Mapping):
        mapping = cast(Mapping[object, object], value)
        return {str(plain(key)): plain(item) for key, item in mapping.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in cast(Iterable[object], value)]
    raise TypeError(f"no JSON form for {type(value).__name__}")


def config_document(config: HybridParallelConfig) -> Document:
    """Every field of the configuration and the sizes that follow from it."""
    follows = {
        "world_size": config.world_size,
        "expert_dp": config.expert_dp,
        "num_microbatches": config.num_microbatches,
    }
    return {**plain(config), **follows}


def estimate_document(estimate: Estimate) -> Document:
    """One entry of `plans[]`: config, memory, traffic, time, throughput, efficiency."""
    return {
        "config": config_document(estimate.config),
        "memory": memory_document(estimate.memory),
        "traffic": [_traffic_line(stage, entry) for stage, lines in estimate.traffic.items() for entry in lines],
        "time": {
            "step_s": plain(estimate.time.step_s),
            "parts_s": plain(estimate.time.parts_s),
            "hidden_s": plain(estimate.time.hidden_s),
        },
        "throughput": plain(estimate.throughput),
        "confidence": plain(estimate.confidence),
        "efficiency": plain(estimate.efficiency),
    }


def memory_document(memory: Memory) -> Document:
    peak = memory.peak
    return {
        "fits": memory.fits,
        "capacity_bytes": memory.capacity_bytes,
        "peak_bytes": peak.total_bytes,
        "peak_stage": peak.stage,
        "headroom_bytes": memory.capacity_bytes - peak.total_bytes,
        "stages": [_stage_memory(stage) for stage in memory.stages],
    }


def _stage_memory(stage: StageMemory) -> Document:
    return {"stage": stage.stage, "total_bytes": stage.total_bytes, "bytes_by_kind": plain(stage.bytes_by_kind)}


def _traffic_line(stage: int, entry: TrafficEntry) -> Document:
    return {"stage": stage, **plain(entry)}

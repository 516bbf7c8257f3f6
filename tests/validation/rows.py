"""Made-up measurement rows of the schema, to be varied by tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL: dict[str, Any] = {
    "name": "Tiny-1B",
    "layers": 16,
    "hidden": 2048,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 128,
    "ffn": 8192,
    "vocab": 32000,
    "gated_mlp": True,
    "tied_embeddings": False,
    "experts": None,
    "attention": "gqa",
}
MOE: dict[str, Any] = MODEL | {"experts": 8, "topk": 2, "moe_ffn": 4096, "dense_layers": 0}

ROW: dict[str, Any] = {
    "id": "tiny-1",
    "tier": "A",
    "family": "tiny",
    "dense_or_moe": "dense",
    "framework": "Megatron-Core",
    "model": MODEL,
    "seq": 4096,
    "gpu": "H100-80GB-SXM",
    "gpus": 16,
    "gpus_per_node": 8,
    "nvlink_domain": 8,
    "intra_bw": 450,
    "inter_bw": 50,
    "precision": "bf16",
    "tp": 2,
    "pp": 2,
    "vpp": 1,
    "dp": 4,
    "cp": 1,
    "ep": 1,
    "etp": None,
    "sp": True,
    "zero": 1,
    "recompute": "none",
    "recompute_detail": None,
    "micro_batch": 1,
    "global_batch": 64,
    "schedule": "1F1B",
    "attention_impl": None,
    "measured": {"tokens_per_s_per_gpu": 20000.0, "iter_time_s": None, "peak_mem_gib": 12.0},
    "mem_kind": None,
    "derived": {},
    "flags": [],
    "notes": "",
}


def row(**changes: Any) -> dict[str, Any]:
    return ROW | changes


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path

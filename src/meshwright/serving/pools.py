"""What vLLM is told of a pool of a disaggregated plan: its connector, its role, its side channel; and what it refuses.

In: the plan's section and its split. Out: the value of `--kv-transfer-config`, environment, a note for people. Rules
are those of vLLM 0.32 (kv_transfer.py, nixl/base_worker.py); `make test-serving` has its parser read the arguments.
"""

from __future__ import annotations

import json

from meshwright.layout.config import HybridParallelConfig
from meshwright.plan import ServingWorkload

ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
PULL, PUSH = "NixlConnector", "NixlPushConnector"
SIDE_CHANNELS = {"prefill": 5600, "decode": 5700}
PORT_OFFSETS = {"prefill": 0, "decode": 100}
"""First port of a pool's engines for the exchange of addresses, and what is added to that of their API: both pools may
stand on one node."""

NOTE = (
    "start both pools, each on devices of its own (CUDA_VISIBLE_DEVICES where they share a node), set "
    "VLLM_NIXL_SIDE_CHANNEL_HOST to an address that the other pool reaches, and put a proxy before them that sends a "
    "request first to prefill (max_tokens=1), then with its kv_transfer_params to decode (vLLM's "
    "toy_proxy_server.py does). vLLM's parser has read these arguments; no pool has been started: NIXL needs GPUs"
)


def transfer_config(section: ServingWorkload) -> str:
    """JSON for `--kv-transfer-config`."""
    assert section.pool is not None
    return json.dumps({"kv_connector": section.kv_connector or PULL, "kv_role": ROLES[section.pool]})


def pool_environment(section: ServingWorkload, engine: int, replicas: int) -> dict[str, str]:
    """Every engine's side channel; each of its `replicas` takes a port."""
    assert section.pool is not None
    return {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(SIDE_CHANNELS[section.pool] + engine * replicas)}


def connector_for(prefill: HybridParallelConfig) -> str:
    """vLLM's pulling connector reads from engines of one stage; the pushing one sends from several."""
    return PUSH if prefill.pp > 1 else PULL


def pool_problem(section: ServingWorkload, config: HybridParallelConfig) -> str | None:
    """Why vLLM would refuse this pool, or None."""
    if section.pool == "decode" and config.pp > 1:
        return f"vLLM's decode pool takes caches into one stage only; use pp=1 instead of {config.pp}"
    if section.pool == "prefill" and config.pp > 1 and section.kv_connector == PULL:
        return f"vLLM's {PULL} reads from engines of one stage; use kv_connector: {PUSH} in both pools, or pp=1"
    return None

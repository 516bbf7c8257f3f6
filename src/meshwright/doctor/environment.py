"""What NCCL_*, TORCH_* and CUDA_* variables say that contradicts itself, hides a hang, or is missing.

In: an environment as a mapping. Out: advice, one line per variable. Nothing is read or set here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """`kind`: contradicts, harmful, deprecated or missing."""

    variable: str
    kind: str
    advice: str


OLD_NAMES = {
    "NCCL_ASYNC_ERROR_HANDLING": "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "NCCL_BLOCKING_WAIT": "TORCH_NCCL_BLOCKING_WAIT",
    "NCCL_DESYNC_DEBUG": "TORCH_NCCL_DESYNC_DEBUG",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "TORCH_FR_BUFFER_SIZE",
}
"""Names that torch renamed (torch/csrc/distributed/c10d: the old ones warn or are ignored)."""


def check_environment(variables: Mapping[str, str], hosts: int = 1, gpus: bool | None = None) -> tuple[Advice, ...]:
    """`hosts`: machines of the job; `gpus`: whether it runs on them (None: as CUDA_VISIBLE_DEVICES lets it look)."""
    on_gpus = variables.get("CUDA_VISIBLE_DEVICES", "") != "" if gpus is None else gpus
    found = [
        Advice(old, "deprecated", f"renamed: torch reads {new}")
        for old, new in OLD_NAMES.items()
        if old in variables and new not in variables
    ]
    if on_gpus:
        found += _of_nccl(variables, hosts)
    if hosts > 1 and not any(name in variables for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")):
        name = "NCCL_SOCKET_IFNAME" if on_gpus else "GLOO_SOCKET_IFNAME"
        found.append(Advice(name, "missing", f"{hosts} hosts: name the interface, or each host picks its own"))
    size = variables.get("TORCH_FR_BUFFER_SIZE", variables.get("TORCH_NCCL_TRACE_BUFFER_SIZE"))
    if on_gpus and size in (None, "0"):
        found.append(Advice("TORCH_FR_BUFFER_SIZE", "missing", "set it to 2000 for Flight Recorder dumps of NCCL"))
    if variables.get("CUDA_LAUNCH_BLOCKING") == "1":
        found.append(Advice("CUDA_LAUNCH_BLOCKING", "harmful", "every kernel waits: overlap is gone, hangs move"))
    return tuple(found)


def _of_nccl(variables: Mapping[str, str], hosts: int) -> list[Advice]:
    found: list[Advice] = []
    if (
        variables.get("TORCH_NCCL_BLOCKING_WAIT") == "1"
        and variables.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0") != "0"
    ):
        text = "with TORCH_NCCL_ASYNC_ERROR_HANDLING set only one of them takes effect: unset one"
        found.append(Advice("TORCH_NCCL_BLOCKING_WAIT", "contradicts", text))
    if variables.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        found.append(
            Advice(
                "TORCH_NCCL_ASYNC_ERROR_HANDLING", "harmful", "0: a collective that timed out never ends its process"
            )
        )
    if variables.get("TORCH_NCCL_ENABLE_MONITORING") == "0":
        found.append(Advice("TORCH_NCCL_ENABLE_MONITORING", "harmful", "0: a stuck NCCL watchdog is not noticed"))
    if variables.get("NCCL_P2P_DISABLE") == "1":
        found.append(Advice("NCCL_P2P_DISABLE", "harmful", "1: traffic inside a host leaves NVLink"))
    if variables.get("NCCL_IB_DISABLE") == "1" and hosts > 1:
        found.append(Advice("NCCL_IB_DISABLE", "harmful", "1: traffic between hosts goes over TCP"))
    if variables.get("NCCL_IB_DISABLE") == "1" and "NCCL_IB_HCA" in variables:
        found.append(Advice("NCCL_IB_HCA", "contradicts", "chosen while NCCL_IB_DISABLE=1 turns InfiniBand off"))
    if "NCCL_DEBUG" not in variables and hosts > 1:
        found.append(Advice("NCCL_DEBUG", "missing", "set it to WARN: NCCL then says why a connection failed"))
    return found

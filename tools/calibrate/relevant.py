"""Which constants the rows can say anything about.

In: groups of rows. Out: the parameters to fit: a kernel's efficiency only where a row runs it, an overlap only where a
row has that traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tools.calibrate.parameters import DEVICE_RANGES, NETWORK_RANGES, STACK_RANGES, Parameter, current
from tools.calibrate.problem import Group

from meshwright.cost.device import NARROW
from meshwright.cost.stack import fitted_as
from meshwright.models.spec import MoeMlp

Test = Callable[[Group], bool]


def _any(field: str) -> Test:
    return lambda group: bool((getattr(group.plan.candidates, field) > 1).any())


def _moe(group: Group) -> bool:
    return any(isinstance(kind.mlp, MoeMlp) for kind in group.plan.model.kinds)


def _narrow(group: Group) -> bool:
    return group.plan.candidates.precision in NARROW


def _replicated(group: Group) -> bool:
    candidates = group.plan.candidates
    return bool(((candidates.zero < 3) & (candidates.dp > 1)).any())


def _unsharded(group: Group) -> bool:
    candidates = group.plan.candidates
    return bool(((candidates.zero == 0) & (candidates.dp > 1)).any())


def _kernel(group: Group) -> str:
    workload = group.plan.workload
    return (workload.attention or group.stack.attention) if workload.flash_attention else "none"


NEEDS: dict[str, Test] = {
    "permute_passes": _moe,
    "moe_host_s": _moe,
    "moe_imbalance": _moe,
    "cast_passes": _narrow,
    "gemm_fp8": _narrow,
    "ep_overlap": _any("ep"),
    "cp_overlap": _any("cp"),
    "tp_overlap": _any("tp"),
    "tp_host_s": _any("tp"),
    "pp_overlap": _any("pp"),
    "boundary_host_s": _any("pp"),
    "pp_overlap_interleaved": _any("vpp"),
    "fsdp_overlap": lambda group: bool((group.plan.candidates.zero == 3).any()),
    "dp_overlap": _replicated,
    "gather_overlap": _replicated,
    "tp_wait_s": lambda group: group.stack.tp_wait_s > 0,
    "message_stall_s": lambda group: group.stack.message_stall_s > 0,
    "stall_s": lambda group: group.stack.stall_s > 0,
    "ddp_overlap": lambda group: group.stack.ddp_overlap > 0 and _unsharded(group),
    "softmax_passes": lambda group: _kernel(group) == "none",
}


def _tells(group: Group, field: str) -> bool:
    table, _, kernel = field.partition(".")
    if kernel:
        return _kernel(group) == kernel
    return NEEDS.get(table, lambda _: True)(group)


def relevant(groups: Sequence[Group]) -> list[Parameter]:
    """Device constants first, then stacks, then the network."""
    devices = {
        (group.cluster.accelerator.architecture, field)
        for group in groups
        for field in DEVICE_RANGES
        if _tells(group, field)
    }
    owned = {
        (fitted_as(group.stack, field), field) for group in groups for field in STACK_RANGES if _tells(group, field)
    }
    found = [
        *(Parameter("device", owner, field) for owner, field in sorted(devices)),
        *(Parameter("stack", owner, field) for owner, field in sorted(owned)),
        *(Parameter("network", "network", field) for field in NETWORK_RANGES),
    ]
    return [parameter for parameter in found if current(parameter) != 0.0]  # stated as none: a fact, not a constant

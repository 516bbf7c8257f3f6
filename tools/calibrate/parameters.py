"""Parameters of the fit: which constants move, between which bounds, and how they enter the machine.

In: a vector. Out: `Device`, `Stack` and `Network` with the values set. Shares move on a logit scale inside their
bounds, everything else on a log scale, so that a step never leaves the physical range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.collectives import Network
from meshwright.cost.device import Device, device_for, network
from meshwright.cost.stack import Stack, fitted_as, stacks

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """Bounds of a constant and how far (in its transformed scale) a fit may pull it from its prior per unit of cost."""

    low: float
    high: float
    log: bool = False
    prior_sigma: float = 1.0


DEVICE_RANGES: dict[str, Range] = {
    "gemm": Range(0.3, 0.97, prior_sigma=1.0),
    "gemm_fp8": Range(0.2, 0.97, prior_sigma=1.0),
    "small_tile": Range(0.5, 0.99),
    "k_half": Range(30.0, 600.0, log=True, prior_sigma=0.5),
    "quantisation": Range(0.02, 0.98),
    "misaligned": Range(0.3, 0.99),
    "memory": Range(0.4, 0.95, prior_sigma=0.3),
    "attention.none": Range(0.1, 0.9),
    "attention.flash1": Range(0.1, 0.9),
    "attention.flash2": Range(0.1, 0.9),
    "attention.flash3": Range(0.1, 0.9),
    "attention.cudnn": Range(0.1, 0.9),
    "attention_backward": Range(0.4, 1.2),
    "attention_half_seq": Range(10.0, 4000.0, log=True, prior_sigma=0.5),
    "attention_head_power": Range(0.02, 1.0, log=True),
    "softmax_passes": Range(0.3, 5.0, log=True, prior_sigma=0.3),
    "launch_s": Range(1e-6, 1e-5, log=True, prior_sigma=0.25),
}

STACK_RANGES: dict[str, Range] = {
    "elementwise_passes": Range(0.3, 6.0, log=True, prior_sigma=0.5),
    "head_passes": Range(0.2, 10.0, log=True, prior_sigma=0.7),
    "cast_passes": Range(0.1, 5.0, log=True, prior_sigma=0.7),
    "permute_passes": Range(0.1, 8.0, log=True, prior_sigma=0.7),
    "layer_host_s": Range(1e-5, 1e-2, log=True, prior_sigma=1.0),
    "tp_host_s": Range(1e-6, 1e-2, log=True, prior_sigma=1.0),
    "moe_host_s": Range(1e-6, 1e-2, log=True, prior_sigma=1.0),
    "boundary_host_s": Range(1e-6, 0.02, log=True, prior_sigma=1.5),
    "tp_wait_s": Range(1e-5, 0.02, log=True, prior_sigma=1.0),
    "message_stall_s": Range(0.05, 5.0, log=True, prior_sigma=1.0),
    "stall_s": Range(0.05, 5.0, log=True, prior_sigma=1.0),
    "step_host_s": Range(1e-4, 0.3, log=True, prior_sigma=0.5),
    "microbatch_host_s": Range(1e-5, 0.05, log=True, prior_sigma=1.5),
    "dp_overlap": Range(0.01, 0.995),
    "ddp_overlap": Range(0.01, 0.995),
    "gather_overlap": Range(0.01, 0.995),
    "fsdp_overlap": Range(0.01, 0.995),
    "tp_overlap": Range(0.01, 0.95),
    "cp_overlap": Range(0.01, 0.99),
    "ep_overlap": Range(0.01, 0.95),
    "pp_overlap": Range(0.01, 0.99),
    "pp_overlap_interleaved": Range(0.01, 0.99),
    "contention": Range(0.01, 0.8),
    "moe_imbalance": Range(1.0001, 3.0, log=True, prior_sigma=0.3),
    "straggler": Range(1e-4, 0.05, log=True, prior_sigma=0.35),
    "optimizer_passes": Range(0.3, 10.0, log=True, prior_sigma=0.4),
}

NETWORK_RANGES: dict[str, Range] = {
    "call_s": Range(1e-6, 5e-5, log=True, prior_sigma=0.5),
    "congestion": Range(0.001, 0.5, log=True, prior_sigma=0.7),
    "all_to_all_efficiency": Range(0.1, 1.0),
}

RANGES = {"device": DEVICE_RANGES, "stack": STACK_RANGES, "network": NETWORK_RANGES}


@dataclass(frozen=True)
class Parameter:
    """One constant: `kind` device, stack or network, the name of the architecture or stack, the field."""

    kind: str
    owner: str
    field: str

    @property
    def range(self) -> Range:
        return RANGES[self.kind][self.field]

    @property
    def label(self) -> str:
        return f"{self.kind}.{self.owner}.{self.field}"

    @property
    def lowest(self) -> float:
        """The free scale's own end: a share nears its bounds without an end."""
        return float(np.log(self.range.low)) if self.range.log else -np.inf

    @property
    def highest(self) -> float:
        return float(np.log(self.range.high)) if self.range.log else np.inf

    def inward(self, value: float, margin: float = 0.03) -> float:
        """From the constant to the free scale. A share keeps `margin` of its range from the bounds, where the scale is
        so flat that a fit would not move: an assumed value is a place to start; a fitted one is taken as it is."""
        r = self.range
        if r.log:
            return float(np.log(min(max(value, r.low), r.high)))
        share = min(max((value - r.low) / (r.high - r.low), margin), 1 - margin)
        return float(np.log(share / (1 - share)))

    def outward(self, free: float) -> float:
        """From the free scale to the constant."""
        r = self.range
        if r.log:
            return float(np.clip(np.exp(free), r.low, r.high))
        return float(r.low + (r.high - r.low) / (1 + np.exp(-free)))


AS_FITTED = 1e-6
"""The margin of a value that a fit has found."""


def last_fit(parameters: Sequence[Parameter]) -> FloatArray:
    """The constants in force on the free scale."""
    return np.array([p.inward(current(p, fitted=True), AS_FITTED) for p in parameters])


def assumed(parameters: Sequence[Parameter]) -> FloatArray:
    """The values before any fit: the priors."""
    return np.array([p.inward(current(p)) for p in parameters])


def current(parameter: Parameter, fitted: bool = False) -> float:
    """The value that the data files hold: the assumed one (the prior of the fit), or the one fitted last."""
    if parameter.kind == "device":
        return _get(device_for(parameter.owner, fitted), parameter.field)
    if parameter.kind == "stack":
        return float(getattr(stacks(fitted)[parameter.owner], parameter.field))
    return float(getattr(network(fitted), parameter.field))


def _get(device: Device, name: str) -> float:
    table, _, key = name.partition(".")
    return device.attention[key] if key else float(getattr(device, table))


def _set(target: Any, name: str, value: float) -> Any:
    table, _, key = name.partition(".")
    return replace(target, **{table: {**getattr(target, table), key: value} if key else value})


@dataclass(frozen=True)
class Constants:
    """Every constant at its present value, with the fit's values on top."""

    values: dict[str, dict[str, dict[str, float]]]

    @classmethod
    def of(cls, parameters: Sequence[Parameter], free: FloatArray) -> Constants:
        values: dict[str, dict[str, dict[str, float]]] = {"device": {}, "stack": {}, "network": {}}
        for parameter, point in zip(parameters, free.tolist(), strict=True):
            values[parameter.kind].setdefault(parameter.owner, {})[parameter.field] = parameter.outward(point)
        return cls(values)

    def device(self, architecture: str) -> Device:
        found = device_for(architecture)
        for name, value in self.values["device"].get(architecture, {}).items():
            found = _set(found, name, value)
        return found

    def stack(self, row_stack: Stack) -> Stack:
        """A row's own stack (its flags kept) with the fitted values of the stack of that name."""
        values = self.values["stack"]
        owners = {name: fitted_as(row_stack, name) for name in STACK_RANGES}
        found = {name: values[owner][name] for name, owner in owners.items() if name in values.get(owner, {})}
        return replace(row_stack, **found)

    def network(self) -> Network:
        return replace(network(), **self.values["network"].get("network", {}))


assert {n.partition(".")[0] for n in DEVICE_RANGES} <= {f.name for f in fields(Device)}
assert set(STACK_RANGES) <= {f.name for f in fields(Stack)}

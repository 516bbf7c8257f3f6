"""The measurements as a fast function of the constants.

In: rows converted to (model, cluster, workload, config, stack). Out: predicted step seconds for any constants. Stages,
memory and traffic do not depend on the constants: they are worked out once per group of rows that share everything but
the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tools.calibrate.parameters import Constants, Parameter

from meshwright.cost.blueprint import Blueprint, blueprint
from meshwright.cost.candidates import Candidates, unit_keys
from meshwright.cost.memory import training_memory
from meshwright.cost.stack import Stack, fitted_as
from meshwright.cost.stages import stages
from meshwright.cost.step import Machine, assembled, kernels_of, messages_of, with_stalls
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.spec import ModelSpec

FloatArray = NDArray[np.float64]
KERNEL_TRAITS = (
    "elementwise_passes",
    "head_passes",
    "cast_passes",
    "permute_passes",
    "moe_imbalance",
    "gemm_scale",
)
"""Traits of a stack that kernel times depend on."""

Case = tuple[ModelSpec, Cluster, Workload, HybridParallelConfig, Stack]


@dataclass(frozen=True)
class Group:
    """Rows of one model on one kind of cluster with one stack, ready to be priced."""

    rows: NDArray[np.int64]
    cluster: Cluster
    stack: Stack
    plan: Blueprint
    memory_bytes: FloatArray
    memo: dict[str, tuple[object, Any]] = field(default_factory=dict[str, tuple[object, Any]])

    def uses(self, parameter: Parameter) -> bool:
        """Whether a constant can change the time of these rows."""
        if parameter.kind == "device":
            return parameter.owner == self.cluster.accelerator.architecture
        if parameter.kind == "stack":
            return fitted_as(self.stack, parameter.field) == parameter.owner
        return True

    def step_s(self, constants: Constants) -> FloatArray:
        """Predicted seconds of a step per row."""
        device = constants.device(self.cluster.accelerator.architecture)
        machine = Machine(self.cluster, device, constants.network(), constants.stack(self.stack))
        stack = machine.stack
        kernels = self._kept("kernels", [device, *(getattr(stack, t) for t in KERNEL_TRAITS)], kernels_of, machine)
        messages = self._kept("messages", machine.network, messages_of, machine)
        step = assembled(self.plan, machine, kernels, messages)
        return with_stalls(step, self.plan.model, self.plan.candidates, self.memory_bytes, machine).step_s

    def _kept(self, name: str, key: object, work: Callable[[Blueprint, Machine], Any], machine: Machine) -> Any:
        """The last result, as long as what it depends on is the same."""
        if name not in self.memo or self.memo[name][0] != key:
            self.memo[name] = (key, work(self.plan, machine))
        return self.memo[name][1]


def groups(cases: Sequence[Case]) -> list[Group]:
    """Rows gathered by all that is not the configuration; clusters that differ only in nodes are one."""
    found: dict[tuple[object, ...], list[int]] = {}
    for index, (model, cluster, workload, config, stack) in enumerate(cases):
        size = cluster.nodes if cluster.domain > cluster.gpus_per_node else 0
        key = (id(model), repr(replace(cluster, nodes=1)), size, workload, repr(stack), config.precision)
        found.setdefault(key, []).append(index)
    return [_group(cases, np.array(rows)) for rows in found.values()]


def _group(cases: Sequence[Case], rows: NDArray[np.int64]) -> Group:
    model, cluster, workload, _, stack = cases[int(rows[0])]
    candidates = Candidates.from_configs([cases[int(r)][3] for r in rows])
    cluster = replace(cluster, nodes=max(cases[int(r)][1].nodes for r in rows))
    held = np.zeros(len(rows))
    if stack.stalls:
        shape = stages(model, candidates), unit_keys(candidates)
        held = training_memory(model, cluster, workload, candidates, *shape, stack).peak_bytes
    return Group(rows, cluster, stack, blueprint(model, workload, candidates, stack), held)


@dataclass(frozen=True)
class Problem:
    """All groups, the measured seconds per row, and the weight of each row."""

    groups: list[Group]
    measured_s: FloatArray
    weight: FloatArray

    def residuals(
        self, constants: Constants, only: Parameter | None = None, base: FloatArray | None = None
    ) -> FloatArray:
        """log(predicted / measured) per row; with `only`, rows that it cannot change are copied from `base`."""
        out = np.zeros(len(self.measured_s)) if base is None else base.copy()
        for group in self.groups:
            if only is None or group.uses(only):
                out[group.rows] = np.log(group.step_s(constants) / self.measured_s[group.rows])
        return out

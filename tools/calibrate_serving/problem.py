"""Serving measurements as a fast function of the engines' traits.

In: cases. Out: log(predicted / measured) per row for any traits. Rows of one model, cluster, engine and format are one
array of candidates; how many sequences fit and how layers are staged does not depend on the traits and is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tools.calibrate_serving.rows import Rows
from tools.calibrate_serving.traits import FloatArray, Parameter, engines, lineage

from meshwright.cost.candidates import Candidates
from meshwright.cost.serving import running_sequences, serving_engine
from meshwright.cost.serving_pass import Engine, engine
from meshwright.cost.serving_rates import Requests, output_rate, static_batch_seconds, token_seconds
from meshwright.cost.serving_stack import ServingStack
from meshwright.validation.serving import rate_of
from meshwright.validation.serving_row import Kind, ServingCase


@dataclass(frozen=True)
class Group:
    """Rows that are priced as one array."""

    rows: NDArray[np.int64]
    cases: list[ServingCase]
    engine: Engine
    asked: Requests
    sequences: FloatArray

    @property
    def name(self) -> str:
        return self.engine.stack.name

    def rates(self, stack: ServingStack) -> FloatArray:
        """Predicted rate of what each row measured."""
        x = self.engine
        x = engine(x.model, x.cluster, x.device, x.network, stack, x.candidates, x.stages, x.kv_bytes, x.weight_bytes)
        tpot = token_seconds(x, self.asked, self.sequences)
        kinds = {case.kind for case in self.cases}
        rate = output_rate(x, self.asked, self.sequences, tpot) if Kind.THROUGHPUT in kinds else tpot
        latency = tpot
        if kinds - {Kind.THROUGHPUT, Kind.DECODE}:
            latency = static_batch_seconds(x, self.asked, self.sequences)
        return np.array([
            rate_of(case, self.sequences[i], tpot[i], latency[i], rate[i] * case.config.dp / case.gpus)
            for i, case in enumerate(self.cases)
        ])  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """All groups and the measured rates."""

    groups: list[Group]
    measured: FloatArray

    def residuals(
        self, traits: Mapping[str, ServingStack], only: Parameter | None = None, base: FloatArray | None = None
    ) -> FloatArray:
        """log(predicted / measured) per row; with `only`, rows that it cannot change are copied from `base`."""
        out = np.zeros(len(self.measured)) if base is None else base.copy()
        for group in self.groups:
            if only is None or only.owner in lineage(group.name):
                out[group.rows] = np.log(group.rates(traits[group.name]) / self.measured[group.rows])
        return out


def problem_of(rows: Rows) -> Problem:
    """Rows gathered by all that an array of candidates shares."""
    found: dict[tuple[object, ...], list[int]] = {}
    for index, case in enumerate(rows.cases):
        key = (id(case.model), id(case.cluster), case.stack.name, case.config.precision, case.weight_bytes)
        found.setdefault((*key, case.workload.kv_bytes_per_element), []).append(index)
    return Problem([_group(rows, members) for members in found.values()], rows.measured)


def _group(rows: Rows, members: Sequence[int]) -> Group:
    cases = [rows.cases[i] for i in members]
    first = cases[0]
    candidates = Candidates.from_configs([case.config for case in cases])
    x = serving_engine(first.model, first.cluster, first.workload, candidates, first.stack, first.weight_bytes)
    parts = [Requests.of(case.workload, 1) for case in cases]
    asked = Requests(*(np.concatenate([getattr(p, name) for p in parts]) for name in Requests.__dataclass_fields__))
    sequences = np.array([_sequences(case) for case in cases])
    return Group(np.array(members), cases, x, asked, sequences)


def _sequences(case: ServingCase) -> float:
    """At once on a replica: the row's batch, or what the engine takes."""
    if case.batch is not None:
        return float(case.batch)
    one = Candidates.from_configs([case.config])
    x = serving_engine(case.model, case.cluster, case.workload, one, case.stack, case.weight_bytes)
    return float(running_sequences(x, case.workload)[0])


__all__ = ["Group", "Problem", "engines", "problem_of", "replace"]

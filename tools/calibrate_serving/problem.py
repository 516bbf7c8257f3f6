"""Serving measurements as a fast function of the engines' traits.

In: rows. Out: log(predicted / measured) of each for any traits. Rows of one model, cluster, engine and format are one
array of candidates; how many sequences fit and how layers are staged does not depend on the traits and is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from tools.calibrate_serving.rows import Rows
from tools.calibrate_serving.traits import FloatArray, Parameter, lineage

from meshwright.cost.candidates import Candidates
from meshwright.cost.serving import running_sequences, serving_engine
from meshwright.cost.serving_pass import Engine, engine
from meshwright.cost.serving_rates import Requests, output_rate, static_batch_seconds, token_seconds
from meshwright.cost.serving_stack import ServingStack
from meshwright.validation.serving import rate_of
from meshwright.validation.serving_row import Kind, ServingCase

Traits = Mapping[str, ServingStack]


@dataclass(frozen=True)
class Group:
    """Rows of one kind that are priced as one array."""

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
        tpot = latency = rate = np.full(len(self.cases), np.nan)
        if self.cases[0].kind in (Kind.THROUGHPUT, Kind.DECODE):
            tpot = token_seconds(x, self.asked, self.sequences)
            rate = output_rate(x, self.asked, self.sequences, tpot) * x.candidates.dp / x.candidates.world
        else:
            latency = static_batch_seconds(x, self.asked, self.sequences)
        found = zip(self.cases, self.sequences, tpot, latency, rate, strict=True)
        return np.array([rate_of(case, *(float(value) for value in values)) for case, *values in found])


@dataclass(frozen=True)
class Problem:
    """All groups and the measured rates."""

    groups: list[Group]
    measured: FloatArray

    def residuals(self, traits: Traits, only: Parameter | None = None, base: FloatArray | None = None) -> FloatArray:
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
        key = (id(case.model), id(case.cluster), case.stack.name, case.config.precision, case.weight_bytes, case.kind)
        found.setdefault((*key, case.workload.kv_bytes_per_element), []).append(index)
    return Problem([_group(rows, members) for members in found.values()], rows.measured)


def _group(rows: Rows, members: Sequence[int]) -> Group:
    cases = [rows.cases[i] for i in members]
    asked = [Requests.of(case.workload, 1) for case in cases]
    together = {f.name: np.concatenate([getattr(one, f.name) for one in asked]) for f in fields(Requests)}
    sequences = np.array([_sequences(case) for case in cases])
    return Group(np.array(members), cases, _engine(cases), Requests(**together), sequences)


def _engine(cases: Sequence[ServingCase]) -> Engine:
    first = cases[0]
    candidates = Candidates.from_configs([case.config for case in cases])
    return serving_engine(first.model, first.cluster, first.workload, candidates, first.stack, first.weight_bytes)


def _sequences(case: ServingCase) -> float:
    """At once on a replica: the row's batch, or what the engine takes."""
    return float(running_sequences(_engine([case]), case.workload)[0]) if case.batch is None else float(case.batch)

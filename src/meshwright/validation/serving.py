"""Predict serving cases and set the predictions beside what was measured.

Cases that share model, cluster, workload and engine are evaluated as one array of candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import Candidates
from meshwright.cost.serving import ServingArrays, serve_arrays
from meshwright.validation.scored import Pair, ScoredRow
from meshwright.validation.serving_row import Kind, ServingCase

GIB = 2.0**30


@dataclass(frozen=True)
class Prediction:
    """Of one case: tokens/s per GPU of the kind that the row measured, bytes on the fullest rank."""

    rate: float
    memory_bytes: float
    fits: bool


def score_serving(cases: Sequence[ServingCase]) -> list[ScoredRow]:
    """Every case scored, in order."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, case in enumerate(cases):
        key = (id(case.model), id(case.cluster), case.workload, case.stack.name, case.config.precision)
        groups.setdefault((*key, case.weight_bytes, case.batch is None), []).append(index)
    scored: dict[int, ScoredRow] = {}
    for members in groups.values():
        predictions = _predict([cases[i] for i in members])
        for index, prediction in zip(members, predictions, strict=True):
            scored[index] = _score(cases[index], prediction)
    return [scored[i] for i in range(len(cases))]


def _predict(cases: Sequence[ServingCase]) -> list[Prediction]:
    """The cases of one group. A batch that the row does not give is what the engine takes."""
    first = cases[0]
    candidates = Candidates.from_configs([case.config for case in cases])
    batch = None if first.batch is None else np.array([float(case.batch or 1) for case in cases])
    arrays = serve_arrays(
        first.model, first.cluster, first.workload, candidates, batch, first.stack, first.weight_bytes
    )
    held = arrays.weights_bytes + arrays.workspace_bytes + arrays.cache_bytes_per_sequence * arrays.sequences
    held = held + first.cluster.reserved_bytes  # engines print what the device has in use, context included
    return [
        Prediction(_rate(case, arrays, row), float(held[row]), bool(arrays.fits[row])) for row, case in enumerate(cases)
    ]


def _rate(case: ServingCase, arrays: ServingArrays, row: int) -> float:
    found = (arrays.sequences, arrays.tpot_s, arrays.latency_s, arrays.tokens_per_s_per_gpu)
    return rate_of(case, *(float(values[row]) for values in found))


def rate_of(case: ServingCase, batch: float, tpot_s: float, latency_s: float, tokens_per_s_per_gpu: float) -> float:
    """What the row's kind measures, in tokens/s per GPU. `batch` sequences on a replica."""
    sequences = case.config.dp * batch / case.gpus
    match case.kind:
        case Kind.THROUGHPUT:
            return tokens_per_s_per_gpu
        case Kind.TTFT:  # of one output token, the first, the latency is the time to it
            return sequences * case.workload.prompt / latency_s
        case Kind.DECODE:
            return sequences / tpot_s
        case _:
            return sequences * case.workload.output / latency_s


def _score(case: ServingCase, prediction: Prediction) -> ScoredRow:
    gib = prediction.memory_bytes / GIB
    return ScoredRow(
        group=case.group,
        rate=None if case.measured_rate is None else Pair(case.measured_rate, prediction.rate),
        memory=None if case.measured_gib is None else Pair(case.measured_gib, gib),
        ran=case.kind is not Kind.OOM,
        fits=prediction.fits,
        predicted_rate=prediction.rate,
        predicted_gib=gib,
        assumed=case.assumed,
    )

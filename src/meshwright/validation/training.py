"""Predict training cases and set the predictions beside what was measured.

Cases that share model, cluster, workload and software are evaluated as one array of candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import Candidates
from meshwright.cost.evaluate import machine_of, price
from meshwright.cost.memory import MemoryArrays
from meshwright.cost.throughput import tokens_per_s_per_gpu
from meshwright.hardware.spec import Cluster
from meshwright.validation.readings import MemoryBasis, MemoryReading
from meshwright.validation.scored import Pair, ScoredRow
from meshwright.validation.training_row import TrainingCase

GIB = 2.0**30


@dataclass(frozen=True)
class Prediction:
    """Of one configuration. `memory_bytes` counts what the row's own number counts."""

    tokens_per_s_per_gpu: float
    memory_bytes: float
    fits: bool


def score_training(cases: Sequence[TrainingCase]) -> list[ScoredRow]:
    """Every case scored, in order."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, case in enumerate(cases):
        key = (id(case.model), id(case.cluster), case.workload, case.stack.name, case.configs[0].precision)
        groups.setdefault(key, []).append(index)
    scored: dict[int, ScoredRow] = {}
    for members in groups.values():
        predictions = _predict([cases[i] for i in members])
        for index, choices in zip(members, predictions, strict=True):
            scored[index] = _score(cases[index], choices)
    return [scored[i] for i in range(len(cases))]


def _predict(cases: Sequence[TrainingCase]) -> list[list[Prediction]]:
    """Predictions of every configuration of every case of one group."""
    first = cases[0]
    candidates = Candidates.from_configs([config for case in cases for config in case.configs])
    priced = price(first.model, first.workload, machine_of(first.cluster, first.stack), candidates)
    rate = tokens_per_s_per_gpu(first.workload, candidates, priced.step.step_s)
    fits = priced.memory.peak_bytes <= first.cluster.accelerator.memory_bytes
    predictions: list[list[Prediction]] = []
    row = 0
    for case in cases:
        choices: list[Prediction] = []
        for _ in case.configs:
            memory = _memory_bytes(priced.memory, first.cluster, row, case.memory)
            choices.append(Prediction(float(rate[row]), memory, bool(fits[row])))
            row += 1
        predictions.append(choices)
    return predictions


def _memory_bytes(memory: MemoryArrays, cluster: Cluster, row: int, reading: MemoryReading) -> float:
    """The predicted figure of the kind that the row published."""
    match reading.basis:
        case MemoryBasis.ALLOCATED:
            stages = memory.allocated[row]
        case MemoryBasis.RESERVED:
            stages = memory.total[row] - cluster.reserved_bytes
        case MemoryBasis.DEVICE:
            stages = memory.total[row]
    return float(np.max(stages) if reading.stage is None else stages[reading.stage])


def _score(case: TrainingCase, choices: Sequence[Prediction]) -> ScoredRow:
    """The first choice that fits stands for the row; the last where none does."""
    prediction = next((choice for choice in choices if choice.fits), choices[-1])
    measured = case.measured
    gib = prediction.memory_bytes / GIB
    return ScoredRow(
        group=case.group,
        rate=_pair(measured.tokens_per_s_per_gpu, prediction.tokens_per_s_per_gpu),
        memory=_pair(measured.peak_mem_gib, gib),
        ran=measured.ran,
        fits=prediction.fits if case.fit_counts else None,
        predicted_rate=prediction.tokens_per_s_per_gpu,
        predicted_gib=gib,
        assumed=case.assumed,
    )


def _pair(measured: float | None, predicted: float) -> Pair | None:
    return None if measured is None else Pair(measured, predicted)

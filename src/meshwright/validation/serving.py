"""Predict serving cases and set the predictions beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.cost.serving import ServingEstimate, serve_estimate
from meshwright.validation.scored import Pair, ScoredRow
from meshwright.validation.serving_row import Kind, ServingCase

GIB = 2.0**30


def score_serving(cases: Sequence[ServingCase]) -> list[ScoredRow]:
    """Every case scored, in order."""
    return [_score(case) for case in cases]


def _score(case: ServingCase) -> ScoredRow:
    estimate = serve_estimate(
        case.model, case.cluster, case.workload, case.config, case.batch, case.stack, case.weight_bytes
    )
    rate, gib = _rate(case, estimate), _bytes(estimate) / GIB
    return ScoredRow(
        group=case.group,
        rate=None if case.measured_rate is None else Pair(case.measured_rate, rate),
        memory=None if case.measured_gib is None else Pair(case.measured_gib, gib),
        ran=case.kind is not Kind.OOM,
        fits=estimate.fits,
        predicted_rate=rate,
        predicted_gib=gib,
        assumed=case.assumed,
    )


def _rate(case: ServingCase, estimate: ServingEstimate) -> float:
    """What the row's kind measures, in tokens/s per GPU."""
    replicas, batch = case.config.dp, estimate.sequences
    match case.kind:
        case Kind.THROUGHPUT:
            return estimate.tokens_per_s_per_gpu
        case Kind.TTFT:
            seconds = estimate.latency_s  # one output token: the first
            return replicas * batch * case.workload.prompt / seconds / case.gpus
        case Kind.DECODE:
            return replicas * batch / estimate.tpot_s / case.gpus
        case _:
            return replicas * batch * case.workload.output / estimate.latency_s / case.gpus


def _bytes(estimate: ServingEstimate) -> float:
    """Weights, workspace and the caches of what runs, on the fullest rank."""
    return estimate.weights_bytes + estimate.workspace_bytes + estimate.cache_bytes_per_sequence * estimate.sequences

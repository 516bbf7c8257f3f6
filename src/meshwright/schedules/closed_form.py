"""Bubble and live activations of every schedule in closed form, over arrays: what the planner uses for millions.

In: arrays (or scalars; they broadcast) of schedule codes - positions in `tuple(Schedule)` - and sizes. Out: float
arrays. The classic forms are those of the papers; those of the split-backward schedules are the longest paths through
their orders as built here. tests/schedules/test_closed_form.py holds each against `timing.simulate` and `check`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.layout.config import Schedule

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_CODE = {schedule: code for code, schedule in enumerate(Schedule)}


def live_microbatches(
    schedule: ArrayLike, pp: ArrayLike, microbatches: ArrayLike, vpp: ArrayLike, stage: ArrayLike
) -> FloatArray:
    """Most microbatches whose activations a stage holds at once, each counted as a share of the whole stage.

    Activations are held from the forward pass to the weight gradient. GPipe: m. 1F1B: min(m, p - s) (Narayanan et al.
    2021, section 2.2.1). Interleaved: (2 (p - s - 1) + (v - 1) g + 1) / v with groups of g microbatches (same, section
    2.2.2, where g = p). ZB-H1 and ZBV: p on every stage (Qi et al. 2023, 2024). DualPipeV: p + 1/2 (DeepSeek-V3).
    """
    code, *sizes = (np.asarray(value, dtype=np.int64) for value in (schedule, pp, microbatches, vpp, stage))
    shape = np.broadcast_shapes(code.shape, *(size.shape for size in sizes))
    live = np.broadcast_to(sizes[1], shape).astype(np.float64)  # GPipe
    # one schedule a row: sizes stay as narrow as they are
    by_row = code.shape == (*shape[:1], 1) and all(size.ndim == 2 and len(size) == shape[0] for size in sizes)
    code = code[:, 0] if by_row else np.broadcast_to(code, shape)
    for name, formula in _LIVE.items():
        rows = code == _CODE[name]
        if rows.any():
            live[rows] = formula(*(size[rows] if by_row else np.broadcast_to(size, shape)[rows] for size in sizes))
    return live


def bubble_microbatches(
    schedule: ArrayLike,
    pp: ArrayLike,
    microbatches: ArrayLike,
    vpp: ArrayLike,
    forward_s: ArrayLike,
    backward_s: ArrayLike,
    weight_s: ArrayLike | None = None,
) -> FloatArray:
    """Idle seconds of a stage in one step: its makespan less the m microbatches that it computes.

    `forward_s` and `backward_s` are those of one microbatch through one stage (all its chunks); `weight_s` is the part
    of the backward pass that makes weight gradients (None: half). Stages are taken as equal and messages as free.
    GPipe and 1F1B: (p - 1)(F + B); interleaved: that over v, with (v - 1)(p - m) more where m < p (Narayanan et al.
    2021, section 2.2); ZB-H1: (p - 1)(F + B - 2W) from m = p on (Qi et al. 2023, table 2).

    Exact for input gradients no faster than the forward pass (they have its FLOPs), but for ZBV with p + 1 < m < 2p,
    where the step is within 2 %.
    """
    code, p, m, v = _integers(schedule, pp, microbatches, vpp)
    forward, backward = np.asarray(forward_s, dtype=np.float64), np.asarray(backward_s, dtype=np.float64)
    weight = backward / 2 if weight_s is None else np.asarray(weight_s, dtype=np.float64)
    code, p, m, v, forward, backward, weight = np.broadcast_arrays(code, p, m, v, forward, backward, weight)
    plain = np.where(code == _CODE[Schedule.INTERLEAVED], v, 1)
    idle = np.asarray((p - 1 + (plain - 1) * np.maximum(p - m, 0)) * (forward + backward) / plain)
    for name, paths, chunks in (
        (Schedule.ZB_H1, _zb_h1_paths, 1),
        (Schedule.ZBV, _zbv_paths, 2),
        (Schedule.DUALPIPEV, _dualpipev_paths, 2),
    ):
        rows = (code == _CODE[name]) & (p > 1)
        if rows.any():
            inputs = (backward - weight)[rows]
            idle[rows] = np.max(paths(p[rows], m[rows], forward[rows], inputs, weight[rows]), axis=0) / chunks
    return idle


def bubble_fraction(
    schedule: ArrayLike,
    pp: ArrayLike,
    microbatches: ArrayLike,
    vpp: ArrayLike,
    forward_s: ArrayLike = 1.0,
    backward_s: ArrayLike = 2.0,
    weight_s: ArrayLike | None = None,
) -> FloatArray:
    """Idle share of the makespan: bubble / (bubble + m (F + B))."""
    idle = bubble_microbatches(schedule, pp, microbatches, vpp, forward_s, backward_s, weight_s)
    busy = np.asarray(microbatches) * (np.asarray(forward_s, dtype=np.float64) + np.asarray(backward_s))
    return idle / (idle + busy)


def _interleaved_live(p: IntArray, m: IntArray, v: IntArray, s: IntArray) -> FloatArray:
    return np.minimum(m * v, 2 * (p - s - 1) + (v - 1) * largest_group(p, m) + 1) / v


def _v_live(p: IntArray, m: IntArray, s: IntArray, more: int) -> FloatArray:
    return np.minimum(2 * p + more, m + np.minimum(m, s + 1)) / 2


_LIVE: dict[Schedule, Callable[[IntArray, IntArray, IntArray, IntArray], IntArray | FloatArray]] = {
    Schedule.ONE_F_ONE_B: lambda p, m, v, s: np.minimum(m, p - s),
    Schedule.INTERLEAVED: _interleaved_live,
    Schedule.ZB_H1: lambda p, m, v, s: np.minimum(m, p),
    Schedule.ZBV: lambda p, m, v, s: _v_live(p, m, s, 0),
    Schedule.DUALPIPEV: lambda p, m, v, s: _v_live(p, m, s, 1),
}
"""Live microbatches of a stage by schedule, from stages, microbatches, chunks and the stage's index."""


def largest_group(pp: IntArray, microbatches: IntArray) -> IntArray:
    """Microbatches in the largest group of interleaved 1F1B (`one_forward_one_backward.microbatch_groups`)."""
    groups = np.maximum(1, microbatches // pp)
    return -(-microbatches // groups)


def _integers(*values: ArrayLike) -> tuple[IntArray, ...]:
    return tuple(np.broadcast_arrays(*(np.asarray(v, dtype=np.int64) for v in values)))


# Paths below: F, I, W are seconds of forward, input gradient and weight gradient; q = p - 1; `a` counts microbatches
# that fill the pipeline behind the first, `k` those beyond the first p + 1.


def _zb_h1_paths(p: IntArray, m: IntArray, f: FloatArray, i: FloatArray, w: FloatArray) -> list[FloatArray]:
    q = p - 1
    a = np.minimum(m - 1, q)
    return [q * (f + i) - a * w, (q - a) * f + q * i, q * f + (q - a) * i]


def _zbv_paths(p: IntArray, m: IntArray, f: FloatArray, i: FloatArray, w: FloatArray) -> list[FloatArray]:
    q = p - 1
    a = np.minimum(m - 1, q)
    k = np.clip(m - p - 1, 0, q)
    past = m > p + 1  # from here on paths of the full V may be the longest
    return [
        2 * (q - a) * f + 2 * q * i - 2 * k * w,
        (2 * q - a) * (f + i) - 2 * k * w,
        np.where(past, np.maximum(q, 2 * q - 2 * k), 0.0) * i,
        np.where(past, i + (q - 1) * w, 0.0),
        np.where(past, f + (q - 1) * w, 0.0),
        np.where(past, (2 * q - 1) * f - (q - 1) * i, 0.0),
    ]


def _dualpipev_paths(p: IntArray, m: IntArray, f: FloatArray, i: FloatArray, w: FloatArray) -> list[FloatArray]:
    q = p - 1
    a = np.minimum(m - 1, q)
    k = np.clip(m - p - 1, 0, q)
    first = 2 * (q - a) - (m > p)
    return [
        first * f + 2 * q * i + (q - 2 * k) * w,
        first * f + (2 * q - k) * i + (q - k) * w,
        (2 * q - a) * (f + i) + (q - 2 * k) * w,
        (2 * q - a) * f + (2 * q - a - k) * i + (q - k) * w,
    ]

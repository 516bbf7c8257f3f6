"""What a training row measured: tokens/s per GPU, peak memory, whether it ran.

In: a row. Out: `Measured`. The published rate counts first; else the one recomputed from the published step time or
FLOP rate (`derived`), else tokens over the step time.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.models.fields import Fields

DERIVED = ("tokens_per_s_per_gpu", "tokens_per_s_per_gpu_from_tflops", "tokens_per_s_per_gpu_from_mfu")


@dataclass(frozen=True)
class Measured:
    """None where the source does not say. `ran` is False for a configuration that ran out of memory."""

    tokens_per_s_per_gpu: float | None
    peak_mem_gib: float | None
    ran: bool


def measured(row: Fields, seq: int, gpus: int) -> Measured:
    """The measured side of a row."""
    numbers = row.section("measured")
    if row.text("outcome").lower() == "oom":
        return Measured(None, None, ran=False)
    rate = memory = None
    if numbers is not None:
        rate, memory = positive(numbers, "tokens_per_s_per_gpu"), positive(numbers, "peak_mem_gib")
    derived = row.section("derived")
    for name in DERIVED:
        if rate is None and derived is not None:
            rate = positive(derived, name)
    step = positive(numbers, "iter_time_s") if numbers is not None else None
    if rate is None and step is not None and (batch := row.whole("global_batch", most=10**9)) is not None:
        rate = batch * seq / step / gpus
    return Measured(rate, memory, ran=True)


def positive(fields: Fields, name: str) -> float | None:
    """A positive number, or None where it is absent, null or zero."""
    value = fields.number(name)
    if value < 0:
        raise fields.error(f"{name} must not be negative, got {value:g}")
    return value or None

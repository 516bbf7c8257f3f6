"""What is left out of the walk through a stage changes nothing: equal layers, microbatches that repeat."""

from __future__ import annotations

from typing import Any

import pytest

from meshwright.cost.program import chunk as chunks
from meshwright.cost.program.chunk import Chunk, chunk_memory, layers_of
from meshwright.cost.program.layer import Model, written_down
from meshwright.cost.program.memory import fullest, stage_memory, stage_program
from meshwright.cost.program.moments import moments
from meshwright.cost.program.sharding import Sharding, Turn
from meshwright.cost.program.work import Work
from meshwright.layout.config import HybridParallelConfig, Precision, Schedule
from meshwright.models import load
from meshwright.models.spec import ModelSpec

LLAMA: ModelSpec = load("llama-3.1-8b")


@pytest.mark.parametrize(
    ("name", "sharding", "split"),
    [
        ("llama-3.1-8b", Sharding(), False),
        ("llama-3.1-8b", Sharding(3, 8, 8), False),
        ("llama-3.1-8b", Sharding(1, 8, 8, Turn.LAST), False),
        ("llama-3.1-8b", Sharding(), True),
        ("mixtral-8x7b", Sharding(2, 8, 4, Turn.FIRST), False),
    ],
)
def test_layers_that_are_not_walked_through_count_as_those_that_are(
    name: str, sharding: Sharding, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load(name)
    work = Work(batch=1, seq=4096, hidden=spec.hidden, element=2.0, tp=2, ep=2 if "mixtral" in name else 1)
    chunk = Chunk(layers_of(spec.pattern, range(16), None), first=True, last=True)
    few = chunk_memory(Model(spec), chunk, work, sharding, False, split)
    monkeypatch.setattr(chunks, "WALKED", 1000)
    every = chunk_memory(Model(spec), chunk, work, sharding, False, split)
    assert vars(few) == pytest.approx(vars(every), rel=1e-9)


SHAPES: list[dict[str, Any]] = [
    {"schedule": Schedule.ONE_F_ONE_B},
    {"schedule": Schedule.GPIPE},
    {"schedule": Schedule.INTERLEAVED, "vpp": 2},
    {"schedule": Schedule.ZB_H1},
    {"schedule": Schedule.ZBV, "vpp": 2},
    {"schedule": Schedule.DUALPIPEV, "vpp": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s["schedule"])
def test_microbatches_that_repeat_change_nothing(shape: dict[str, Any]) -> None:
    config = HybridParallelConfig(pp=4, global_batch=43, precision=Precision.BF16, **shape)
    model = Model(LLAMA)
    for stage in range(4):
        every = fullest(stage_program(model, config, 4096, stage), config, stage, config.num_microbatches)
        assert stage_memory(model, config, 4096, stage) == pytest.approx(every, rel=1e-12)


def test_gpipe_holds_every_microbatch_and_1f1b_as_many_as_stages_follow() -> None:
    def most(schedule: Schedule, stage: int) -> int:
        return max(m.held[0] for m in moments(schedule, 4, 8, 1, stage))

    assert [most(Schedule.GPIPE, s) for s in range(4)] == [8, 8, 8, 8]
    assert [most(Schedule.ONE_F_ONE_B, s) for s in range(4)] == [4, 3, 2, 1]


def test_families_without_a_written_program_are_known() -> None:
    assert written_down(LLAMA)
    assert not written_down(load("gpt-neox-20b"))

"""The executor runs any valid schedule, not only those with a name: random orders give the same gradients."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from meshwright.layout.config import HybridParallelConfig
from meshwright.runtime.engine import Engine
from meshwright.runtime.parity import ParityJob, compare
from meshwright.runtime.pipeline import PipelineExecutor
from meshwright.schedules.actions import Action, ActionKind, PipelineSchedule
from meshwright.schedules.builders import build
from meshwright.schedules.check import check
from meshwright.schedules.communication import with_communication

from .layouts import SEQ, layout
from .tiny import tiny


def random_schedule(config: HybridParallelConfig, seed: int) -> PipelineSchedule:
    """Every stage's actions in an order drawn at random from those that their dependencies allow; of each microbatch
    on each stage the backward pass is whole or in two parts, also at random."""
    draw = random.Random(seed)
    named = build(config.schedule, config.pp, config.num_microbatches)
    left: list[tuple[Action, set[Action]]] = []
    for stage in range(config.pp):
        for mb in range(config.num_microbatches):
            split = draw.random() < 0.5
            forward = Action(ActionKind.FORWARD, stage, mb)
            backward = Action(ActionKind.BACKWARD_INPUT if split else ActionKind.BACKWARD, stage, mb)
            left.append((forward, {Action(ActionKind.FORWARD, stage - 1, mb)} if stage else set()))
            left.append((backward, {forward}))
            if split:
                left.append((Action(ActionKind.BACKWARD_WEIGHT, stage, mb), {backward}))
    gradients = (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)
    producers = {(a.chunk, a.microbatch): a for a, _ in left if a.kind in gradients}
    for action, needs in left:
        if action.kind in gradients and action.chunk + 1 < config.pp:
            needs.add(producers[action.chunk + 1, action.microbatch])
    orders: list[list[Action]] = [[] for _ in range(config.pp)]
    done: set[Action] = set()
    while left:
        chosen = draw.choice([item for item in left if item[1] <= done])
        left.remove(chosen)
        done.add(chosen[0])
        orders[chosen[0].chunk].append(chosen[0])
    return with_communication(replace(named, actions=tuple(tuple(order) for order in orders)))


class UseSchedule:
    """Gives an engine an executor of another schedule."""

    def __init__(self, schedule: PipelineSchedule) -> None:
        self.schedule = schedule

    def __call__(self, engine: Engine) -> None:
        old = engine.executor
        engine.executor = PipelineExecutor(
            self.schedule, engine.chunks, old.pp, old.activation, engine.data_parallel, engine.options.forward_context
        )


@pytest.mark.parametrize(("seed", "config"), [(0, layout(pp=3, global_batch=4)), (1, layout(pp=2, dp=2, zero=3))])
def test_a_random_valid_order_gives_the_gradients_of_the_plain_model(seed: int, config: HybridParallelConfig):
    schedule = random_schedule(config, seed)
    assert check(schedule).problems == ()
    report = compare(ParityJob(config, tiny("gpt2"), SEQ, prepare=UseSchedule(schedule)))
    assert report.passed, report

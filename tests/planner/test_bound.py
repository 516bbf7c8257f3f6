"""The lower bound that lets a search leave configurations out: it must never exceed a step."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planner.toys import cluster, dense, moe

from meshwright.cost.evaluate import evaluate
from meshwright.cost.stack import default_stack, stacks
from meshwright.cost.workload import Workload
from meshwright.models import load
from meshwright.planner.bound import step_lower_bounds
from meshwright.planner.enumerate import space

MODELS = {"dense": dense(layers=6), "moe": moe(layers=5), "mla": load("deepseek-v2-lite"), "tied": load("gpt2")}


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    gpus=st.sampled_from([4, 8, 16, 64]),
    batch=st.sampled_from([4, 16, 24]),
    seq=st.sampled_from([1024, 8192]),
    framework=st.sampled_from(sorted(stacks())),
)
def test_no_configuration_is_faster_than_the_bound_of_its_frame(
    name: str, gpus: int, batch: int, seq: int, framework: str
) -> None:
    model, machine, stack = MODELS[name], cluster(gpus), stacks()[framework]
    found = space(model, machine, seq, gpus, batch).by_schedule()
    bounds = step_lower_bounds(model, machine, Workload(seq=seq), found, stack)
    picked = np.random.default_rng(0).permutation(len(bounds))[:200]
    some = found.take(picked)
    per_row = np.repeat(bounds[picked], some.counts)
    steps = np.concatenate(
        [evaluate(model, machine, Workload(seq=seq), chunk, stack=stack).step_s for _, chunk in some.chunks()]
    )
    assert len(steps) == len(per_row)
    worst = int(np.argmin(steps / per_row))
    assert steps[worst] >= per_row[worst], next(some.chunks(10**9))[1].config(worst)


def test_the_bound_is_not_idle() -> None:
    model, machine = load("llama-3.1-70b"), cluster(64)
    found = space(model, machine, 4096, 64, 128).by_schedule()
    work = Workload(seq=4096)
    bounds = step_lower_bounds(model, machine, work, found, default_stack())
    best = min(
        float(evaluate(model, machine, Workload(seq=4096), chunk, prune=True).step_s.min())
        for _, chunk in found.chunks()
    )
    assert bounds.min() > 0.5 * best, "the bound says next to nothing"
    assert (bounds > best).any(), "the bound rules nothing out"

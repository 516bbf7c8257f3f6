"""Peak memory from parts priced once equals the memory of every row priced alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.cost.candidates import Candidates, Chunk, unit_keys
from meshwright.cost.memory import training_memory
from meshwright.cost.memory_peak import peak_memory
from meshwright.cost.stack import stacks
from meshwright.cost.stages import stages
from meshwright.cost.workload import Workload
from meshwright.hardware.load import load as load_cluster
from meshwright.hardware.load import resize
from meshwright.models import load
from meshwright.planner.enumerate import space


def exchanged(chunk: Candidates) -> Candidates:
    """Every second row with context parallelism by all-to-all."""
    return replace(chunk, heads_exchanged=np.arange(len(chunk)) % 2 == 0)


@pytest.mark.parametrize("framework", ["megatron-core", "torchtitan"])
@pytest.mark.parametrize("name", ["gpt2-xl", "llama-3.1-8b", "deepseek-v2-lite"])
def test_parts_add_up_to_the_peak_of_every_row(name: str, framework: str) -> None:
    model, cluster, workload = load(name), resize(load_cluster("h100-sxm"), gpus=16), Workload(seq=8192)
    stack = stacks()[framework]
    found = space(model, cluster, 8192, 16, 24)
    some = found.take(np.random.default_rng(1).permutation(len(found.counts))[:80])
    for chunk in (c for _, found in some.chunks(4000) for c in (found, exchanged(found))):
        peak, stage = peak_memory(model, cluster, workload, Chunk.of(chunk), stack)
        roles = stages(model, chunk)
        alone = training_memory(model, cluster, workload, chunk, roles, unit_keys(chunk), stack)
        assert np.allclose(peak, alone.peak_bytes, rtol=1e-12)
        at_stage = np.where(roles.index == stage[:, None], alone.total, 0.0).max(axis=1)
        assert np.allclose(at_stage, peak, rtol=1e-12), "the stage named is not one of the fullest"

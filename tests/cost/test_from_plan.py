"""Workloads of the cost model from a plan's sections."""

from dataclasses import replace

import pytest

from meshwright import plan
from meshwright.cost.from_plan import serving_workload_of, workload_of
from meshwright.cost.workload import Optimizer, ServingWorkload, Workload
from meshwright.errors import InputError


def test_what_a_section_leaves_out_keeps_the_default():
    assert workload_of(plan.TrainingWorkload(seq=4096)) == Workload(seq=4096)
    serving = plan.ServingWorkload(kind="serving", prompt=10, output=20)
    assert serving_workload_of(serving) == ServingWorkload(prompt=10, output=20)


def test_what_a_section_states_is_taken():
    section = plan.TrainingWorkload(
        seq=8, optimizer="adam-bf16", gradient_bytes=2, flash_attention=False, dropout=True, capacity_factor=1.25
    )
    assert workload_of(section) == Workload(
        seq=8,
        optimizer=Optimizer.ADAM_BF16,
        gradient_bytes=2,
        flash_attention=False,
        dropout=True,
        capacity_factor=1.25,
    )
    stated = plan.ServingWorkload(kind="serving", prompt=1, output=2, kv_bytes_per_element=1.0, ttft_s=0.5, tpot_s=0.02)
    expected = ServingWorkload(prompt=1, output=2, kv_bytes_per_element=1.0, ttft_s=0.5, tpot_s=0.02)
    assert serving_workload_of(stated) == expected
    assert serving_workload_of(stated) != replace(expected, tpot_s=None)


def test_an_unknown_optimizer_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"unknown optimizer 'adam-bf15' .did you mean adam-bf16"):
        workload_of(plan.TrainingWorkload(seq=8, optimizer="adam-bf15"))

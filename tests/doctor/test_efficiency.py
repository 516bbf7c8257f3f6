"""Faults planted in made-up runs are ranked first; the parts of a step sum to it."""

from __future__ import annotations

import pytest

from meshwright.doctor.efficiency import diagnose_efficiency
from meshwright.doctor.step_times import breakdown, step_times
from meshwright.errors import InputError

from .runs import entry, plan, run


def transfer(axis: str, rank: int) -> float:
    return 0.0005


def test_a_straggler_is_ranked_first_and_named():
    made = run(plan(dp=2, tp=2, global_batch=8), lambda r: 0.16 if r == 3 else 0.1, transfer)
    report = diagnose_efficiency(made)
    assert report.faults[0].kind == "straggler"
    assert "rank 3" in report.faults[0].words
    assert report.changes[0].saved_s == pytest.approx(0.06, rel=0.15)


def test_an_unbalanced_stage_is_ranked_first_and_its_layers_dealt_anew():
    document = plan(pp=2, dp=2, micro_batch=1, global_batch=32, layer_split=[6, 2])
    made = run(document, lambda r: 0.30 if r % 2 == 0 else 0.1, transfer)
    report = diagnose_efficiency(made)
    assert report.faults[0].kind == "imbalance"
    assert report.changes[0].fault == "imbalance"
    assert report.changes[0].config is not None
    assert report.changes[0].config.layer_split == (4, 4)


def test_too_few_microbatches_are_ranked_first_and_more_are_proposed():
    document = plan(pp=4, micro_batch=8, global_batch=16)
    made = run(document, lambda r: 0.1, transfer, bubble=0.15)
    report = diagnose_efficiency(made)
    assert report.faults[0].kind == "bubble"
    bubble = next(c for c in report.changes if c.fault == "bubble")
    assert bubble.config is not None
    assert bubble.config.num_microbatches > 2 or bubble.config.schedule != document.parallel.schedule


def test_a_slow_link_is_ranked_first_and_its_hosts_are_named():
    document = plan(dp=2, tp=2, global_batch=8)
    made = run(
        document,
        lambda r: 0.1,
        lambda axis, r: 0.2 if axis == "dp" else 0.0005,
        hosts=lambda r: "ab"[r // 2],
        traffic={0: (entry("dp", 2, 1, 4_000_000), entry("tp", 2, 8, 100_000))},
    )
    report = diagnose_efficiency(made)
    assert report.faults[0].kind == "slow link"
    assert report.faults[0].words.startswith("dp ")
    assert "a, b" in report.faults[0].words


def test_a_run_without_fault_names_none():
    made = run(plan(dp=4, global_batch=8), lambda r: 0.1, lambda axis, r: 0.0001, noise=0.005)
    assert diagnose_efficiency(made).faults == ()


@pytest.mark.parametrize("sizes", [{"dp": 4}, {"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}, {"pp": 2, "tp": 2, "dp": 2}])
def test_the_waterfall_sums_to_the_step(sizes: dict[str, int]):
    made = run(plan(**sizes, global_batch=16), lambda r: 0.1 + 0.01 * r, transfer, noise=0.0)
    report = diagnose_efficiency(made)
    times = step_times(made, made.plan.parallel if made.plan else plan().parallel)
    assert sum(value for _, value in report.waterfall) == pytest.approx(float(times.step_s.mean()), rel=1e-6)
    assert breakdown(times).step_s == pytest.approx(report.parts.step_s)
    assert 0 < report.mfu < 1


def test_too_few_steps_are_refused_in_one_line():
    with pytest.raises(InputError, match="needs 5"):
        diagnose_efficiency(run(plan(dp=2), lambda r: 0.1, transfer, steps=4))

"""Faults planted in made-up runs are ranked first; the parts of a step sum to it."""

from __future__ import annotations

import pytest

from meshwright.doctor.efficiency import diagnose_efficiency
from meshwright.doctor.run_records import RouterStep
from meshwright.doctor.step_times import breakdown, step_times
from meshwright.errors import InputError

from .runs import EXPERTS, entry, plan, run


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


SKEWED = (900, 300, 100, 100, 150, 150, 150, 150)
"""Tokens of eight experts; in order on four ranks the first has 1,200 of 2,000."""


def routed(rows: tuple[int, ...], tokens: tuple[int, ...] = SKEWED) -> tuple[RouterStep, ...]:
    layers = {layer: max(tokens) * len(tokens) / sum(tokens) for layer in range(8)}
    return tuple(RouterStep(step, tokens, rows, layers, 0) for step in range(1, 31))


def test_a_skewed_router_is_ranked_first_and_its_fullest_rank_is_no_straggler():
    made = run(
        plan(EXPERTS, dp=4, ep=4, micro_batch=2, global_batch=8),
        lambda r: 0.19 if r == 0 else 0.1,
        transfer,
        router=routed((1200, 200, 300, 300)),
    )
    report = diagnose_efficiency(made)
    assert report.stragglers == ()
    assert report.faults[0].kind == "experts"
    assert "rank 0 works on 2.40 times the rows of the mean of its ep group (0, 1, 2, 3)" in report.faults[0].words
    assert "expert 0 gets 45% of the tokens" in report.faults[0].words
    assert report.faults[0].loss_s == pytest.approx(0.19 - (0.19 + 3 * 0.1) / 4, rel=0.1)
    change = next(c for c in report.changes if c.fault == "experts")
    assert change.config is not None
    assert change.config.ep < 4
    assert 0 < change.saved_s <= report.faults[0].loss_s


def test_a_rank_that_is_slower_than_its_rows_explain_stays_a_straggler():
    made = run(
        plan(EXPERTS, dp=4, ep=4, micro_batch=2, global_batch=8),
        lambda r: 0.2 if r == 2 else 0.1,
        transfer,
        router=routed((550, 450, 560, 440)),
    )
    report = diagnose_efficiency(made)
    assert [s.ranks for s in report.stragglers] == [(2,)]
    assert report.faults[0].kind == "straggler"


def test_an_even_router_is_no_fault():
    even = (250,) * 8
    made = run(
        plan(EXPERTS, dp=4, ep=4, micro_batch=2, global_batch=8),
        lambda r: 0.1,
        transfer,
        router=routed((500,) * 4, even),
    )
    report = diagnose_efficiency(made)
    assert "experts" not in {fault.kind for fault in report.faults}
    assert report.experts is not None
    assert report.experts.imbalance == pytest.approx(1.0)

"""Serving plans: within targets, limited by heads and the fast domain, better than the rule of thumb."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.planner.toys import cluster

from meshwright.cost.serving import serve_estimate
from meshwright.cost.workload import ServingWorkload
from meshwright.errors import InputError
from meshwright.models import load
from meshwright.planner.constraints import Constraints
from meshwright.planner.legality import legal
from meshwright.planner.objectives import Objective
from meshwright.planner.serving import holding_gpus, serving_candidates, serving_search

CHAT = ServingWorkload(prompt=1024, output=256)


def test_candidates_use_all_gpus_and_keep_tp_within_the_fast_domain() -> None:
    model = load("llama-3.1-70b")
    found = serving_candidates(model, cluster(32), Constraints())
    assert (found.world == 32).all()
    assert (found.tp <= 8).all()
    assert {1, 2, 4, 8} == set(found.tp.tolist())
    assert legal(model, cluster(32), 2, found).all()


def test_experts_are_spread_over_replicas_or_cut_by_tp() -> None:
    found = serving_candidates(load("qwen3-30b-a3b"), cluster(8), Constraints())
    assert {1, 8} <= set(found.ep.tolist())
    assert (found.expert_tp[found.ep == 1] == found.tp[found.ep == 1]).all()
    assert (found.expert_tp[found.ep > 1] == 1).all()


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b"])
def test_the_best_plan_is_the_best_of_estimating_each_alone(name: str, objective: Objective) -> None:
    model, machine = load(name), cluster(8)
    found = serving_search(model, machine, CHAT, objective, top=50)
    rows = serving_candidates(model, machine, Constraints())
    batch = 1 if objective is Objective.LATENCY else None
    alone = [serve_estimate(model, machine, CHAT, rows.config(i), batch) for i in range(len(rows))]
    fitting = [e for e in alone if e.meets_targets]
    assert len(found.best) == len(fitting)
    if objective is Objective.LATENCY:
        assert found.best[0].tpot_s == pytest.approx(min(e.tpot_s for e in fitting))
    elif objective is Objective.MEMORY:
        assert holding_gpus(found.best[0].config) == min(holding_gpus(e.config) for e in fitting)
    else:
        assert found.best[0].tokens_per_s_per_gpu == pytest.approx(max(e.tokens_per_s_per_gpu for e in fitting))
    assert found.rule_of_thumb is not None
    assert found.gain is not None
    assert found.gain >= 1 - 1e-9
    assert len(found.reasons) == len(found.best)


def test_targets_hold_in_every_plan() -> None:
    strict = replace(CHAT, ttft_s=0.2, tpot_s=0.02)
    found = serving_search(load("llama-3.1-8b"), cluster(8), strict)
    assert found.best
    for plan in found.best:
        assert plan.ttft_s <= 0.2
        assert plan.tpot_s <= 0.02
    free = serving_search(load("llama-3.1-8b"), cluster(8), CHAT)
    assert free.best[0].tokens_per_s_per_gpu >= found.best[0].tokens_per_s_per_gpu


def test_the_front_trades_speed_of_a_user_against_speed_per_gpu() -> None:
    front = serving_search(load("llama-3.1-70b"), cluster(8), CHAT).pareto
    assert len(front) > 3
    users = [p.tokens_per_s_per_user for p in front]
    gpus = [p.tokens_per_s_per_gpu for p in front]
    assert users == sorted(users, reverse=True)
    assert gpus == sorted(gpus)


def test_a_lone_request_is_answered_faster_by_more_tensor_parallelism() -> None:
    found = serving_search(load("llama-3.1-70b"), cluster(8), CHAT, Objective.LATENCY)
    assert found.best[0].config.tp == 8


def test_what_does_not_fit_says_by_how_much_and_how_many_gpus_hold_it() -> None:
    found = serving_search(load("llama-3.1-405b"), cluster(8), CHAT)
    assert found.best == ()
    assert found.shortfall is not None
    assert found.shortfall.fewest_gpus == 16
    assert "too much" in found.shortfall.sentence
    enough = serving_search(load("llama-3.1-405b"), cluster(16), CHAT)
    assert enough.best


def test_targets_that_nothing_keeps_name_the_nearest() -> None:
    found = serving_search(load("llama-3.1-8b"), cluster(1), replace(CHAT, tpot_s=1e-5))
    assert found.best == ()
    assert found.shortfall is not None
    assert "targets" in found.shortfall.sentence


def test_fixed_axes_hold() -> None:
    found = serving_search(load("llama-3.1-8b"), cluster(8), CHAT, constraints=Constraints(tp=(2,), pp=(1,)))
    assert {(e.config.tp, e.config.pp, e.config.dp) for e in found.best} == {(2, 1, 4)}


def test_sizes_that_no_model_can_take_are_one_line() -> None:
    with pytest.raises(InputError) as caught:
        serving_search(load("llama-3.1-8b"), cluster(8), CHAT, constraints=Constraints(tp=(3,)))
    assert "\n" not in str(caught.value)

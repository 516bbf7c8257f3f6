"""Tables show the figures they are given."""

from __future__ import annotations

from rich.console import Console, RenderableType

from meshwright import HybridParallelConfig, Workload, estimate, load_cluster, load_model, search
from meshwright.cost.estimate import Estimate
from meshwright.layout.config import Recompute, Schedule
from meshwright.ledger import Collective, Phase, TrafficEntry
from meshwright.report.estimate_tables import config_line, estimate_report, memory_table, traffic_table
from meshwright.report.ledger_tables import compare_ledgers
from meshwright.report.numbers import gib
from meshwright.report.plan_tables import front_plot, front_table, ranked_table, short_config, spread


def text_of(renderable: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def priced(config: HybridParallelConfig) -> Estimate:
    cluster = load_cluster("h100-sxm", gpus=config.world_size)
    return estimate(load_model("llama-3.1-8b"), cluster, Workload(seq=2048), config)


def test_the_memory_table_has_a_column_per_stage_and_marks_the_fullest() -> None:
    found = priced(HybridParallelConfig(dp=1, tp=2, pp=4, global_batch=16))
    text = text_of(memory_table(found.memory))
    assert f"stage {found.memory.peak.stage} (peak)" in text
    assert gib(found.memory.peak.total_bytes) in text


def test_a_report_names_every_part_of_the_step_that_takes_time() -> None:
    found = priced(HybridParallelConfig(dp=2, tp=2, pp=2, global_batch=16, recompute=Recompute.FULL))
    text = text_of(estimate_report(found, "heading", {"tp": "nvlink4"}))
    for words in ("heading", "Fits", "pipeline bubble", "recomputed forward", "optimizer step", "nvlink4", "MFU"):
        assert words in text


def test_one_device_has_no_traffic_to_show() -> None:
    assert "one device" in text_of(traffic_table(priced(HybridParallelConfig(global_batch=1))))


def test_axes_that_no_plan_uses_have_no_column() -> None:
    plan = priced(HybridParallelConfig(dp=2, tp=4, global_batch=8))
    header = text_of(ranked_table([plan], "t")).splitlines()[1]
    assert "tp" in header.split()
    assert "cp" not in header.split()
    assert "ep" not in header.split()


def test_configurations_in_one_line() -> None:
    config = HybridParallelConfig(dp=4, tp=2, pp=2, vpp=2, schedule=Schedule.INTERLEAVED, zero=1, micro_batch=2,
                                  global_batch=32, recompute=Recompute.FULL, recompute_every=2)  # fmt: skip
    assert short_config(config) == "dp4 pp2 tp2 mb2 ZeRO-1 1f1b-i v2 recompute full 1/2"
    assert config_line(config).startswith("dp 4 x pp 2 x tp 2; micro batch 2, interleaved-1f1b (vpp 2), ZeRO-1")
    assert config_line(HybridParallelConfig()).startswith("one device")


def test_a_long_front_is_thinned_but_keeps_its_ends() -> None:
    found = search(load_model("llama-3.1-8b"), load_cluster("h100-sxm", nodes=2), Workload(seq=4096), 64)
    chosen = spread(found.pareto, 4)
    assert len(chosen) == min(4, len(found.pareto))
    assert (chosen[0], chosen[-1]) == (found.pareto[0], found.pareto[-1])
    assert short_config(found.pareto[0].config) in text_of(front_table(found.pareto))
    assert "●" in front_plot(found.pareto)


def routed(sent: int, calls: int = 4) -> TrafficEntry:
    return TrafficEntry("ep", Collective.ALL_TO_ALL, Phase.FORWARD, "combine", 2, calls, sent)


def test_what_routed_tokens_send_agrees_in_the_mean_of_a_stages_ranks() -> None:
    (line,) = compare_ledgers([(0, [routed(90)], [routed(100)]), (0, [routed(110)], [routed(100)])])
    assert line.agrees
    (more,) = compare_ledgers([(0, [routed(90)], [routed(100)]), (0, [routed(120)], [routed(100)])])
    (calls,) = compare_ledgers([(0, [routed(90)], [routed(100)]), (0, [routed(110, calls=5)], [routed(100)])])
    assert not more.agrees
    assert not calls.agrees

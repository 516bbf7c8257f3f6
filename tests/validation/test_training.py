"""Training rows: how they are read, what stands in for what the source does not say, how they are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.validation.rows import MODEL, MOE, row, write

from meshwright.cost.evaluate import estimate
from meshwright.cost.stack import stack_for
from meshwright.cost.workload import Workload
from meshwright.layout.config import Precision, Recompute, Schedule
from meshwright.models.fields import Fields
from meshwright.validation import validate_file
from meshwright.validation.scored import Group
from meshwright.validation.shapes import Shapes
from meshwright.validation.skip import SkippedError
from meshwright.validation.training_row import TrainingCase, training_case


def case(**changes: Any) -> TrainingCase:
    values = row(**changes)
    return training_case(Fields(values, "rows:1"), Group(values["id"], "tiny", "A", "dense"), Shapes())


def test_a_full_row_is_read_as_it_is_written() -> None:
    read = case()
    (config,) = read.configs
    assert (config.tp, config.pp, config.dp, config.cp, config.ep, config.vpp) == (2, 2, 4, 1, 1, 1)
    assert (config.micro_batch, config.global_batch, config.num_microbatches) == (1, 64, 16)
    assert config.sequence_parallel
    assert config.zero == 1
    assert config.schedule is Schedule.ONE_F_ONE_B
    assert config.precision is Precision.BF16
    assert read.workload == Workload(seq=4096)
    assert read.stack == stack_for("Megatron-Core")
    assert read.cluster.gpus == 16
    assert read.cluster.intra.bandwidth == 450e9
    assert read.cluster.inter.bandwidth == 50e9
    assert read.measured.tokens_per_s_per_gpu == 20000.0
    assert read.assumed == ()


def test_a_prediction_is_the_estimate_of_the_same_configuration(tmp_path: Path) -> None:
    read = case()
    expected = estimate(read.model, read.cluster, read.workload, read.configs[0], read.stack)
    (scored,) = validate_file(write(tmp_path / "r.jsonl", row())).scored
    assert scored.rate is not None
    assert scored.rate.predicted == pytest.approx(expected.throughput.tokens_per_s_per_gpu, rel=1e-12)
    assert scored.rate.relative_error == pytest.approx(expected.throughput.tokens_per_s_per_gpu / 20000.0 - 1)


def test_rows_scored_together_score_as_they_do_alone(tmp_path: Path) -> None:
    rows = [
        row(id="a"),
        row(id="b", tp=4, dp=2),
        row(id="c", seq=8192),
        row(id="d", model=MOE, ep=4),
        row(id="e", recompute=None),
        row(id="f", precision="fp8"),
    ]
    together = validate_file(write(tmp_path / "all.jsonl", *rows)).scored
    assert [s.group.id for s in together] == list("abcdef")
    for one, alone in zip(rows, together, strict=True):
        (scored,) = validate_file(write(tmp_path / "one.jsonl", one)).scored
        assert scored.predicted_rate == pytest.approx(alone.predicted_rate, rel=1e-12)
        assert scored.predicted_gib == pytest.approx(alone.predicted_gib, rel=1e-12)
        assert (scored.ran, scored.fits, scored.assumed) == (alone.ran, alone.fits, alone.assumed)


@pytest.mark.parametrize(
    ("numbers", "derived", "expected"),
    [
        ({"tokens_per_s_per_gpu": 100.0, "iter_time_s": 1.0}, {"tokens_per_s_per_gpu": 7.0}, 100.0),
        ({"iter_time_s": 1.0}, {"tokens_per_s_per_gpu": 7.0}, 7.0),
        ({}, {"tokens_per_s_per_gpu_from_tflops": 9.0}, 9.0),
        ({"iter_time_s": 2.0}, {}, 64 * 4096 / 2.0 / 16),
        ({"tflops_per_gpu": 400}, {}, None),
    ],
)
def test_the_published_rate_counts_first_then_what_is_derived_from_it(
    numbers: dict[str, float], derived: dict[str, float], expected: float | None
) -> None:
    assert case(measured=numbers, derived=derived).measured.tokens_per_s_per_gpu == expected


def test_unknown_knobs_take_their_defaults_and_are_noted() -> None:
    read = case(vpp=None, sp=None, micro_batch=None, recompute=None, schedule=None, zero=None)
    assert [c.recompute for c in read.configs] == [Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL]
    config = read.configs[0]
    assert (config.vpp, config.sequence_parallel, config.micro_batch, config.zero) == (1, True, 1, 0)
    assert {a.split(":")[0] for a in read.assumed} == {"vpp", "sequence parallel", "micro batch", "recompute", "zero"}


def test_several_chunks_mean_the_interleaved_schedule() -> None:
    assert case(vpp=4, schedule=None).configs[0].schedule is Schedule.INTERLEAVED
    assert case(vpp=4, pp=1, dp=8, schedule=None).configs[0].vpp == 1


def test_fsdp_is_zero_3_and_hsdp_shards_within_the_group_of_its_note() -> None:
    full = case(zero="fsdp", pp=1, dp=8).configs[0]
    assert (full.zero, full.zero_shards) == (3, None)
    stated = case(zero="hsdp", tp=1, pp=1, dp=16, notes="FSDP shard group 4, replicas 4.")
    assert (stated.configs[0].zero, stated.configs[0].zero_shards) == (3, 4)
    unstated = case(zero="hsdp", tp=1, pp=1, dp=16)
    assert unstated.configs[0].zero_shards == 8  # a node
    assert any("hsdp" in a for a in unstated.assumed)


def test_fsdp_under_a_pipeline_keeps_its_weights_gathered() -> None:
    kept = case(zero="fsdp", pp=2)
    assert kept.configs[0].zero == 1
    assert any("fsdp under a pipeline" in a for a in kept.assumed)
    stated = case(zero="fsdp", pp=2, notes="FSDP shards optimizer+gradients (params not resharded after fwd).")
    assert stated.configs[0].zero == 2
    assert case(zero="fsdp", pp=1, dp=8).configs[0].zero == 3


def test_a_stated_group_of_zero_shards_is_taken() -> None:
    assert case(zero=1, tp=1, pp=1, dp=16, notes="zero1 group=8, tp=1").configs[0].zero_shards == 8
    assert case(zero=1, tp=1, pp=1, dp=16, notes="zero1 group=-1 (-1=all DP ranks)").configs[0].zero_shards is None


def test_an_unknown_micro_batch_is_the_replicas_batch_without_a_pipeline() -> None:
    assert case(micro_batch=None, pp=1, dp=8, global_batch=16).configs[0].micro_batch == 2
    assert case(micro_batch=None, pp=1, dp=8, global_batch=512).configs[0].micro_batch == 4
    assert case(micro_batch=None, pp=2).configs[0].micro_batch == 1


def test_a_batch_of_part_microbatches_is_rounded_to_whole_ones_and_noted() -> None:
    less = case(global_batch=2)  # dp 4, micro batch 1: half a microbatch
    assert less.configs[0].global_batch == 4
    assert any("global batch" in a for a in less.assumed)
    assert case(global_batch=65).configs[0].global_batch == 64


def test_experts_that_do_not_divide_a_stage_are_cut_to_what_does() -> None:
    assert case(model=MOE, ep=8).configs[0].ep == 8
    cut = case(model=MOE, ep=16)
    assert cut.configs[0].ep == 8
    assert any(a.startswith("ep: 8 for 16") for a in cut.assumed)


@pytest.mark.parametrize(
    ("detail", "expected"),
    [
        ("core attention", (Recompute.SELECTIVE, 1)),
        ("op-level SAC", (Recompute.FULL, 2)),
        ("every 2nd layer full", (Recompute.FULL, 2)),
    ],
)
def test_partial_recompute_is_read_as_the_nearest_mode(detail: str, expected: tuple[Recompute, int]) -> None:
    (config,) = case(recompute="selective", recompute_detail=detail).configs
    assert (config.recompute, config.recompute_every) == expected


def test_some_layers_of_many_recomputed_is_one_of_every_few() -> None:
    (config,) = case(recompute=None, recompute_detail="FP8 recomputes 5 of 32 layers (block, full)").configs
    assert (config.recompute, config.recompute_every) == (Recompute.FULL, 6)


def test_early_megatron_stored_its_attention_scores_and_later_software_does_not() -> None:
    early = case(framework="Megatron-LM", gpu="A100-80GB-SXM", precision="fp16", attention_impl=None)
    assert not early.workload.flash_attention
    assert case(framework="Megatron-LM", gpu="A100-80GB-SXM", attention_impl=None).workload.flash_attention
    assert case(framework="Megatron-Core", attention_impl=None).workload.flash_attention
    assert not case(attention_impl="torch").workload.flash_attention


@pytest.mark.parametrize(
    ("words", "kernel"),
    [
        ("flash_attentionv1.0.8", "flash1"),
        ("flash-attention (triton/flash v1-2)", "flash1"),
        ("flash_attention2 + RMS kernel", "flash2"),
        ("SDPA flash-2", "flash2"),
        ("cuDNN/TE fused attention", "cudnn"),
        ("flash-attention", None),
    ],
)
def test_the_attention_kernel_is_the_one_the_row_names(words: str, kernel: str | None) -> None:
    workload = case(attention_impl=words).workload
    assert workload.flash_attention
    assert workload.attention == kernel


def test_a_framework_that_balances_stages_by_cost_leaves_the_last_one_fewer_layers() -> None:
    heavy_head = MODEL | {"vocab": 131_072, "kv_heads": 16}  # the head weighs as much as four layers
    (config,) = case(framework="nanotron", model=heavy_head, pp=4, dp=2).configs
    assert config.layer_split == (5, 5, 5, 1)
    assert case(model=heavy_head, pp=4, dp=2).configs[0].layer_split is None


def test_an_inferred_device_memory_does_not_judge_a_fit(tmp_path: Path) -> None:
    rows = [row(id="a"), row(id="b", bw_source="defaults; GPU memory size inferred")]
    known, inferred = validate_file(write(tmp_path / "r.jsonl", *rows)).scored
    assert known.fits is True
    assert inferred.fits is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "abacus"}, "gpu abacus is not in the catalogue"),
        ({"gpu": None}, "gpu is not stated"),
        ({"dp": None}, "dp is not stated"),
        ({"dp": 3}, "tp x pp x dp x cp = 12 is not the 16 GPUs stated"),
        ({"seq": None}, "seq is not stated"),
        ({"precision": "fp5"}, "precision fp5 is not known"),
        ({"model": None}, "model shape is not stated"),
        ({"model": MODEL | {"hidden": None}}, "model hidden is not stated"),
    ],
)
def test_a_row_that_says_too_little_is_skipped_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(SkippedError, match=reason):
        case(**changes)


def test_memory_is_compared_as_the_row_counts_it(tmp_path: Path) -> None:
    rows = [
        row(id="fullest"),
        row(id="first", mem_kind="torch max_memory_allocated on rank 0"),
        row(id="unclear", mem_kind="torch max memory on rank 0, printed GB"),
        row(id="last", mem_kind="torch max_memory_allocated on the LAST rank"),
        row(id="reserved", mem_kind="torch max_memory_reserved, max over ranks"),
        row(id="device", mem_kind="nvidia-smi max"),
    ]
    gib = {s.group.id: s.predicted_gib for s in validate_file(write(tmp_path / "r.jsonl", *rows)).scored}
    assert max(gib["first"], gib["last"]) == pytest.approx(gib["fullest"])
    assert gib["first"] != gib["last"]
    reserved = case().cluster.reserved_bytes / 2**30
    assert gib["reserved"] >= gib["fullest"]
    assert gib["first"] < gib["unclear"] <= gib["reserved"]
    assert gib["device"] == pytest.approx(gib["reserved"] + reserved)


def test_out_of_memory_rows_are_counted_against_the_predicted_fit(tmp_path: Path) -> None:
    large = MODEL | {"layers": 80, "hidden": 8192, "heads": 64, "ffn": 28672}
    rows = [
        row(id="ran and fits"),
        row(id="did not run though it fits", outcome="oom"),
        row(id="ran though too large", model=large),
        row(id="too large", model=large, outcome="oom"),
        row(id="recompute unknown", recompute=None),
    ]
    fit = validate_file(write(tmp_path / "r.jsonl", *rows)).metrics.fit
    assert (fit.true_fits, fit.false_fits, fit.false_oom, fit.true_oom) == (1, 1, 1, 1)
    assert (fit.n, fit.accuracy, fit.false_fit_rate) == (4, 0.5, 0.5)


def test_the_names_and_the_source_of_a_row_do_not_enter_its_prediction(tmp_path: Path) -> None:
    named = row(id="x", family="other", source="somewhere", tier="C", config_group="g", leak_group="h")
    named["model"] = MODEL | {"name": "Another"}
    first, second = validate_file(write(tmp_path / "r.jsonl", row(), named)).scored
    assert (first.predicted_rate, first.predicted_gib) == (second.predicted_rate, second.predicted_gib)


def test_the_json_document_holds_what_the_report_counts(tmp_path: Path) -> None:
    rows = [row(id="a"), row(id="b", family="big", tier="B"), row(id="c", gpu="abacus"), row(id="d", measured={})]
    document = json.loads(json.dumps(validate_file(write(tmp_path / "r.jsonl", *rows)).to_json_dict(), allow_nan=False))
    assert (document["rows"], document["scored"]) == (4, 3)
    assert document["skipped"] == [{"id": "c", "reason": "gpu abacus is not in the catalogue"}]
    assert set(document["groups"]) == {"big", "tiny"}
    assert set(document["tier_architectures"]) == {"A dense", "B dense"}
    for metrics in (document["metrics"], *document["groups"].values()):
        assert set(metrics) == {"tokens_per_s_per_gpu", "peak_mem_gib", "oom"}
        assert set(metrics["tokens_per_s_per_gpu"]) == {"n", "median_ape", "mape", "p90_ape", "bias"}
    assert document["metrics"]["tokens_per_s_per_gpu"]["n"] == 2
    assert document["metrics"]["oom"]["true_fits"] == 3
    first = document["per_row"][0]
    assert first["id"] == "a"
    assert first["ape"] == pytest.approx(abs(first["predicted"] / first["measured"] - 1))
    assert document["per_row"][2]["measured"] is None

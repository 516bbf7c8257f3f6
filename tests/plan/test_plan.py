"""The plan document: round trips, digest, words for every slip, hostile files."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.layout import HybridParallelConfig
from meshwright.plan import (
    ClusterSection,
    EstimateSummary,
    ModelSection,
    Plan,
    ServingWorkload,
    TrainingRun,
    TrainingWorkload,
)

BASE = "model: gpt2\nworkload: {seq: 1024}\nparallel: {tp: 2}\n"

text = st.text(min_size=1, max_size=20)
count = st.integers(1, 2**40)
positive = st.floats(1e-12, 1e12)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def parallels(draw: st.DrawFn) -> HybridParallelConfig:
    pp = draw(st.integers(1, 4))
    schedule, vpp = draw(st.sampled_from([("1f1b", 1), ("gpipe", 1), ("zbv", 2), ("interleaved-1f1b", 3)]))
    if schedule == "interleaved-1f1b" and pp == 1:
        schedule, vpp = "zb-h1", 1
    dp, micro = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    return HybridParallelConfig(
        dp=dp,
        tp=draw(st.integers(1, 8)),
        pp=pp,
        vpp=vpp,
        schedule=schedule,
        micro_batch=micro,
        global_batch=dp * micro * draw(st.integers(1, 8)),
        sequence_parallel=draw(st.booleans()),
        cp_variant=draw(st.sampled_from(["ring", "all_to_all"])),
        zero=draw(st.integers(0, 3)),
        zero_shards=draw(st.sampled_from([None, 1, dp])),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        precision=draw(st.sampled_from(["bf16", "fp8", "nvfp4"])),
        layer_split=draw(st.none() | st.just(tuple(range(pp * vpp)))),
    )


def optional(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


trainings = st.builds(
    TrainingWorkload,
    seq=count,
    optimizer=optional(st.sampled_from(["adam-mixed", "adam-bf16"])),
    gradient_bytes=st.sampled_from([None, 2, 4]),
    flash_attention=optional(st.booleans()),
    capacity_factor=optional(positive),
    stack=optional(text),
)
servings = st.builds(
    ServingWorkload,
    kind=st.just("serving"),
    prompt=count,
    output=count,
    ttft_s=optional(positive),
    batch=optional(count),
)
configs = st.dictionaries(st.text(max_size=8), json_like, max_size=4)
plans = st.builds(
    Plan,
    model=st.builds(ModelSection, name=text, config=optional(configs)),
    cluster=optional(
        st.builds(ClusterSection, name=text, nodes=optional(count), oversubscription=optional(st.just(2.0)))
    ),
    workload=trainings | servings,
    parallel=parallels(),
    training=optional(st.builds(TrainingRun, steps=count, learning_rate=positive, gradient_clip=st.just(0.0))),
)


@given(plans)
def test_reading_what_was_written_gives_an_equal_plan(plan: Plan):
    again = Plan.from_yaml(plan.to_yaml())
    assert again == plan
    assert again.to_yaml() == plan.to_yaml()
    assert again.digest() == plan.digest()


def whole_plan() -> Plan:
    return Plan.from_parts(
        "llama-3.1-8b",
        HybridParallelConfig(dp=8, tp=8, zero=1, sequence_parallel=True, global_batch=512),
        TrainingWorkload(seq=8192),
        "h100-sxm",
        training=TrainingRun(learning_rate=1e-5),
        objective="throughput",
        estimate=EstimateSummary(step_s=12.5, peak_bytes=60 * 2**30, mfu=0.4),
    )


def test_a_plan_reads_as_a_person_would_write_it():
    lines = whole_plan().to_yaml().splitlines()
    assert lines[:3] == ["version: 1", "model:", "  name: llama-3.1-8b"]
    assert "  dp: 8" in lines
    assert "  zero: 1" in lines
    assert not any(line.startswith(("  vpp", "  ep", "  layer_split")) for line in lines), "defaults are left out"


def test_bare_names_stand_for_sections_and_a_workload_is_training_unless_it_says():
    plan = Plan.from_yaml(BASE + "cluster: cpu\n")
    assert plan.model == ModelSection(name="gpt2")
    assert plan.cluster == ClusterSection(name="cpu")
    assert plan.workload == TrainingWorkload(seq=1024)
    assert plan.parallel == HybridParallelConfig(tp=2)


def test_numbers_may_be_written_as_people_write_them():
    plan = Plan.from_yaml(BASE + "training: {learning_rate: 1e-4, weight_decay: 0, steps: 1_000}\n")
    assert plan.training == TrainingRun(learning_rate=1e-4, weight_decay=0.0, steps=1000)


def test_digest_follows_what_ranks_must_agree_on_and_nothing_else():
    plan = whole_plan()
    same = plan.model_copy(update={"provenance": None, "cluster": None})
    assert same.digest() == plan.digest()
    assert len(plan.digest()) == 64
    for change in (
        {"parallel": replace(plan.parallel, zero=2)},
        {"workload": TrainingWorkload(seq=4096)},
        {"training": TrainingRun(seed=1)},
        {"model": ModelSection(name="gpt2")},
    ):
        assert plan.model_copy(update=change).digest() != plan.digest()


def test_an_inline_config_counts_in_the_digest_not_its_name():
    first = Plan.from_yaml(BASE.replace("gpt2", "{name: a, config: {x: 1}}"))
    second = Plan.from_yaml(BASE.replace("gpt2", "{name: b, config: {x: 1}}"))
    third = Plan.from_yaml(BASE.replace("gpt2", "{name: b, config: {x: 2}}"))
    assert first.digest() == second.digest() != third.digest()


def test_model_and_cluster_load_from_their_sections():
    plan = whole_plan()
    assert plan.load_model().num_layers == 32
    assert plan.load_cluster().gpus == 64, "the size of the parallel config where the plan says none"
    sized = plan.model_copy(update={"cluster": ClusterSection(name="h100-sxm", nodes=2, reserved_bytes=0)})
    assert sized.load_cluster().gpus == 16
    assert sized.load_cluster().reserved_bytes == 0
    with pytest.raises(InputError, match="names no cluster"):
        plan.model_copy(update={"cluster": None}).load_cluster()


def test_an_inline_config_is_the_model():
    config = "{model_type: gpt2, n_layer: 3, n_embd: 64, n_head: 4, vocab_size: 100, n_positions: 32}"
    plan = Plan.from_yaml(BASE.replace("gpt2", f"{{name: toy, config: {config}}}", 1))
    model = plan.load_model()
    assert (model.name, model.num_layers, model.hidden) == ("toy", 3, 64)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("model: gpt2", "modle: gpt2", "^p: unknown key 'modle' .did you mean model"),
        ("model: gpt2", "", "^p: model is missing"),
        ("model: gpt2", "model: ''", "^p: model.name: "),
        ("model: gpt2", "model: 3", "^p: model: "),
        ("model: gpt2", "model: [gpt2]", "^p: model: "),
        ("model: gpt2", "model: gpt2\nmodel: gpt3", "^p line 2: the key 'model' stands twice"),
        ("model: gpt2", "version: 2\nmodel: gpt2", "^p: version: "),
        ("model: gpt2", "version: true\nmodel: gpt2", "^p: version: "),
        ("model: gpt2", "model: {name: a, config: {b: 2020-01-01}}", "^p: model.config: only numbers, text"),
        ("model: gpt2", "model: {name: a, config: {b: .inf}}", "^p: model.config: only numbers, text"),
        ("seq: 1024", "sq: 1024", "^p: workload: unknown key 'sq' .did you mean seq"),
        ("seq: 1024", "", "^p: workload.seq is missing"),
        ("seq: 1024", "seq: true", "^p: workload.seq: .* got True"),
        ("seq: 1024", "seq: '1024'", "^p: workload.seq: .* got '1024'"),
        ("seq: 1024", "seq: 1024.0", "^p: workload.seq: "),
        ("seq: 1024", "seq: 0", "^p: workload.seq: "),
        ("seq: 1024", "seq: 99999999999999999", "^p: workload.seq: "),
        ("seq: 1024", "seq: " + "9" * 5000, "^p: a value cannot be read: a number has too many digits"),
        ("seq: 1024", "seq: 1024, capacity_factor: .nan", "^p: workload.capacity_factor: "),
        ("seq: 1024", "kind: serve, seq: 1", "^p: workload: kind must be training or serving"),
        (
            "seq: 1024",
            "kind: serving, prompt: 5, outputs: 5",
            "^p: workload: unknown key 'outputs' .did you mean output",
        ),
        ("tp: 2", "tpp: 2", "^p: parallel: unknown key 'tpp' .did you mean tp"),
        ("tp: 2", "tp: 0", "^p: parallel: tp must be between 1"),
        ("tp: 2", "tp: true", "^p: parallel: tp must be a whole number"),
        ("tp: 2", "tp: two", "^p: parallel: tp must be a whole number"),
        ("tp: 2", "dp: 3, global_batch: 10", "^p: parallel: global batch 10 is not a multiple"),
        ("tp: 2", "schedule: 2f2b", "^p: parallel: unknown schedule '2f2b'"),
        ("tp: 2", "layer_split: 5", "^p: parallel: layer_split must be a list"),
        ("{tp: 2}", "tp2", "^p: parallel: must be a mapping"),
        ("{tp: 2}", "{tp: 2}\ntraining: {stps: 1}", "^p: training: unknown key 'stps' .did you mean steps"),
        (
            "{tp: 2}",
            "{tp: 2}\nprovenance: {meshwright: '1', estimate: {stp: 1}}",
            "^p: provenance.estimate: unknown key",
        ),
        ("{tp: 2}", "{tp: 2}\ncluster: {name: cpu, nodes: 0}", "^p: cluster.nodes: "),
    ],
)
def test_slips_are_named_with_their_place(old: str, new: str, words: str):
    assert old in BASE
    with pytest.raises(InputError, match=words) as error:
        Plan.from_yaml(BASE.replace(old, new), "p")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


BOMB = "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a plan is a mapping"),
        (b"- 1\n- 2", "a plan is a mapping"),
        (b"just text", "a plan is a mapping"),
        (b"\xff\xfe\xff", "not a text file in UTF-8"),
        (b"a\x00b", "not valid YAML"),
        (BOMB.encode(), "anchors and aliases have no place"),
        (b"a: *nowhere", "anchors and aliases have no place"),
        (b"model: !!python/object/apply:os.system [ls]", "has no place in a plan"),
        (b"model: !!binary aGk=", "has no place in a plan"),
        (b"<<: {model: gpt2}", "missing|unknown key"),
        (b"[" * 50_000, "nested too deeply"),
        (b"{a: " * 50_000, "nested too deeply"),
        (b"- " * 50_000, "nested too deeply"),
        (b"? " * 5_000, "nested too deeply|a plan is a mapping|not valid|mapping"),
        (b"model: gpt2\n---\nmodel: gpt2", "but found another document|not valid YAML"),
        (b"{1: 2, [3]: 4}", "unhashable|unknown key|missing|mapping"),
        (b"#" * (2 << 20), "larger than 1 MiB"),
        (b"model: {name: gpt2", "line"),
        (b"model: gpt2\n  bad indent: [", "line"),
        (b"model: 2020-13-45", "cannot be read|missing|model"),
    ],
)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        Plan.read(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: (BASE + t).encode("utf-8", "surrogatepass")))
def test_random_content_never_escapes_as_another_error(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_bytes(content)
    with suppress(InputError):
        Plan.read(path)


@given(st.dictionaries(text, json_like, max_size=4))
def test_random_sections_never_escape_as_another_error(values: dict):
    document = json.dumps({"model": "gpt2", "workload": {"seq": 8}, "parallel": {}, **values, "training": values})
    with suppress(InputError):
        Plan.from_yaml(document)


def test_missing_files_and_folders_are_refused(tmp_path: Path):
    for path in (tmp_path / "none.yaml", tmp_path, "nul\0byte.yaml"):
        with pytest.raises(InputError, match=r"no such file|not a path"):
            Plan.read(path)


def test_writing_replaces_the_file_whole_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "plan.yaml"
    path.write_text("old")
    whole_plan().write(path)
    assert Plan.read(path) == whole_plan()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be written"):
        whole_plan().write(tmp_path / "no folder" / "plan.yaml")
    folder = tmp_path / "plan.yaml"
    folder.mkdir()
    with pytest.raises(InputError, match="is a folder"):
        whole_plan().write(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]

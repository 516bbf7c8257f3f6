"""Plans for other programs: every size arrives under a name that the program has; what cannot be said is refused."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.export import Target, export
from meshwright.layout.config import ContextVariant, HybridParallelConfig, Recompute, Schedule
from meshwright.models import load
from meshwright.plan import Plan, TrainingWorkload
from meshwright.plan.sections import ClusterSection

UPSTREAM = Path(__file__).parent / "upstream"
GOLDEN = Path(__file__).parent / "golden"


def names_in(file: str) -> set[str]:
    return {line for line in (UPSTREAM / file).read_text().splitlines() if not line.startswith("#")}


MEGATRON, TORCHTITAN = names_in("megatron_options.txt"), names_in("torchtitan_fields.txt")


def plan_of(config: HybridParallelConfig, model: str = "llama-3.1-8b", **workload: Any) -> Plan:
    cluster = ClusterSection(name="h100-sxm", gpus=config.world_size)
    return Plan.from_parts(model, config, TrainingWorkload(seq=4096, **workload), cluster)


def megatron_options(plan: Plan) -> dict[str, str]:
    """What the script passes to pretrain_gpt.py, by option."""
    text = export(plan, Target.MEGATRON).text
    arrays = re.findall(r"^([A-Z]+)_ARGS=\(\n(.*?)^\)", text, flags=re.M | re.S)
    lines = [line for name, body in arrays if name != "TORCHRUN" for line in body.splitlines()]
    return {words[0]: " ".join(words[1:]) for words in (shlex.split(line) for line in lines)}


def torchtitan_fields(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parallelism, training) as the module sets them."""
    function = next(n for n in ast.parse(export(plan, Target.TORCHTITAN).text).body if isinstance(n, ast.FunctionDef))
    parallelism: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for node in function.body:
        if isinstance(node, ast.Assign):
            target = ast.unparse(node.targets[0])
            if isinstance(node.value, ast.Call) and target == "config.parallelism":
                parallelism = {str(word.arg): ast.literal_eval(word.value) for word in node.value.keywords}
            elif target.startswith("config.training."):
                training[target.removeprefix("config.training.")] = ast.literal_eval(node.value)
    return parallelism, training


SIZES = st.sampled_from([1, 2, 4, 8])
SPLITS = st.builds(dict, dp=SIZES, tp=SIZES, pp=SIZES, cp=st.sampled_from([1, 2]), micro_batch=st.sampled_from([1, 2]))


@st.composite
def configs(draw: st.DrawFn) -> HybridParallelConfig:
    sizes = draw(SPLITS)
    assume(prod(sizes[axis] for axis in ("dp", "tp", "pp", "cp")) in (1, 2, 4, 8, 16, 32, 64, 128))
    vpp = draw(st.sampled_from([1, 2])) if sizes["pp"] > 1 else 1
    return HybridParallelConfig(
        **sizes, vpp=vpp, schedule=Schedule.INTERLEAVED if vpp > 1 else Schedule.ONE_F_ONE_B,
        zero=draw(st.integers(0, 3)),
        global_batch=sizes["dp"] * sizes["micro_batch"] * 8, sequence_parallel=draw(st.booleans()),
        recompute=draw(st.sampled_from(list(Recompute))), cp_variant=draw(st.sampled_from(list(ContextVariant))),
    )  # fmt: skip


@settings(max_examples=20)
@given(config=configs())
def test_every_size_of_a_plan_reaches_megatron_under_a_name_that_it_has(config: HybridParallelConfig) -> None:
    passed = megatron_options(plan_of(config))
    assert set(passed) <= MEGATRON
    assert int(passed["--tensor-model-parallel-size"]) == config.tp
    assert int(passed["--pipeline-model-parallel-size"]) == config.pp
    assert int(passed["--context-parallel-size"]) == config.cp
    exchanged = config.cp > 1 and config.cp_variant is ContextVariant.ALL_TO_ALL
    assert passed.get("--cp-comm-type") == ("a2a" if exchanged else None)
    assert int(passed.get("--num-virtual-stages-per-pipeline-rank", 1)) == config.vpp
    assert int(passed["--global-batch-size"]) == config.global_batch
    assert int(passed["--micro-batch-size"]) == config.micro_batch
    assert ("--sequence-parallel" in passed) == (config.sequence_parallel and config.tp > 1)
    sharded = config.zero > 0 and config.dp * config.cp > 1
    assert ("--use-distributed-optimizer" in passed) == sharded
    assert ("--use-megatron-fsdp" in passed) == (sharded and config.zero > 1)


@settings(max_examples=20)
@given(config=configs())
def test_torchtitan_gets_fields_that_it_has_and_a_mesh_that_multiplies_to_the_world(
    config: HybridParallelConfig,
) -> None:
    config = replace(config, zero=3, recompute=Recompute.FULL, cp_variant=ContextVariant.RING)
    parallelism, training = torchtitan_fields(plan_of(config))
    assert {f"ParallelismConfig.{name}" for name in parallelism} <= TORCHTITAN
    assert {f"TrainingConfig.{name}" for name in training} <= TORCHTITAN
    degrees = [value for name, value in parallelism.items() if name.endswith("_degree") and "expert" not in name]
    assert prod(degrees) == config.world_size
    tokens = training["num_tokens_per_microbatch_per_dp_rank"] * config.dp * config.num_microbatches
    assert tokens == training["num_tokens_per_train_step"]
    modules = parallelism.get("module_fqns_per_model_part")
    if modules is not None:
        assert len(modules) == config.pp * config.vpp
        every = [f"layers.{i}" for i in range(load("llama-3.1-8b").num_layers)]
        assert [name for part in modules for name in part] == ["tok_embeddings", *every, "norm", "lm_head"]


@settings(max_examples=20)
@given(config=configs())
def test_deepspeed_batch_sizes_obey_its_own_equation(config: HybridParallelConfig) -> None:
    config = replace(
        config, pp=1, vpp=1, schedule=Schedule.ONE_F_ONE_B, zero=min(config.zero, 2), sequence_parallel=False
    )
    document = json.loads(export(plan_of(config), Target.DEEPSPEED).text)
    ranks = config.world_size // config.tp // document.get("sequence_parallel_size", 1)
    steps = document["gradient_accumulation_steps"]
    assert document["train_batch_size"] == document["train_micro_batch_size_per_gpu"] * steps * ranks
    assert document["zero_optimization"]["stage"] == config.zero
    assert document.get("tensor_parallel", {}).get("autotp_size", 1) == config.tp


@settings(max_examples=20)
@given(config=configs())
def test_launchers_start_every_rank_once(config: HybridParallelConfig) -> None:
    plan = plan_of(config)
    text = export(plan, Target.SLURM, "my plan.yaml").text
    nodes, gpus = (int(re.findall(rf"#SBATCH --{name}=(\d+)", text)[0]) for name in ("nodes", "gpus-per-node"))
    assert nodes * gpus == config.world_size
    assert "'my plan.yaml'" in text
    config_map, job_set = yaml.safe_load_all(export(plan, Target.K8S).text)
    assert Plan.from_yaml(config_map["data"]["plan.yaml"]) == plan
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert job["parallelism"] * limits["nvidia.com/gpu"] == config.world_size
    assert job["parallelism"] == job["completions"]


def test_schedules_are_names_that_torch_knows() -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    from meshwright.export.torchtitan import SCHEDULES

    for name in SCHEDULES.values():
        assert schedules.get_schedule_class(name)


BASE = HybridParallelConfig(dp=2, tp=2, pp=2, global_batch=16, zero=1, sequence_parallel=True)


MODELS = ["llama-3.1-70b", "qwen2.5-7b", "qwen3-8b", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt2"]


@pytest.mark.parametrize("model", MODELS)
def test_megatron_model_arguments_exist_and_give_the_sizes_of_the_model(model: str) -> None:
    passed = megatron_options(plan_of(BASE, model))
    spec = load(model)
    assert set(passed) <= MEGATRON
    assert int(passed["--num-layers"]) == spec.num_layers
    assert int(passed["--hidden-size"]) == spec.hidden
    assert int(passed["--vocab-size"]) == spec.vocab
    assert ("--num-experts" in passed) == any(kind.top_k for kind in spec.kinds)


def test_layers_that_do_not_divide_are_laid_out_in_full_for_megatron() -> None:
    passed = megatron_options(plan_of(BASE, "deepseek-v3"))
    stages = passed["--pipeline-model-parallel-layout"].split("|")
    assert [stage.count("t") for stage in stages] == [31, 30] or [stage.count("t") for stage in stages] == [30, 31]
    assert (stages[0][0], stages[-1][-2:]) == ("E", "mL")
    uneven = HybridParallelConfig(pp=2, global_batch=4, layer_split=(17, 15))
    assert (
        megatron_options(plan_of(uneven))["--pipeline-model-parallel-layout"] == "E" + "t" * 17 + "|" + "t" * 15 + "L"
    )


REFUSED: dict[str, tuple[Target, HybridParallelConfig, str, str]] = {
    "zbv to Megatron": (Target.MEGATRON, HybridParallelConfig(pp=2, vpp=2, schedule=Schedule.ZBV, global_batch=8),
                        "llama-3.1-8b", "no zbv schedule"),
    "linear attention to Megatron": (Target.MEGATRON, BASE, "qwen3.5-35b-a3b", "not exported"),
    "zb-h1 to torchtitan": (Target.TORCHTITAN, HybridParallelConfig(pp=2, schedule=Schedule.ZB_H1, global_batch=8),
                            "llama-3.1-8b", "no zb-h1 schedule"),
    "heads exchanged to torchtitan": (
        Target.TORCHTITAN, HybridParallelConfig(cp=2, zero=3, global_batch=8, cp_variant=ContextVariant.ALL_TO_ALL),
        "llama-3.1-8b", "exchanges no heads"),
    "a model that torchtitan lacks": (Target.TORCHTITAN, BASE, "mixtral-8x7b", "configures no mixtral"),
    "a pipeline to DeepSpeed": (Target.DEEPSPEED, BASE, "llama-3.1-8b", "PipelineModule"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_target_cannot_express_is_refused_with_the_reason(case: str) -> None:
    target, config, model, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        export(plan_of(config, model), target)


@pytest.mark.parametrize("target", list(Target))
def test_exports_are_those_of_the_golden_files(target: Target) -> None:
    config = HybridParallelConfig(dp=8, tp=2, global_batch=32, zero=2)
    plan = Plan.from_yaml(plan_of(config).to_yaml().split("provenance:")[0])  # without the version of meshwright
    assert export(plan, target).text == (GOLDEN / f"{target.value}.txt").read_text()


@pytest.mark.parametrize("target", [Target.MEGATRON, Target.SLURM])
def test_scripts_are_valid_bash(target: Target, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(export(plan_of(BASE), target).text)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


def test_the_command_prints_writes_and_says_what_is_left_to_do(meshwright: Callable[..., Any], tmp_path: Path) -> None:
    plan, script = tmp_path / "plan.yaml", tmp_path / "run.sh"
    plan_of(BASE).write(plan)
    done = meshwright("export", plan, "--to", "megatron")
    assert (done.code, done.out.splitlines()[0]) == (0, "#!/usr/bin/env bash")
    assert meshwright("export", plan, "--to", "slurm", "-o", script).out == ""
    assert str(plan) in script.read_text()
    found = json.loads(meshwright("export", plan, "--to", "k8s", "--json").out)
    assert found["target"] == "k8s"
    assert found["notes"]


def test_a_serving_plan_goes_to_vllm_and_nowhere_else(meshwright: Callable[..., Any], tmp_path: Path) -> None:
    plan = tmp_path / "serve.yaml"
    job = [
        "plan",
        "llama-3.1-8b",
        "--cluster",
        "h100-sxm",
        "--nodes",
        "1",
        "--serve",
        "--prompt",
        "64",
        "--output",
        "64",
    ]
    assert meshwright(*job, "--tp", "4", "-o", plan).code == 0
    assert "--tensor-parallel-size 4" in meshwright("export", plan, "--to", "vllm").out
    assert meshwright("export", plan, "--to", "megatron").code == 2
    plan_of(BASE).write(plan)
    assert meshwright("export", plan, "--to", "vllm").code == 2

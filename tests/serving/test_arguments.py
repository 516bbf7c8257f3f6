"""vLLM's arguments of a plan: one node and many, dense and mixture of experts, and what is refused beforehand."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.grid import rank_layout
from meshwright.plan import Plan, ServingWorkload, TrainingWorkload
from meshwright.serving import VllmOptions, vllm_launch
from meshwright.serving.arguments import engines_of

LLAMA, MIXTRAL = "llama-3.1-70b", "mixtral-8x7b"


def plan(model: str = LLAMA, section: dict[str, Any] | None = None, **sizes: Any) -> Plan:
    workload = ServingWorkload(kind="serving", prompt=1024, output=256, **(section or {}))
    return Plan.from_parts(model, HybridParallelConfig(**sizes), workload)


def test_one_node_is_one_command_that_names_every_size():
    launch = vllm_launch(plan(tp=4, pp=2, section={"batch": 64}))
    assert len(launch.processes) == 1
    words = shlex.split(launch.processes[0].shell())
    assert words[:3] == ["vllm", "serve", "meta-llama/Meta-Llama-3.1-70B"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options == {
        "--tensor-parallel-size": "4", "--pipeline-parallel-size": "2", "--dtype": "bfloat16",
        "--max-model-len": "1280", "--max-num-batched-tokens": "8192", "--max-num-seqs": "64",
        "--host": "127.0.0.1", "--port": "8000",
    }  # fmt: skip


def test_yaml_keywords_and_command_say_the_same():
    launch = vllm_launch(plan(tp=8, section={"kv_bytes_per_element": 1.0}), VllmOptions(executor="mp"))
    process = launch.processes[0]
    document = yaml.safe_load(process.yaml())
    assert document.pop("model") == process.model
    assert {name.replace("-", "_"): value for name, value in document.items()} == process.arguments
    keywords = launch.keywords()
    assert keywords["kv_cache_dtype"] == "fp8"
    assert set(process.arguments) - set(keywords) == {"host", "port"}


def test_a_replica_over_nodes_gives_each_node_its_rank_and_the_head_its_server():
    launch = vllm_launch(plan(tp=8, pp=2), VllmOptions(node_gpus=8, head_address="10.0.0.1"))
    first, second = (p.arguments for p in launch.processes)
    assert (first["nnodes"], first["node_rank"], second["node_rank"]) == (2, 0, 1)
    assert first["master_addr"] == second["master_addr"] == "10.0.0.1"
    assert "headless" not in first
    assert second["headless"] is True
    assert "port" not in second


def test_replicas_that_each_span_nodes_are_servers_of_their_own():
    launch = vllm_launch(plan(tp=8, pp=2, dp=2), VllmOptions(node_gpus=8))
    assert (launch.engines, launch.data_parallel) == (2, 1)
    assert [(p.engine, p.node) for p in launch.processes] == [(0, 0), (0, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("balancing", ["internal", "hybrid", "external"])
def test_replicas_over_nodes_follow_the_balancing(balancing: Any):
    options = VllmOptions(node_gpus=8, balancing=balancing)
    launch = vllm_launch(plan(tp=2, dp=8), options)
    assert all(p.arguments["data_parallel_size"] == 8 for p in launch.processes)
    if balancing == "external":
        assert [p.arguments["data_parallel_rank"] for p in launch.processes] == list(range(8))
        return
    first, second = (p.arguments for p in launch.processes)
    assert first["data_parallel_size_local"] == second["data_parallel_size_local"] == 4
    assert second["data_parallel_start_rank"] == 4
    assert bool(second.get("headless")) is (balancing == "internal")


def test_experts_spread_over_an_engine_are_asked_for():
    launch = vllm_launch(plan(MIXTRAL, tp=2, dp=4, ep=4, global_batch=4))
    assert (launch.engines, launch.data_parallel) == (2, 2)
    assert launch.processes[0].arguments["enable_expert_parallel"] is True
    cut = vllm_launch(plan(MIXTRAL, tp=2, dp=4, expert_tp=2))
    assert (cut.engines, cut.data_parallel) == (4, 1)
    assert "enable_expert_parallel" not in cut.processes[0].arguments


@given(tp=st.sampled_from([1, 2, 4]), dp=st.sampled_from([1, 2, 4]), ep=st.sampled_from([1, 2, 4, 8]))
def test_engines_are_those_of_the_vllm_order(tp: int, dp: int, ep: int):
    if tp * dp % ep or (ep == 1 and tp > 1):
        return
    config = HybridParallelConfig(tp=tp, dp=dp, ep=ep)
    try:
        engines, within = engines_of(config, experts=8)
    except InputError:
        with pytest.raises(InputError):
            rank_layout(config, "vllm")
        return
    if ep > 1:
        sizes = rank_layout(config, "vllm").dense.sizes
        assert (sizes["external_dp"], sizes["dp"]) == (engines, within)
    assert engines * within == dp


@pytest.mark.parametrize(("pool", "role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
def test_a_pool_names_its_connector_and_role_and_keeps_to_its_devices_and_ports(pool: str, role: str):
    section = {"pool": pool, "kv_connector": "NixlConnector"}
    launch = vllm_launch(plan(tp=2, dp=2, section=section), VllmOptions(node_gpus=8))
    assert (launch.engines, [p.node for p in launch.processes]) == (2, [0, 0])
    for engine, process in enumerate(launch.processes):
        told = json.loads(str(process.arguments["kv_transfer_config"]))
        assert told == {"kv_connector": "NixlConnector", "kv_role": role}
        assert process.environment["CUDA_VISIBLE_DEVICES"] == ("0,1", "2,3")[engine]
        assert process.shell().startswith("CUDA_VISIBLE_DEVICES=")
    ports = {(p.arguments["port"], p.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"]) for p in launch.processes}
    assert len(ports) == 2
    with pytest.raises(InputError, match="no pool"):
        vllm_launch(plan(tp=2, section=section)).keywords()


def test_pools_of_one_node_share_no_port():
    def ports(pool: str) -> set[object]:
        processes = vllm_launch(plan(tp=2, dp=2, section={"pool": pool})).processes
        channels = {p.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] for p in processes}
        return {p.arguments["port"] for p in processes} | channels

    assert not ports("prefill") & ports("decode")


@pytest.mark.parametrize(
    ("pool", "connector", "words"),
    [
        ("decode", "NixlPushConnector", "one stage only"),
        ("prefill", "NixlConnector", "reads from engines of one stage"),
    ],
)
def test_pools_that_vllms_connectors_refuse_are_refused(pool: str, connector: str, words: str):
    with pytest.raises(InputError, match=words):
        vllm_launch(plan(tp=2, pp=2, section={"pool": pool, "kv_connector": connector}))
    pushed = vllm_launch(plan(tp=2, pp=2, section={"pool": "prefill", "kv_connector": "NixlPushConnector"}))
    assert len(pushed.processes) == 1


@pytest.mark.parametrize(
    ("model", "sizes", "options", "words"),
    [
        (LLAMA, {"tp": 3}, {}, "64 attention heads are not divisible"),
        (LLAMA, {"pp": 81}, {}, "pp=81 is more than 80 layers"),
        (LLAMA, {"tp": 8}, {"decode_context": 2}, "makes none of 8 heads"),
        (LLAMA, {"tp": 16}, {"decode_context": 4}, "exceeds the 2 copies"),
        (LLAMA, {"tp": 16}, {"decode_context": 3}, "does not divide tp=16"),
        (LLAMA, {"cp": 2}, {}, "cp=2"),
        (LLAMA, {"precision": "nvfp4"}, {}, "quantised so"),
        (MIXTRAL, {"tp": 2}, {}, "ep x expert_tp = 1"),
        (LLAMA, {"tp": 8, "pp": 2}, {"node_gpus": 6}, "does not fill nodes"),
    ],
)
def test_what_vllm_would_refuse_or_fail_at_late_is_refused_here(
    model: str, sizes: dict[str, Any], options: dict[str, Any], words: str
):
    with pytest.raises(InputError, match=words):
        vllm_launch(plan(model, **sizes), VllmOptions(**options))


def test_a_model_without_pipeline_support_is_refused_by_name(tmp_path: Any):
    served = plan(tp=1, pp=2)
    config = {"model_type": "llama", "architectures": ["Zamba2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4,
              "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 64}  # fmt: skip
    named = served.model.model_copy(update={"name": "other", "config": config})
    with pytest.raises(InputError, match="no pipeline parallelism for Zamba2"):
        vllm_launch(served.model_copy(update={"model": named}))


def test_keywords_and_training_plans_are_refused():
    with pytest.raises(InputError, match="one replica"):
        vllm_launch(plan(dp=2)).keywords()
    training = Plan.from_parts(LLAMA, HybridParallelConfig(), TrainingWorkload(seq=8))
    with pytest.raises(InputError, match="for training"):
        vllm_launch(training)

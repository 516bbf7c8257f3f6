"""`make test-serving`: real vLLM (its CPU build) on plans of meshwright, against float32 transformers.

A small Llama is trained at dp2 x tp2 x pp2 by `meshwright train`; its checkpoint is served by `meshwright serve` at
tp2, pp2, tp2 x pp2 and dp2, checked by `meshwright check-serving` (tokens, ranks, 32 streaming clients, some leave),
generated from by `meshwright generate`, and stopped; nothing may be left running. vLLM's own parser and registry are
asked about what is written and refused. Out: a line per layout, exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from tools.serving_env import HERE, make

from meshwright.layout.config import HybridParallelConfig
from meshwright.plan import Plan, ServingWorkload
from meshwright.serving.arguments import VllmOptions, vllm_launch
from meshwright.serving.refusals import WITHOUT_PIPELINE
from meshwright.serving.server import QUIET_ENVIRONMENT, session_members

WORK = HERE / "build" / "serving"
LAYOUTS = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "dp2": {"dp": 2},
}
MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 264, "hidden_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256,
    "num_hidden_layers": 4, "max_position_embeddings": 512, "tie_word_embeddings": False, "eos_token_id": 256,
    "bos_token_id": None, "initializer_range": 0.1,
}  # fmt: skip
PROMPT, OUTPUT, NEW = 16, 32, 24
PORT = 8411
READY_S = 900
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **QUIET_ENVIRONMENT}
ASK_REGISTRY = """
import json, sys
from vllm.model_executor.models.registry import ModelRegistry
names = json.loads(sys.argv[1])
print(json.dumps([n for n in names if ModelRegistry.models[n].inspect_model_cls().supports_pp]))
"""
ASK_PARSER = """
import json, sys
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
for words in json.loads(sys.argv[1]):
    args = parser.parse_args(words)
    args.model = args.model_tag
    told = AsyncEngineArgs.from_cli_args(args).kv_transfer_config
    if told is not None:
        KVConnectorFactory.get_connector_class_by_name(told.kv_connector)
"""
PARSED: tuple[tuple[str, dict[str, int], dict[str, Any], dict[str, Any]], ...] = (
    # (model, split, workload, options): one of every kind of command that is written
    ("llama-3.1-70b", {"tp": 8, "pp": 2}, {"batch": 64}, {"node_gpus": 8, "head_address": "10.0.0.1"}),
    ("llama-3.1-70b", {"tp": 2, "dp": 8}, {"kv_bytes_per_element": 1.0}, {"node_gpus": 8}),
    ("llama-3.1-70b", {"tp": 2, "dp": 8}, {}, {"node_gpus": 8, "balancing": "hybrid"}),
    ("llama-3.1-70b", {"tp": 2, "dp": 8}, {}, {"node_gpus": 8, "balancing": "external"}),
    ("mixtral-8x7b", {"tp": 2, "dp": 4, "ep": 4}, {"pass_tokens": 4096}, {"executor": "mp"}),
    ("llama-3.1-70b", {"tp": 4}, {"pool": "prefill", "kv_connector": "NixlConnector"}, {}),
    ("llama-3.1-70b", {"tp": 4}, {"pool": "decode", "kv_connector": "NixlConnector"}, {}),
    ("llama-3.1-70b", {"tp": 2, "pp": 2}, {"pool": "prefill", "kv_connector": "NixlPushConnector"}, {}),
)


def meshwright(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meshwright", *(str(w) for w in words)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def needed(*words: object) -> str:
    """The output of a command that must succeed."""
    done = meshwright(*words)
    if done.returncode:
        raise SystemExit(f"meshwright {' '.join(str(w) for w in words)}: {done.stderr or done.stdout}")
    return done.stdout


def write_plan(name: str, workload: dict[str, Any], parallel: dict[str, Any], **more: Any) -> Path:
    file = WORK / f"{name}.yaml"
    parallel = {"precision": "fp32", **parallel}
    plan = {"version": 1, "model": {"name": "trained", "config": MODEL}, "workload": workload, "parallel": parallel}
    file.write_text(yaml.safe_dump(plan | more))
    return file


def trained() -> tuple[Path, Path]:
    """(exported model, checkpoint) of a run on 2 x 2 x 2 ranks."""
    text = WORK / "text.txt"
    words = ["shard", "mesh", "rank", "tensor", "pipeline", "stage", "loss", "and", "of", "the"]
    drawn = random.Random(3)
    text.write_text(" ".join(drawn.choice(words) for _ in range(4000)))
    layout = {"dp": 2, "tp": 2, "pp": 2, "global_batch": 8, "micro_batch": 2}
    run = {"steps": 30, "learning_rate": 3e-3}
    plan = write_plan("train", {"kind": "training", "seq": 64}, layout, training=run)
    out = WORK / "run"
    needed("train", plan, "--data", text, "--out", out, "--export", "--json")
    return out / "model", max((out / "checkpoints").glob("step-*"))


def serve_and_check(name: str, layout: dict[str, int], vllm: Path, checkpoint: Path, load: bool) -> dict[str, Any]:
    """Serve a plan from the checkpoint, check it, stop it."""
    plan = write_plan(name, {"kind": "serving", "prompt": PROMPT, "output": OUTPUT, "batch": 32}, layout)
    folder = WORK / f"{name}-serve"
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "meshwright",
        "serve",
        str(plan),
        "--checkpoint",
        str(checkpoint),
        "--vllm",
        str(vllm),
    ]
    command += ["--cpu", "--port", str(PORT), "--out", str(folder), "--timeout", str(READY_S), "--json"]
    started = time.monotonic()
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise SystemExit(f"{name}: vLLM did not start; see {folder / 'vllm.log'}")
        reported = json.loads(line)
        ready_s = time.monotonic() - started
        session = int(json.loads((folder / "server.json").read_text())["pid"])
        options: list[object] = ["--requests", 96 if load else 0, "--clients", 32, "--leave", 0.3]
        checked = meshwright("check-serving", plan, "--out", folder, "--tokens", NEW, *options, "--json")
        server.send_signal(signal.SIGINT)
        code = server.wait(timeout=120)
    document = json.loads(checked.stdout) if checked.stdout else {"agrees": False, "error": checked.stderr}
    return {
        "ready_s": ready_s,
        "reported": reported,
        "checked": document,
        "exit_code": code,
        "left_running": session_members(session),
        "plan": plan,
        "generate_agrees": generate_agrees(plan, checkpoint, document),
    }


def generate_agrees(plan: Path, checkpoint: Path, checked: dict[str, Any]) -> bool:
    """Whether `meshwright generate` at the same layout, from the training checkpoint, gives the reference's tokens."""
    answers = checked.get("tokens") or []
    file = plan.with_suffix(".prompts.jsonl")
    file.write_text("\n".join(json.dumps({"tokens": a["prompt"]}) for a in answers))
    words = ("--prompts", file, "--max-new-tokens", NEW, "--eos", -1, "--json")
    done = json.loads(needed("generate", plan, "--checkpoint", checkpoint, *words))
    return bool(answers) and [a["tokens"] for a in done["answers"]] == [a["reference"] for a in answers]


def good(found: dict[str, Any]) -> bool:
    return bool(
        found["checked"]["agrees"]
        and found["generate_agrees"]
        and found["reported"]["ranks_agree"]
        and found["exit_code"] == 0
        and not found["left_running"]
    )


def registry_agrees(python: Path) -> bool:
    """That vLLM's own registry has no pipeline support for any architecture on our list."""
    asked = [python, "-c", ASK_REGISTRY, json.dumps(sorted(WITHOUT_PIPELINE))]
    done = subprocess.run(asked, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1]) == []


def parser_takes_all(python: Path) -> str:
    """What vLLM's own parser says against a command of every kind that is written; empty where it takes all."""
    commands: list[list[str]] = []
    for model, sizes, section, options in PARSED:
        workload = ServingWorkload(kind="serving", prompt=1024, output=256, **section)
        plan = Plan.from_parts(model, HybridParallelConfig(**sizes), workload)
        launch = vllm_launch(plan, VllmOptions(model=str(HERE), **options))  # a folder: names are looked up at once
        commands += [p.command()[2:] for p in launch.processes]
    asked = [python, "-c", ASK_PARSER, json.dumps(commands)]
    done = subprocess.run(asked, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done.stderr[-2000:] if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(LAYOUTS), action="append", help="layouts; default all")
    chosen = parser.parse_args().only or list(LAYOUTS)
    python = make()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    model, checkpoint = trained()
    print(f"trained at dp2 x tp2 x pp2, exported to {model.relative_to(HERE)}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    for name in chosen:
        found = serve_and_check(name, LAYOUTS[name], python.with_name("vllm"), checkpoint, load=name == chosen[-1])
        results[name] = found
        checked = found["checked"]
        tokens = checked.get("tokens") or []
        equal = sum(len(t["served"]) for t in tokens if t["agrees"])
        load = (checked.get("load") or {}).get("closed")
        print(
            f"{name}: {'ok' if good(found) else 'NOT OK'}; ready after {found['ready_s']:.0f} s; {equal} of "
            f"{sum(len(t['reference']) for t in tokens)} tokens of {len(tokens)} prompts equal to transformers; "
            f"generate {'equal' if found['generate_agrees'] else 'DIFFERS'}; ranks {found['reported']['ranks']} "
            f"{'as layout' if found['reported']['ranks_agree'] else 'NOT as layout'}; stopped with "
            f"{found['exit_code']}, left running {found['left_running']}",
            flush=True,
        )
        if load:
            print(f"  load: {json.dumps({k: v for k, v in load.items() if k != 'predicted'})}", flush=True)
        if not good(found):
            print(json.dumps(checked)[:3000], flush=True)
    if not registry_agrees(python):
        print("vLLM's registry has pipeline support for an architecture of serving.refusals.WITHOUT_PIPELINE")
        return 1
    if refused := parser_takes_all(python):
        print(f"vLLM's parser refuses arguments of serving.arguments: {refused}")
        return 1
    print(f"vLLM's parser takes the commands of {len(PARSED)} kinds of plans, pools and their connectors among them")
    return 0 if all(good(found) for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

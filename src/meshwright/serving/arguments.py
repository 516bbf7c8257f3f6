"""The exact arguments with which vLLM serves a plan: as a command, as keywords of `LLM(...)`, as YAML, for every node.

In: a plan whose workload is serving, and `VllmOptions` (what a plan does not say: where weights are, nodes and their
address, balancing). Out: `VllmLaunch`, one `VllmProcess` per `vllm serve` to start. What vLLM refuses,
or would fail at late, is an InputError here (`refusals`). Written against vLLM 0.32.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from meshwright.cost.serving_stack import serving_stacks
from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.plan import Plan, ServingWorkload
from meshwright.plan.yaml_text import dump_yaml
from meshwright.serving.model import ServedModel
from meshwright.serving.pools import PORT_OFFSETS, pool_environment, pool_problem, transfer_config
from meshwright.serving.refusals import refuse

Balancing = Literal["internal", "hybrid", "external"]
Value = str | int | float | bool
HEAD = "HEAD_ADDRESS"
"""Stands for the first node's address where none is given: to be replaced by hand or by a launcher."""

DTYPES = {Precision.FP32: "float32", Precision.FP16: "float16"}
"""Everything else computes in bfloat16."""
SERVED_ONLY = ("headless", "nnodes", "node_rank", "master_addr", "master_port", "host", "port")
"""Arguments of `vllm serve` that `LLM(...)` does not take here."""


@dataclass(frozen=True)
class VllmOptions:
    """What a plan does not say. `model`: a folder or hub id with the weights (None: as the plan names it).
    `executor`: 'mp' or 'ray' (None: vLLM's choice). `node_gpus`: GPUs of a node (None: all ranks on one node).
    `decode_context`: ranks of a tp group that share one KV head's cache by tokens. `extra`: further arguments by name.
    """

    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    executor: Literal["mp", "ray"] | None = None
    node_gpus: int | None = None
    head_address: str = HEAD
    master_port: int = 29501
    rpc_port: int = 13345
    balancing: Balancing = "internal"
    decode_context: int = 1
    max_num_seqs: int | None = None
    extra: dict[str, Value] = field(default_factory=dict[str, Value])


@dataclass(frozen=True)
class VllmProcess:
    """One `vllm serve` of the launch: on which node, of which engine, with which arguments (underscored names) and
    which `environment` beside the machine's own."""

    node: int
    engine: int
    model: str
    arguments: dict[str, Value]
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def command(self) -> list[str]:
        """The words of the command line."""
        words = ["vllm", "serve", self.model]
        for name, value in self.arguments.items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(option)
            elif value is False:
                words.append(f"--no-{name.replace('_', '-')}")
            else:
                words += [option, str(value)]
        return words

    def shell(self) -> str:
        """The command as a line to paste, the address to fill in left readable."""
        return " ".join((*(f"{name}={value}" for name, value in self.environment.items()), shlex.join(self.command())))

    def yaml(self) -> str:
        """For `vllm serve --config FILE`."""
        named = {name.replace("_", "-"): value for name, value in self.arguments.items()}
        return dump_yaml({"model": self.model, **named})


@dataclass(frozen=True)
class VllmLaunch:
    """Everything to start. Engines are servers that share nothing; each may span nodes."""

    engines: int
    data_parallel: int
    processes: tuple[VllmProcess, ...]

    def keywords(self) -> dict[str, Value]:
        """For `LLM(**keywords)` in one process. Several replicas cannot be one: vLLM serves them."""
        if self.data_parallel > 1 or self.engines > 1:
            raise InputError(
                "LLM(...) holds one replica: vLLM refuses data_parallel_size > 1 there; serve the plan, or plan dp=1"
            )
        first = self.processes[0]
        if "kv_transfer_config" in first.arguments:
            raise InputError("LLM(...) is no pool of a disaggregated plan: serve the plan")
        if len(self.processes) > 1:
            raise InputError("LLM(...) runs on one node; serve this plan, whose replica spans nodes")
        kept = {name: value for name, value in first.arguments.items() if name not in SERVED_ONLY}
        return {"model": first.model, **kept}


def vllm_launch(plan: Plan, options: VllmOptions | None = None) -> VllmLaunch:
    """The arguments of every process that serves a plan."""
    options = options or VllmOptions()
    section = plan.workload
    if not isinstance(section, ServingWorkload):
        raise InputError(
            "this is a plan for training; give one whose workload is serving (meshwright plan ... --serve)"
        )
    served = ServedModel.of(plan)
    engines, data_parallel = engines_of(plan.parallel, served.experts)
    refuse(plan.parallel, served, options.decode_context)
    if (problem := pool_problem(section, plan.parallel)) is not None:
        raise InputError(problem)
    replica = plan.parallel.tp * plan.parallel.pp
    if served.experts == 0 and options.node_gpus is not None and replica > options.node_gpus:
        engines, data_parallel = data_parallel, 1  # replicas that each span nodes: a server of its own for each
    if section.pool and served.experts == 0:
        engines, data_parallel = engines * data_parallel, 1  # a proxy stands before them anyhow
    if section.pool:
        options = replace(options, port=options.port + PORT_OFFSETS[section.pool])
    shared = _shared(plan, section, options, data_parallel)
    model = options.model or served.name
    processes: list[VllmProcess] = []
    for engine in range(engines):
        first, own = _place(engine, replica * data_parallel, engines, options, len(processes))
        if section.pool:
            own |= pool_environment(section, engine, data_parallel)
        made = _engine_processes(plan.parallel, engine, data_parallel, model, shared, options, first)
        processes += [replace(process, environment=own) for process in made]
    return VllmLaunch(engines, data_parallel, tuple(processes))


def engines_of(config: HybridParallelConfig, experts: int) -> tuple[int, int]:
    """(engines that share nothing, dp within each). vLLM spreads or cuts experts over all dp x tp ranks of an engine:
    the plan's expert axes say how many replicas one engine has; a dense model's are all of one."""
    if experts == 0:
        return 1, config.dp
    width = config.ep * config.expert_tp
    if config.ep > 1 and config.expert_tp > 1:
        raise InputError(
            f"vLLM either spreads experts or cuts them, not both: use ep={width} with expert_tp=1, or ep=1 with "
            f"expert_tp={width}"
        )
    if width % config.tp or config.dp % (width // config.tp):
        raise InputError(
            f"vLLM spreads experts over all dp x tp ranks of an engine: ep x expert_tp = {width} must be tp = "
            f"{config.tp} times a divisor of dp = {config.dp}"
        )
    within = width // config.tp
    return config.dp // within, within


def _place(engine: int, gpus: int, engines: int, options: VllmOptions, nodes: int) -> tuple[int, dict[str, str]]:
    """(first node of an engine, environment that keeps it to its devices); `nodes` are taken by those before it."""
    per_node = engines if options.node_gpus is None else options.node_gpus // gpus
    if engines == 1 or per_node < 2:
        return nodes, {}
    start = engine % per_node * gpus
    devices = ",".join(str(device) for device in range(start, start + gpus))
    return engine // per_node, {"CUDA_VISIBLE_DEVICES": devices}


def _shared(plan: Plan, section: ServingWorkload, options: VllmOptions, data_parallel: int) -> dict[str, Value]:
    """Arguments that every process of the launch has."""
    config = plan.parallel
    stack = serving_stacks()["vllm"]
    made: dict[str, Value] = {
        "tensor_parallel_size": config.tp,
        "pipeline_parallel_size": config.pp,
        "dtype": DTYPES.get(config.precision, "bfloat16"),
        "max_model_len": section.max_len or section.prompt + section.output,
        "max_num_batched_tokens": max(section.pass_tokens or stack.max_tokens, section.batch or 1),
    }
    sequences = options.max_num_seqs or section.batch
    if sequences:
        made["max_num_seqs"] = sequences
    if data_parallel > 1:
        made["data_parallel_size"] = data_parallel
    if config.ep > 1:
        made["enable_expert_parallel"] = True
    if section.kv_bytes_per_element == 1.0:
        made["kv_cache_dtype"] = "fp8"
    if config.precision is Precision.FP8 and not ServedModel.of(plan).quantized:
        made["quantization"] = "fp8"  # weights are cast when they are loaded
    if options.decode_context > 1:
        made["decode_context_parallel_size"] = options.decode_context
    if section.pool:
        made["kv_transfer_config"] = transfer_config(section)
    if options.executor:
        made["distributed_executor_backend"] = options.executor
    return made


def _engine_processes(
    config: HybridParallelConfig,
    engine: int,
    dp: int,
    model: str,
    shared: dict[str, Value],
    options: VllmOptions,
    first: int,
) -> list[VllmProcess]:
    """The processes of one engine; `first` numbers its first node."""
    replica = config.tp * config.pp
    node_gpus = options.node_gpus or replica * dp
    listens: dict[str, Value] = {"host": options.host, "port": options.port + engine}

    def process(node: int, **own: Value) -> VllmProcess:
        arguments = {**shared, **own, **({} if own.get("headless") else listens), **options.extra}
        return VllmProcess(first + node, engine, model, arguments)

    if replica > node_gpus:
        return _spread_replica(replica, node_gpus, dp, options, process)
    per_node = min(node_gpus // replica, dp)
    if dp == 1 or per_node >= dp:
        return [process(0)]
    if dp % per_node:
        raise InputError(
            f"{dp} replicas of {replica} GPUs do not divide evenly over nodes of {node_gpus}; plan dp in multiples of "
            f"{per_node}"
        )
    address: dict[str, Value] = {
        "data_parallel_address": options.head_address,
        "data_parallel_rpc_port": options.rpc_port,
    }
    if options.balancing == "external":
        return [
            process(rank // per_node, data_parallel_rank=rank, data_parallel_external_lb=True, **address)
            for rank in range(dp)
        ]
    made: list[VllmProcess] = []
    for node in range(dp // per_node):
        own: dict[str, Value] = {"data_parallel_size_local": per_node, **address}
        if options.balancing == "hybrid":
            own |= {"data_parallel_hybrid_lb": True, "data_parallel_start_rank": node * per_node}
        elif node:
            own |= {"data_parallel_start_rank": node * per_node, "headless": True}
        made.append(process(node, **own))
    return made


def _spread_replica(replica: int, node_gpus: int, dp: int, options: VllmOptions, process: Any) -> list[VllmProcess]:
    """One replica over several nodes: vLLM's own ranks per node, or Ray's placement."""
    if replica % node_gpus:
        raise InputError(f"a replica of tp x pp = {replica} GPUs does not fill nodes of {node_gpus} GPUs evenly")
    if dp > 1:
        raise InputError(
            f"a replica of tp x pp = {replica} GPUs spans nodes of {node_gpus}, and replicas that share experts must "
            "each fit in a node; use a smaller tp x pp"
        )
    if options.executor == "ray":
        return [process(0)]
    nodes = replica // node_gpus
    made: list[VllmProcess] = []
    for node in range(nodes):
        own: dict[str, Value] = {
            "nnodes": nodes,
            "node_rank": node,
            "master_addr": options.head_address,
            "master_port": options.master_port,
        }
        if node:
            own["headless"] = True
        made.append(process(node, **own))
    return made


__all__ = ["HEAD", "VllmLaunch", "VllmOptions", "VllmProcess", "engines_of", "vllm_launch"]

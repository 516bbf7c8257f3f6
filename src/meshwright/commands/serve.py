"""`meshwright serve`: vLLM started for a plan on this machine, waited for, compared with what was asked, and stopped.

In: a plan file for serving and where weights are. Out: a running server until it is interrupted; exit code 1 where vLLM
did not start, with the cause, the remedy and the lines of its log.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer
from rich.text import Text

from meshwright.commands import output
from meshwright.commands.generate import CheckpointFolder, WeightsFolder
from meshwright.commands.options import Json
from meshwright.errors import InputError
from meshwright.plan import Plan
from meshwright.serving.arguments import Value, VllmLaunch, VllmOptions, vllm_launch
from meshwright.serving.failures import explain
from meshwright.serving.model import weights_folder
from meshwright.serving.pools import NOTE
from meshwright.serving.ranks import expected_ranks, reported_cache, reported_ranks
from meshwright.serving.server import (
    CPU_COMPILATION,
    CPU_ENVIRONMENT,
    ServerFailedError,
    VllmServer,
    find_executable,
)

PlanFile = Annotated[str, typer.Argument(metavar="PLAN", help="A plan file whose workload is serving.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="On 127.0.0.1.")]
Executable = Annotated[str | None, typer.Option("--vllm", help="The vllm command, where it is not in the PATH.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the log; default runs/<name of the plan>-serve.")]
Timeout = Annotated[float, typer.Option("--timeout", min=1, metavar="S", help="Seconds to wait until it is ready.")]
OnCpu = Annotated[bool | None, typer.Option("--cpu/--no-cpu", help="vLLM's CPU build; default: if the cluster is.")]
Executor = Annotated[str | None, typer.Option("--executor", help="mp or ray.", metavar="mp|ray")]
DryRun = Annotated[bool, typer.Option("--show", help="Only print the command, keywords and YAML.")]
MostSequences = Annotated[int | None, typer.Option("--max-num-seqs", min=1, metavar="N", help="Per replica.")]


def serve(
    plan: PlanFile,
    weights: WeightsFolder = None,
    checkpoint: CheckpointFolder = None,
    port: Port = 8000,
    vllm: Executable = None,
    out: Out = None,
    timeout: Timeout = 1800.0,
    cpu: OnCpu = None,
    executor: Executor = None,
    max_num_seqs: MostSequences = None,
    show: DryRun = False,
    as_json: Json = False,
) -> int:
    """Serve a plan with vLLM on 127.0.0.1 until interrupted.

    Prints what was asked and what vLLM reports: ranks against the layout, KV cache, world size. A checkpoint of train
    is exported to safetensors first. Use --show for the command alone.
    """
    document = Plan.read(plan)
    folder = out or Path("runs") / f"{Path(plan).stem}-serve"
    on_cpu = _is_cpu(document) if cpu is None else cpu
    model = None if weights is None else str(weights)
    if checkpoint is not None:
        if weights is not None:
            raise InputError("--weights and --checkpoint each say where weights come from; give one")
        model = str(folder / "model") if show else str(exported(document, checkpoint, folder / "model"))
    options = VllmOptions(
        model=model,
        port=port,
        executor=_executor(executor),
        max_num_seqs=max_num_seqs,
        extra=_cpu_arguments() if on_cpu else {},
    )
    launch = vllm_launch(document, options)
    if show:
        _show_only(launch, as_json)
        return 0
    if len(launch.processes) != 1:
        raise InputError(f"the plan is {launch.engines} servers that share nothing: start each by itself (see --show)")
    _refuse_missing_files(document, model)
    server = VllmServer(launch.processes[0], find_executable(vllm), folder, CPU_ENVIRONMENT if on_cpu else {})
    try:
        with stopping() as stopped, server:
            output.show(Text(launch.processes[0].shell()), stderr=True)
            with waiting_line(timeout) as progress:
                _wait(server, timeout, progress, stopped)
            report = report_of(document, server)
            _show_report(report, as_json)
            agrees = bool(report["ranks_agree"])
            while not stopped.wait(0.5):
                if (code := server.ended()) is not None:
                    raise ServerFailedError(f"vLLM ended with exit code {code}", server.log)
    except ServerFailedError as error:
        show_failure(error)
        return 1
    return 0 if agrees else 1


def exported(plan: Plan, checkpoint: Path, target: Path) -> Path:
    """A checkpoint of train as safetensors with a tokenizer, made once per checkpoint."""
    from meshwright.commands.runtime_room import needs_runtime

    needs_runtime("serve --checkpoint")
    from meshwright.runtime.engine import COMPUTE_DTYPES
    from meshwright.runtime.generation.text import write_byte_tokenizer
    from meshwright.runtime.model_config import transformers_config
    from meshwright.runtime.safetensors_io import export_checkpoint

    export_checkpoint(checkpoint, transformers_config(plan), target, COMPUTE_DTYPES[plan.parallel.precision])
    write_byte_tokenizer(target)
    return target


def report_of(plan: Plan, server: VllmServer) -> dict[str, object]:
    """What was asked and what vLLM says of itself."""
    log = server.log.read_text("utf-8", errors="replace")
    ranks, expected = reported_ranks(log, plan.parallel), expected_ranks(plan.parallel)
    one_process = plan.parallel.tp * plan.parallel.pp == 1  # then the engine's own process is the worker
    cache = reported_cache(log)
    return {
        "url": server.url,
        "log": str(server.log),
        "world_size": plan.parallel.world_size,
        "ranks": [[r.rank, r.dp, r.pp, r.tp] for r in ranks],
        "expected_ranks": [[r.rank, r.dp, r.pp, r.tp] for r in expected],
        "ranks_agree": ranks == expected or (one_process and not ranks),
        "kv_cache_tokens": None if cache is None else cache.tokens,
        "kv_cache_concurrency": None if cache is None else cache.concurrency,
        "asked": dict(server.process.arguments),
    }


def show_failure(error: ServerFailedError) -> None:
    """Cause, remedy and the log's lines, on stderr."""
    text = error.log.read_text("utf-8", errors="replace") if error.log.is_file() else ""
    failure = explain(text)
    print(f"meshwright: {error}: {failure.cause}; {failure.remedy}", file=sys.stderr)
    for line in failure.lines:
        print(f"  | {line[:300]}", file=sys.stderr)
    print(f"  the whole log: {error.log}", file=sys.stderr)


@contextmanager
def stopping() -> Generator[threading.Event]:
    """An event that an interrupt or a termination sets, instead of raising in the middle of things."""
    stopped = threading.Event()

    def note(_number: int, _frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def waiting_line(timeout_s: float) -> Generator[Progress]:
    """A line with seconds and what vLLM says last: drawn anew on a terminal, now and then in a log."""
    shown = Progress(timeout_s)
    try:
        yield shown
    finally:
        shown.clear()


class Progress:
    """Callable with (seconds, last line of the log)."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._terminal = sys.stderr.isatty()
        self._next = 0.0

    def __call__(self, waited_s: float, line: str) -> None:
        text = f"waiting for vLLM {waited_s:4.0f} s of at most {self._timeout_s:.0f}  {line}"
        if self._terminal:
            print(f"\r\033[K{text[:150]}", end="", file=sys.stderr, flush=True)
        elif waited_s >= self._next:
            self._next = waited_s + 15.0
            print(text[:200], file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _wait(server: VllmServer, timeout_s: float, progress: Progress, stopped: threading.Event) -> None:
    def step(waited_s: float, line: str) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        progress(waited_s, line)

    server.wait(timeout_s, step)


def _is_cpu(plan: Plan) -> bool:
    return plan.cluster is not None and plan.load_cluster().accelerator.architecture == "cpu"


def _cpu_arguments() -> dict[str, Value]:
    """Compilation as the CPU build needs it."""
    return {"compilation_config": CPU_COMPILATION}


def _executor(name: str | None) -> Literal["mp", "ray"] | None:
    if name in ("mp", "ray", None):
        return name
    raise InputError(f"--executor {name!r}: use mp or ray")


def _refuse_missing_files(plan: Plan, model: str | None) -> None:
    """A config without weights would fail in vLLM after a minute."""
    if plan.model.config is not None and model is None and weights_folder(plan) is None:
        from meshwright.serving.model import needs_weights

        raise needs_weights(plan)


def _show_only(launch: VllmLaunch, as_json: bool) -> None:
    documents = [{"node": p.node, "engine": p.engine, "command": p.shell(), "yaml": p.yaml()} for p in launch.processes]
    keywords = None
    pool = "kv_transfer_config" in launch.processes[0].arguments
    if launch.engines == launch.data_parallel == len(launch.processes) == 1 and not pool:
        keywords = launch.keywords()
    if as_json:
        output.show_json({"engines": launch.engines, "processes": documents, "keywords": keywords})
        return
    if pool:
        output.show(Text(f"note: {NOTE}"), stderr=True)
    for document in documents:
        output.show(Text(f"node {document['node']}, engine {document['engine']}", style="bold"))
        output.show(Text(str(document["command"])))
    output.show(Text(f"\nvllm serve --config FILE\n{documents[0]['yaml']}"))
    if keywords is not None:
        arguments = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
        output.show(Text(f"LLM({arguments})"))


def _show_report(report: dict[str, object], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
        return
    cache = report["kv_cache_tokens"]
    held = "not reported" if cache is None else f"{cache:,} tokens, {report['kv_cache_concurrency']} longest requests"
    ranks = "as the layout's vllm order" if report["ranks_agree"] else f"NOT as the layout: {report['ranks']}"
    output.show(Text(f"ready at {report['url']}"))
    output.show(Text(f"world size {report['world_size']}, ranks {ranks}; KV cache {held}"))
    output.show(Text("interrupt (Ctrl-C) to stop it with all its processes"))


__all__ = ["exported", "report_of", "serve", "show_failure", "stopping", "waiting_line"]

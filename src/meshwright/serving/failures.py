"""Why vLLM did not start, in words: known causes with their remedies, and the lines of the log that say so.

In: the text of the log. Out: a `Failure`. A cause that is not known is told by the last error lines as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MOST_LINES = 8


@dataclass(frozen=True)
class Failure:
    cause: str
    remedy: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Known:
    pattern: str
    cause: str
    remedy: str


KNOWN = (
    _Known(
        r"No available memory for the cache blocks|KV cache is needed, which is larger than the available",
        "the KV cache has no room for one request of the longest length",
        "lower max_len in the plan, use more tp or pp, or raise --gpu-memory-utilization; on CPU raise "
        "VLLM_CPU_KVCACHE_SPACE",
    ),
    _Known(
        r"Free memory on device .* is less than desired GPU memory utilization",
        "another process holds memory of the GPU",
        "stop it, or lower --gpu-memory-utilization",
    ),
    _Known(
        r"CUDA out of memory|OutOfMemoryError|Cannot allocate memory|can't allocate memory",
        "memory ran out while the model was loaded",
        "use more tp or pp, or a smaller weight format: meshwright plan says which fits",
    ),
    _Known(
        r"must be divisible by tensor parallel size",
        "tp does not divide the attention heads",
        "use a tp that does: meshwright estimate names them",
    ),
    _Known(
        r"assert intermediate_tensors is not None",
        "a later pipeline stage of the CPU build runs without compilation",
        f'serve with --cpu, which gives --compilation-config {"{"}"mode": 2, "backend": "eager"{"}"}',
    ),
    _Known(
        r"No valid auto binding|not enough .*CPUs? .*bind|cpu_ids.*less than|local_world_size.*omp",
        "the CPU build found too few cores to bind its workers to",
        "set VLLM_CPU_OMP_THREADS_BIND=nobind (serve --cpu does)",
    ),
    _Known(
        r"Address already in use|EADDRINUSE",
        "the port is taken",
        "give another --port",
    ),
    _Known(
        r"No such file or directory: .*config\.json|Can't load the configuration|not a valid model identifier|"
        r"LocalEntryNotFoundError|Invalid repository ID or local directory|couldn't connect to 'https://huggingface",
        "the model's files were not found",
        "give --weights FOLDER with config.json and safetensors",
    ),
    _Known(
        r"PackageNotFoundError|No package metadata was found for",
        "vLLM's command does not find its own package metadata",
        "install vllm, or for vllm-cpu add a dist-info named vllm (docs/serving.md)",
    ),
    _Known(
        r"does not recognize this architecture|are not supported for now|no vLLM implementation",
        "this vLLM does not know the model's architecture",
        "use a newer vLLM, or generate with meshwright generate",
    ),
    _Known(
        r"unrecognized arguments|invalid choice",
        "this vLLM does not take an argument of the plan",
        "meshwright writes arguments of vLLM 0.32; compare `vllm --version`",
    ),
)
ERROR = re.compile(r"\bERROR\b|Error:|Exception:|Traceback|error:|Killed|Segmentation fault")


def explain(log: str) -> Failure:
    """The first known cause in the log, or its last errors."""
    lines = log.splitlines()
    for known in KNOWN:
        pattern = re.compile(known.pattern)
        hits = [line.strip() for line in lines if pattern.search(line)]
        if hits:
            return Failure(known.cause, known.remedy, tuple(hits[:3]))
    errors = [line.strip() for line in lines if ERROR.search(line)]
    shown = errors[-MOST_LINES:] or [line.strip() for line in lines if line.strip()][-MOST_LINES:]
    return Failure("the cause is not one that is known here", "read the log's lines below", tuple(shown))

"""What a training step did, as numbers: one JSON line per step for people, plots and the doctor.

In: a step's result and its wall time, on every rank. Out: `StepMetrics`, written by rank 0 to metrics.jsonl (`kind`:
run, step, ledger) and, where asked for, to TensorBoard.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from meshwright.errors import InputError
from meshwright.files import write_text
from meshwright.ledger import TrafficEntry
from meshwright.runtime.expert_parallel.load import RouterLoad

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Peak:
    """What model FLOP/s are measured against: dense peak of one device, FLOPs per token of forward and backward."""

    device_type: str
    flops_per_s: float
    model_flops_per_token: float


@dataclass(frozen=True)
class StepMetrics:
    """One step. `step` counts done steps; `loss` is the mean over the global batch; `skipped`: fp16 overflow.

    `axis_wait_s`: how long rank 0's host was inside collectives of each axis (on GPUs: until they were enqueued).
    `peak_memory_bytes`: of rank 0 since its start; on the CPU the resident set of the process. `router_load`: of models
    with experts.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    sequences: int
    step_s: float
    tokens_per_s: float
    tokens_per_s_per_rank: float
    mfu: float | None
    axis_wait_s: dict[str, float]
    peak_memory_bytes: int
    loss_scale: float | None = None
    skipped: bool = False
    router_load: RouterLoad | None = None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has used: allocated by torch on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def mfu(tokens_per_s_per_rank: float, device: torch.device, peak: Peak | None) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B), None where the device's peak is not known."""
    if peak is None or peak.device_type != device.type:
        return None
    return tokens_per_s_per_rank * peak.model_flops_per_token / peak.flops_per_s


def refuse_missing_tensorboard() -> None:
    if find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs a package that is not installed: pip install tensorboard")


class MetricsWriter:
    """Appends lines to metrics.jsonl; a run that resumes at a step drops the lines of later steps first."""

    def __init__(self, folder: Path, resumed_at: int, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        kept = _lines_until(path, resumed_at) if resumed_at and path.is_file() else []
        write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(folder) if tensorboard else None

    def run(self, description: dict[str, Any]) -> None:
        self._line({"kind": "run"} | description)

    def step(self, metrics: StepMetrics) -> None:
        self._line({"kind": "step"} | asdict(metrics))
        if self._board is not None:
            for name in ("loss", "gradient_norm", "learning_rate", "tokens_per_s", "step_s"):
                self._board.add_scalar(name, getattr(metrics, name), metrics.step)

    def ledger(self, step: int, rank: int, stage: int, traffic: tuple[TrafficEntry, ...], memory_bytes: int) -> None:
        lines = [asdict(entry) for entry in traffic]
        line = {"kind": "ledger", "step": step, "rank": rank, "stage": stage, "peak_memory_bytes": memory_bytes}
        self._line(line | {"traffic": lines})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _line(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(values)) + "\n")
        self._file.flush()


def _finite(value: Any) -> Any:
    """JSON has no infinities: they become text."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def _lines_until(path: Path, step: int) -> list[str]:
    """Whole lines of what happened up to a step. A line that a crash cut off is dropped."""
    kept: list[str] = []
    for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and line.endswith("\n") and values.get("step", 0) <= step:
            kept.append(line)
    return kept


def _board(folder: Path) -> Any:
    refuse_missing_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))

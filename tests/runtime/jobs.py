"""A training job over a tiny model and random bytes, for tests of trainer and checkpoints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.plan import ModelSection, Plan, TrainingRun, TrainingWorkload
from meshwright.runtime.tokens import prepare
from meshwright.runtime.trainer import RankOutcome, TrainingJob, train_forked

from .tiny import tiny

SEQ = 16
VOCABULARY = 260
BATCH = 8


def text(folder: Path, length: int = 6000) -> Path:
    """A file of words drawn from few: there is something to learn."""
    file = folder / "text.txt"
    if not file.exists():
        words = ["shard", "mesh", "rank", "tensor", "pipeline", "stage", "loss", "and", "of", "the"]
        drawn = random.Random(3)
        file.write_text(" ".join(drawn.choice(words) for _ in range(length // 5)))
    return file


def plan(model: Any, steps: int, precision: Precision = Precision.FP32, **layout: Any) -> Plan:
    run = {"learning_rate": 1e-2} | layout.pop("training", {})
    return Plan.from_parts(
        ModelSection(name="tiny", config=model.to_dict()),
        HybridParallelConfig(**({"global_batch": BATCH, "precision": precision} | layout)),
        TrainingWorkload(seq=SEQ),
        training=TrainingRun(steps=steps, **run),
    )


def job(
    folder: Path, name: str, steps: int, layout: dict[str, Any], model: Any | None = None, **options: Any
) -> TrainingJob:
    """A job whose files are in folder/name. `options` are TrainingJob's."""
    chosen = model or tiny(vocab=VOCABULARY)
    return TrainingJob(
        plan(chosen, steps, **layout),
        chosen,
        prepare(text(folder), "bytes", folder / "tokens"),
        folder / name,
        show_progress=False,
        **options,
    )


def run(folder: Path, name: str, steps: int, layout: dict[str, Any], **options: Any) -> RankOutcome:
    """Train and return rank 0's outcome."""
    return train_forked(job(folder, name, steps, layout, **options))[0]

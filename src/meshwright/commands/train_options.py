"""The options of `meshwright train`, as typer takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PlanFile = Annotated[str, typer.Argument(metavar="PLAN", help="A plan file whose workload is training.")]
Data = Annotated[Path, typer.Option("--data", help="A text file, or a folder of text files.")]
TokenizerName = Annotated[
    str, typer.Option("--tokenizer", help="'bytes', or a tokenizer.json or its folder.", metavar="bytes|PATH")
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, metavar="N", help="Instead of the plan's training.steps.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; default runs/<name of the plan>.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint, on any layout.")]
ResumeFrom = Annotated[Path | None, typer.Option("--resume-from", help="Go on from this checkpoint.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="Start from safetensors in this folder.")]
Every = Annotated[
    int | None, typer.Option("--checkpoint-every", min=1, metavar="N", help="Steps; default: only at the end.")
]
Keep = Annotated[int, typer.Option("--keep", min=1, metavar="N", help="Checkpoints that stay.")]
Export = Annotated[bool, typer.Option("--export", help="Write the trained model as safetensors for transformers.")]
Board = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard files.")]
Watchdog = Annotated[
    float | None,
    typer.Option(
        "--watchdog",
        min=1,
        metavar="SECONDS",
        help="End the job, with a verdict, when a rank waits longer than this in one collective.",
    ),
]
PreflightFlag = Annotated[
    bool,
    typer.Option("--preflight", help="First check that all ranks come, are alike, and reach each other."),
]
Replan = Annotated[
    bool,
    typer.Option("--replan", help="Where torchrun started another number of ranks: choose their layout, and resume."),
]
LedgerFlag = Annotated[bool, typer.Option("--ledger", help="Show what a step sent beside what was predicted.")]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", help="Record one step's timeline, and write it as a Chrome trace.", metavar="FILE"),
]
TraceStep = Annotated[
    int | None, typer.Option("--trace-step", min=1, metavar="N", help="Which step; default: the third done here.")
]

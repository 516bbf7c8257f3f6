"""`meshwright train`: run a plan on text - ranks forked on this machine's CPU, or joined from torchrun's environment.

In: a plan file and a path of text. Out: metrics, checkpoints and (where asked for) safetensors in the run's folder;
exit code 1 where the loss left the numbers or the recorded ledger is not the predicted one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.commands.doctor_hang import say_verdict
from meshwright.commands.options import Json
from meshwright.commands.runtime_room import needs_runtime
from meshwright.commands.train_options import (
    Board,
    Data,
    Every,
    Export,
    Keep,
    LedgerFlag,
    Out,
    PlanFile,
    PreflightFlag,
    Replan,
    Resume,
    ResumeFrom,
    Steps,
    TokenizerName,
    Trace,
    TraceStep,
    Watchdog,
    Weights,
)
from meshwright.commands.train_report import compare_with_prediction, ledger_lines, show, written_trace
from meshwright.commands.train_run import (
    checked_start,
    checkpoint_to_start_from,
    needs_of,
    peak_of,
    plan_for_the_ranks_left,
    read_training_plan,
    train_as_one_rank,
    train_forked_ranks,
)
from meshwright.errors import InputError

if TYPE_CHECKING:
    from meshwright.runtime.trainer import TrainingJob


def train(
    plan: PlanFile,
    data: Data,
    tokenizer: TokenizerName = "bytes",
    steps: Steps = None,
    out: Out = None,
    resume: Resume = False,
    resume_from: ResumeFrom = None,
    weights: Weights = None,
    checkpoint_every: Every = None,
    keep: Keep = 2,
    export: Export = False,
    tensorboard: Board = False,
    ledger: LedgerFlag = False,
    trace: Trace = None,
    trace_step: TraceStep = None,
    watchdog: Watchdog = None,
    preflight: PreflightFlag = False,
    replan: Replan = False,
    as_json: Json = False,
) -> int:
    """Train a plan's model on text, over all its axes at once.

    Forks the ranks on this machine's CPU, or is one of them under torchrun. The folder of the run gets metrics.jsonl,
    checkpoints that any layout can resume, and with --export a model that transformers loads.
    """
    needs_runtime("train")
    if trace_step is not None and trace is None:
        raise InputError("--trace-step says which step --trace records; give --trace FILE too")
    document = read_training_plan(plan, steps)
    folder = out or Path("runs") / Path(plan).stem
    start = checkpoint_to_start_from(folder, resume or replan, resume_from, weights)
    if replan:
        document = plan_for_the_ranks_left(document, start)
    if tensorboard:
        from meshwright.runtime.metrics import refuse_missing_tensorboard

        refuse_missing_tensorboard()

    needs = needs_of(document) if preflight else None

    def job(tokens: Path) -> TrainingJob:
        from meshwright.runtime.model_config import transformers_config
        from meshwright.runtime.trainer import TrainingJob

        return TrainingJob(
            plan=document,
            model_config=transformers_config(document),
            tokens=tokens,
            out=folder,
            checkpoint_every=checkpoint_every,
            keep=keep,
            resume=start,
            weights=weights if start is None else None,
            export=export,
            tensorboard=tensorboard,
            peak=peak_of(document),
            preflight=needs,
            watchdog_s=watchdog,
            on_hang=say_verdict,
            trace=trace is not None,
            trace_step=trace_step,
        )

    from meshwright.runtime.launch import launched_by_torchrun

    if launched_by_torchrun():
        outcomes = train_as_one_rank(
            job, data, tokenizer, folder, None if needs is None else partial(checked_start, document, needs)
        )
    else:
        outcomes = train_forked_ranks(job, data, tokenizer, folder)
    if outcomes is None:
        return 0
    lines = ledger_lines(document, outcomes) if ledger else None
    timelines = None if trace is None else written_trace(outcomes, trace)
    show(outcomes, lines, compare_with_prediction(document, folder), folder, timelines, as_json)
    disagrees = lines is not None and not all(line.agrees for line in lines)
    return 1 if disagrees or outcomes[0].diverged_at is not None else 0

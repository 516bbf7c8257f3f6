"""`meshwright train`: run a plan on text - ranks forked on this machine's CPU, or joined from torchrun's environment.

In: a plan file and a path of text. Out: metrics, checkpoints and (where asked for) safetensors in the run's folder;
exit code 1 where the loss left the numbers or the recorded ledger is not the predicted one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from meshwright.commands import output
from meshwright.commands.doctor_hang import say_verdict
from meshwright.commands.options import Json
from meshwright.commands.runtime_room import needs_runtime
from meshwright.errors import InputError
from meshwright.plan import Plan, TrainingRun, TrainingWorkload
from meshwright.report.doctor_tables import comparison_table
from meshwright.report.json_documents import dumps
from meshwright.report.ledger_tables import LedgerLine, compare_ledgers, ledger_table
from meshwright.report.numbers import size, whole

if TYPE_CHECKING:
    from meshwright.doctor.comparison import Comparison
    from meshwright.runtime.launch import Device
    from meshwright.runtime.metrics import Peak
    from meshwright.runtime.preflight import Needs
    from meshwright.runtime.trainer import RankOutcome, TrainingJob

MOST_FORKED_RANKS = 64
SHOWN_LOSSES = 10

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
    document = read_training_plan(plan, steps)
    folder = out or Path("runs") / Path(plan).stem
    start = _start(folder, resume or replan, resume_from, weights)
    if replan:
        document = _for_the_ranks_left(document, start)
    if tensorboard:
        from meshwright.runtime.metrics import refuse_missing_tensorboard

        refuse_missing_tensorboard()

    needs = _needs(document) if preflight else None

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
            peak=_peak(document),
            preflight=needs,
            watchdog_s=watchdog,
            on_hang=say_verdict,
        )

    from meshwright.runtime.launch import launched_by_torchrun

    if launched_by_torchrun():
        outcomes = _joined(
            job, data, tokenizer, folder, None if needs is None else partial(_preflight, document, needs)
        )
    else:
        outcomes = _forked(job, data, tokenizer, folder)
    if outcomes is None:
        return 0
    lines = _ledger_lines(document, outcomes) if ledger else None
    _show(outcomes, lines, _comparison(document, folder), folder, as_json)
    disagrees = lines is not None and not all(line.agrees for line in lines)
    return 1 if disagrees or outcomes[0].diverged_at is not None else 0


def read_training_plan(path: str, steps: int | None) -> Plan:
    """The plan with a complete training section, or an InputError where it is not for training."""
    document = Plan.read(path)
    if not isinstance(document.workload, TrainingWorkload):
        raise InputError(f"{path}: a plan for serving; train needs one whose workload is training")
    run = document.training or TrainingRun()
    if steps is not None:
        run = run.model_copy(update={"steps": steps})
    return document.model_copy(update={"training": run})


def _for_the_ranks_left(plan: Plan, start: Path | None) -> Plan:
    """The plan for the world that torchrun started; a line on stderr where that is another one."""
    from meshwright.commands.replan import replanned
    from meshwright.runtime.launch import launched_by_torchrun

    if not launched_by_torchrun():
        raise InputError("--replan takes the number of ranks from torchrun: start the command with torchrun")
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks == plan.parallel.world_size:
        return plan
    chosen, line = replanned(plan, ranks)
    if os.environ["RANK"] == "0":
        print(f"replan: {line}; from {start.name if start else 'the first step'}", file=sys.stderr)
    return chosen


def _start(folder: Path, resume: bool, resume_from: Path | None, weights: Path | None) -> Path | None:
    """The checkpoint to go on from, if any. A folder with a run in it is not overwritten unasked."""
    from meshwright.runtime import checkpoint
    from meshwright.runtime.trainer import CHECKPOINTS

    if resume_from is not None:
        if weights is not None:
            raise InputError("--resume-from and --weights both say where to start; give one")
        checkpoint.read_progress(resume_from)
        return resume_from
    found = checkpoint.complete(folder / CHECKPOINTS)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # torchrun restarts failed ranks
    if found and not (resume or restarted):
        raise InputError(f"{folder} holds a run with {found[-1].name} already; add --resume, or give another --out")
    return found[-1] if found else None


def _peak(plan: Plan) -> Peak | None:
    """What MFU is measured against, where the plan names a cluster."""
    if plan.cluster is None or not isinstance(plan.workload, TrainingWorkload):
        return None
    from meshwright.cost.device import peak_flops
    from meshwright.models.flops import model_flops_per_token
    from meshwright.runtime.metrics import Peak

    accelerator = plan.load_cluster().accelerator
    device = "cpu" if accelerator.architecture == "cpu" else "cuda"
    flops = float(model_flops_per_token(plan.load_model(), plan.workload.seq))
    return Peak(device, peak_flops(accelerator, plan.parallel.precision), flops)


def _forked(job: Any, data: Path, tokenizer: str, folder: Path) -> list[RankOutcome] | None:
    """All ranks on this machine's CPU. The text is tokenised before they start."""
    from meshwright.runtime.launch import RankFailedError, gpus_here
    from meshwright.runtime.tokens import prepare
    from meshwright.runtime.trainer import TOKENS, train_forked
    from meshwright.runtime.watchdog import HUNG

    gpus = gpus_here()
    if gpus:
        raise InputError(
            f"this machine has {gpus} GPUs: start a rank on each with torchrun --nproc-per-node {gpus} -m meshwright "
            "train ..., or hide them (CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    made = job(prepare(data, tokenizer, folder / TOKENS))
    ranks = made.plan.parallel.world_size
    if ranks > MOST_FORKED_RANKS:
        raise InputError(
            f"the plan has {ranks} ranks, more than the {MOST_FORKED_RANKS} that are forked on one machine; start it "
            f"with torchrun on {ranks} devices"
        )
    try:
        return train_forked(made)
    except RankFailedError as error:
        print(f"meshwright: {error}{_how_to_go_on(folder)}", file=sys.stderr)
        if error.exit_code != HUNG:  # the rank that noticed has said it
            say_verdict(folder)
        raise typer.Exit(1) from None


def _how_to_go_on(folder: Path) -> str:
    from meshwright.runtime import checkpoint
    from meshwright.runtime.trainer import CHECKPOINTS

    found = checkpoint.complete(folder / CHECKPOINTS)
    return f"; {found[-1].name} is complete: go on from it with --resume" if found else "; no checkpoint is complete"


def _needs(plan: Plan) -> Needs:
    """What the start-up check holds against what it finds: the fullest stage by the cost model, torchrun's port."""
    from meshwright.cost.evaluate import estimate
    from meshwright.doctor.oom import question_of
    from meshwright.hardware import load
    from meshwright.runtime.preflight import Needs

    cluster = load("cpu", nodes=1, gpus_per_node=plan.parallel.world_size) if plan.cluster is None else None
    asked = question_of(plan, cluster, ours=True)
    predicted = estimate(asked.model, asked.cluster, asked.workload, asked.config, asked.stack)
    port = os.environ.get("MASTER_PORT")
    needed = max(0, predicted.memory.peak.total_bytes - asked.cluster.reserved_bytes)
    return Needs(needed, master_port=None if port is None else int(port))


def _preflight(plan: Plan, needs: Needs, device: Device, join: Callable[[], None]) -> None:
    """The start-up check of a rank of torchrun's, around joining the world. A rank that is stuck in a group cannot
    leave in any other way than at once."""
    from meshwright.runtime.preflight import StuckError, check_start, env_store

    ranks = int(os.environ["WORLD_SIZE"])
    if ranks != plan.parallel.world_size:
        raise InputError(f"the plan needs {plan.parallel.world_size} ranks, but {ranks} were started (see --replan)")
    try:
        check_start(plan, needs, device, env_store(needs.limit_s), int(os.environ["RANK"]), join)
    except StuckError as error:
        print(f"meshwright: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def _joined(
    job: Any, data: Path, tokenizer: str, folder: Path, around: Callable[[Device, Callable[[], None]], None] | None
) -> list[RankOutcome] | None:
    """This process as one rank of torchrun's world; outcomes on rank 0 only. One rank of each machine tokenises."""
    from meshwright.runtime.launch import joined_world, on_each_machine_first
    from meshwright.runtime.tokens import prepare
    from meshwright.runtime.trainer import TOKENS, train_joined

    with joined_world(around=around) as device:
        tokens = on_each_machine_first(lambda: prepare(data, tokenizer, folder / TOKENS))
        outcomes = train_joined(job(tokens), device)
    return outcomes if int(os.environ["RANK"]) == 0 else None


def _ledger_lines(plan: Plan, outcomes: Sequence[RankOutcome]) -> list[LedgerLine]:
    """The last step's ledgers of all ranks beside the closed form's."""
    from meshwright.cost.from_plan import workload_of
    from meshwright.cost.traffic import RankPlace, rank_ledger

    assert isinstance(plan.workload, TrainingWorkload)
    model, workload = plan.load_model(), workload_of(plan.workload)
    places = {(o.stage, RankPlace(o.tp_rank, o.shard)) for o in outcomes}
    predicted = {place: rank_ledger(model, workload, plan.parallel, *place) for place in places}
    ranks = [(o.stage, o.ledger, predicted[o.stage, RankPlace(o.tp_rank, o.shard)]) for o in outcomes]
    return compare_ledgers(ranks)


def _comparison(plan: Plan, folder: Path) -> Comparison | None:
    """Predicted beside measured, where the plan names the machine that it ran on; left in the folder too."""
    if plan.cluster is None:
        return None
    from meshwright.doctor.comparison import COMPARISON_FILE, compare_run
    from meshwright.doctor.oom import question_of
    from meshwright.doctor.run_records import read_run
    from meshwright.files import write_text

    compared = compare_run(read_run(folder), question_of(plan, None, ours=True))
    if compared is not None:
        write_text(folder / COMPARISON_FILE, dumps(compared.document()) + "\n")
    return compared


def _show(
    outcomes: Sequence[RankOutcome],
    lines: list[LedgerLine] | None,
    compared: Comparison | None,
    folder: Path,
    as_json: bool,
) -> None:
    first = outcomes[0]
    if as_json:
        output.show_json(train_document(outcomes, lines, folder, compared))
        return
    parts: list[RenderableType] = [Text(_losses(first)), Text(_summary(outcomes, folder))]
    if lines is not None:
        wrong = sum(not line.agrees for line in lines)
        verdict = "equal: calls and bytes, every axis, every rank" if not wrong else f"{wrong} lines DIFFER"
        text = f"what a rank of each stage sent in the last step; predicted and recorded are {verdict}"
        parts += [Text(""), ledger_table(lines), Text(text, style="" if not wrong else "bold red")]
    if compared is not None:
        parts += [Text(""), comparison_table(compared)]
    output.show(Group(*parts))


def train_document(
    outcomes: Sequence[RankOutcome], lines: list[LedgerLine] | None, folder: Path, compared: Comparison | None = None
) -> dict[str, Any]:
    """The JSON of `meshwright train --json`."""
    first = outcomes[0]
    document: dict[str, Any] = {
        "ranks": len(outcomes),
        "first_step": first.first_step,
        "losses": list(first.losses),
        "diverged_at": first.diverged_at,
        "tokens_per_s": first.tokens_per_s,
        "peak_memory_bytes": max(o.peak_memory_bytes for o in outcomes),
        "checkpoint": None if first.checkpoint is None else str(first.checkpoint),
        "out": str(folder),
    }
    if compared is not None:
        document["comparison"] = compared.document()
    if lines is not None:
        document["ledger"] = {
            "agrees": all(line.agrees for line in lines),
            "lines": [
                {
                    "stage": line.stage,
                    **dict(zip(("axis", "phase", "collective", "what", "ranks"), line.line, strict=True)),
                    "recorded": {"calls": line.recorded[0], "bytes": line.recorded[1]},
                    "predicted": {"calls": line.predicted[0], "bytes": line.predicted[1]},
                }
                for line in lines
            ],
        }
    return document


def _losses(outcome: RankOutcome) -> str:
    """'step 1  5.5972' for about ten steps, the first and the last among them."""
    count = len(outcome.losses)
    shown = sorted({round(i * (count - 1) / (SHOWN_LOSSES - 1)) for i in range(SHOWN_LOSSES)}) if count > 1 else [0]
    return "\n".join(f"step {outcome.first_step + i + 1:>6}  loss {outcome.losses[i]:.4f}" for i in shown)


def _summary(outcomes: Sequence[RankOutcome], folder: Path) -> str:
    first = outcomes[0]
    if first.diverged_at is not None:
        return (
            f"the loss of step {first.diverged_at} is not finite: stopped; lower the learning rate, or clip gradients"
        )
    memory = size(max(o.peak_memory_bytes for o in outcomes))
    return (
        f"{len(first.losses)} steps on {len(outcomes)} ranks, {whole(first.tokens_per_s)} tokens/s, at most {memory} "
        f"per rank; metrics and {first.checkpoint.name if first.checkpoint else 'no checkpoint'} are in {folder}"
    )

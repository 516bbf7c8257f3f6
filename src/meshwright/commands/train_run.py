"""How `meshwright train` starts a job: from which checkpoint, with which plan, and where its ranks come from.

In: the plan and where its run lies. Out: the outcomes of all ranks, forked on this machine's CPU or, on rank 0 only,
those of torchrun's world.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from meshwright.commands.doctor_hang import say_verdict
from meshwright.errors import InputError
from meshwright.plan import Plan, TrainingRun, TrainingWorkload

if TYPE_CHECKING:
    from meshwright.runtime.launch import Device
    from meshwright.runtime.metrics import Peak
    from meshwright.runtime.preflight import Needs
    from meshwright.runtime.trainer import RankOutcome, TrainingJob

    MakeJob = Callable[[Path], TrainingJob]
    """Of the file of tokens."""

MOST_FORKED_RANKS = 64


def read_training_plan(path: str, steps: int | None) -> Plan:
    """The plan with a complete training section, or an InputError where it is not for training."""
    document = Plan.read(path)
    if not isinstance(document.workload, TrainingWorkload):
        raise InputError(f"{path}: a plan for serving; train needs one whose workload is training")
    run = document.training or TrainingRun()
    if steps is not None:
        run = run.model_copy(update={"steps": steps})
    return document.model_copy(update={"training": run})


def plan_for_the_ranks_left(plan: Plan, start: Path | None) -> Plan:
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


def checkpoint_to_start_from(folder: Path, resume: bool, resume_from: Path | None, weights: Path | None) -> Path | None:
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


def peak_of(plan: Plan) -> Peak | None:
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


def train_forked_ranks(job: MakeJob, data: Path, tokenizer: str, folder: Path) -> list[RankOutcome] | None:
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


def needs_of(plan: Plan) -> Needs:
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


def checked_start(plan: Plan, needs: Needs, device: Device, join: Callable[[], None]) -> None:
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


def train_as_one_rank(
    job: MakeJob,
    data: Path,
    tokenizer: str,
    folder: Path,
    around: Callable[[Device, Callable[[], None]], None] | None,
) -> list[RankOutcome] | None:
    """This process as one rank of torchrun's world; outcomes on rank 0 only. One rank of each machine tokenises."""
    from meshwright.runtime.launch import joined_world, on_each_machine_first
    from meshwright.runtime.tokens import prepare
    from meshwright.runtime.trainer import TOKENS, train_joined

    with joined_world(around=around) as device:
        tokens = on_each_machine_first(lambda: prepare(data, tokenizer, folder / TOKENS))
        outcomes = train_joined(job(tokens), device)
    return outcomes if int(os.environ["RANK"]) == 0 else None

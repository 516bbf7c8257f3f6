"""Run the matrix: every kind of fault at random ranks and steps, each in a training job of 2 x 2 x 2 forked ranks.

Prints one line per run - verdict, whether it names the right rank, axis and action, seconds after the watchdog's limit,
checkpoints before and after - and exits 1 where one is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tools.faults.partition import RANKS_EACH, run_partition
from tools.faults.plant import EXPECTED, KINDS, Fault, complete_when_it_went_off, planted
from tools.two_machines import reason_to_skip

from meshwright.doctor.hang import Cause, Verdict, diagnose_hang
from meshwright.errors import InputError
from meshwright.flight import FLIGHT_FOLDER, read_folder
from meshwright.plan import Plan, TrainingRun
from meshwright.runtime import checkpoint
from meshwright.runtime.launch import RankFailedError
from meshwright.runtime.model_config import transformers_config
from meshwright.runtime.tokens import prepare
from meshwright.runtime.trainer import CHECKPOINTS, TrainingJob, train_forked

PLAN, DATA = Path("examples/tiny-llama-2x2x2.yaml"), Path("docs")
STEPS, EVERY = 6, 2
WATCHDOG_S = 5.0
MARGIN_S = 10.0
"""After the watchdog's limit, until the job is over."""
AXES = {
    "partition": ("dp",),
    **dict.fromkeys(("skip", "swap", "size", "dtype"), ("tp",)),
    **dict.fromkeys(("sigkill", "sigstop", "sleep"), ("tp", "pp", "dp")),
}
ACTIONS = {
    **dict.fromkeys(("sigkill", "sigstop", "sleep", "memory"), "forward pass"),
    **dict.fromkeys(("skip", "swap", "size", "dtype"), "forward pass"),
    "disk": "checkpoint",
    "partition": "pass of chunk",  # the gather of parameters or the reduction of gradients, as far as ranks had come
}


def make_job(folder: Path, steps: int = STEPS, resume: Path | None = None) -> TrainingJob:
    plan = Plan.read(str(PLAN))
    run = (plan.training or TrainingRun()).model_copy(update={"steps": steps})
    document = plan.model_copy(update={"training": run})
    return TrainingJob(
        plan=document,
        model_config=transformers_config(document),
        tokens=prepare(DATA, "bytes", folder.parent / "tokens"),
        out=folder,
        checkpoint_every=EVERY,
        keep=10,
        resume=resume,
        show_progress=False,
        watchdog_s=WATCHDOG_S,
    )


def run_fault(fault: Fault, folder: Path) -> tuple[Verdict, float, list[str]]:
    """The verdict on a job with a fault, how many seconds the job lived after the last event in any log, and what else
    was wrong."""
    if fault.kind == "partition":
        options = [
            "--steps",
            str(STEPS),
            "--checkpoint-every",
            str(EVERY),
            "--keep",
            "10",
            "--watchdog",
            f"{WATCHDOG_S:g}",
        ]
        return run_partition(fault, folder, ["train", str(PLAN), "--data", str(DATA), "--out", str(folder), *options])
    job = make_job(folder)
    with open(os.devnull, "w") as quiet, _stderr_to(quiet.fileno()), planted(fault, folder):
        try:
            train_forked(job)
        except RankFailedError:
            pass
        except InputError as error:
            if not (folder / FLIGHT_FOLDER).exists():  # refused at the start: nothing has flown yet
                ranks = tuple(int(r) for r in re.findall(r"\d+", str(error).split("was started")[0]))
                return Verdict(Cause.PLAN, ranks, str(error)), 0.0, []
        ended = time.time_ns()
    last = max(log.now.updated_ns for log in read_folder(folder / FLIGHT_FOLDER))
    return diagnose_hang(folder), (ended - last) / 1e9, []


@contextlib.contextmanager
def _stderr_to(descriptor: int):
    """What ranks complain about is expected here."""
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def wrong_with(fault: Fault, verdict: Verdict, after_s: float) -> list[str]:
    """What of a verdict is not as planted."""
    wrong: list[str] = []
    if verdict.cause not in EXPECTED[fault.kind]:
        wrong.append(f"cause {verdict.cause}")
    if fault.kind == "partition":  # no rank is to blame, but the cable between two that share a dp group
        if {rank % RANKS_EACH for rank in verdict.ranks} != {verdict.ranks[0] % RANKS_EACH} or len(verdict.ranks) != 2:
            wrong.append(f"ranks {verdict.ranks}")
        if not re.search(r"between (\S+)#0 and \1#1", verdict.sentence):
            wrong.append("hosts")
    elif verdict.ranks[:1] != (fault.rank,):
        wrong.append(f"rank {verdict.ranks}")
    if fault.kind in AXES and verdict.axis not in AXES[fault.kind]:
        wrong.append(f"axis {verdict.axis}")
    if fault.kind in ACTIONS and ACTIONS[fault.kind] not in (verdict.action or ""):
        wrong.append(f"action {verdict.action}")
    if after_s > WATCHDOG_S + MARGIN_S:
        wrong.append(f"{after_s:.0f} s")
    return wrong


def checkpoints_of(folder: Path) -> set[str]:
    """Names of the complete checkpoints, each of which must be readable."""
    found = checkpoint.complete(folder / CHECKPOINTS)
    for path in found:
        checkpoint.read_progress(path)
    return {path.name for path in found}


def resumed(folder: Path) -> list[str]:
    """Go on from the last complete checkpoint to the job's end; what is wrong with it."""
    saved = checkpoint.complete(folder / CHECKPOINTS)
    last = checkpoint.read_progress(saved[-1]).step
    outcomes = train_forked(make_job(folder, resume=saved[-1]))
    wrong = [] if outcomes[0].first_step == last else [f"resumed from {outcomes[0].first_step}, not {last}"]
    lost = {path.name for path in saved} - checkpoints_of(folder)
    return wrong + ([f"lost {sorted(lost)} by resuming"] if lost else [])


def run_one(fault: Fault, folder: Path, resume: bool) -> tuple[list[str], str]:
    """What was wrong with a run, and what to print of it."""
    started = time.monotonic()
    verdict, after_s, wrong = run_fault(fault, folder)
    took = time.monotonic() - started
    wrong += wrong_with(fault, verdict, after_s)
    lost = complete_when_it_went_off(folder) - checkpoints_of(folder)
    if lost:
        wrong.append(f"lost {sorted(lost)}")
    again = ""
    if resume and checkpoints_of(folder) and fault.kind != "slow":  # a slow rank's job has ended
        wrong += resumed(folder)
        again = ", resumed to its end"
    said = f"WRONG {'; '.join(wrong)}" if wrong else "right"
    times = f"{after_s:.1f} s after the last event, {took:.0f} s in all"
    line = f"{fault.kind:<9} rank {fault.rank} step {fault.step}  {said}  ({times}; "
    return (
        wrong,
        f"{line}{len(checkpoints_of(folder))} checkpoints{again})\n      {verdict.cause}: {verdict.sentence[:400]}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--first", type=int, default=0, help="number of the first run: a long matrix in parts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--resume-every", type=int, default=5, help="resume after every n-th run, to its last step")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    reason = reason_to_skip()
    if reason and "partition" in kinds:
        print(f"network partitions: left out, {reason}")
        kinds.remove("partition")
    base = Path(tempfile.mkdtemp(prefix="meshwright-faults-"))
    failed = 0
    for number in range(options.first, options.first + options.runs):
        drawn = random.Random(f"{options.seed}-{number}")
        fault = Fault(kinds[number % len(kinds)], drawn.randrange(8), drawn.randrange(2, STEPS))
        folder = base / f"run-{number:03d}"
        wrong, line = run_one(fault, folder, resume=number % options.resume_every == 0)
        failed += bool(wrong)
        print(f"{number + 1:>3} {line}", flush=True)
        if not wrong:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{options.runs - failed} of {options.runs} verdicts right; watchdog {WATCHDOG_S:g} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

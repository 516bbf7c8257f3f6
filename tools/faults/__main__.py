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

from tools.faults.plant import EXPECTED, KINDS, Fault, planted

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
AXES = {
    **dict.fromkeys(("skip", "swap", "size", "dtype"), ("tp",)),
    **dict.fromkeys(("sigkill", "sigstop", "sleep"), ("tp", "pp", "dp")),
}
ACTIONS = {
    **dict.fromkeys(("sigkill", "sigstop", "sleep", "memory"), "forward pass"),
    **dict.fromkeys(("skip", "swap", "size", "dtype"), "forward pass"),
    "disk": "checkpoint",
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


def run_fault(fault: Fault, folder: Path) -> tuple[Verdict, float]:
    """The verdict on a job with a fault, and how many seconds the job lived after the fault's last sign of life."""
    job = make_job(folder)
    with open(os.devnull, "w") as quiet, _stderr_to(quiet.fileno()), planted(fault):
        try:
            train_forked(job)
        except RankFailedError:
            pass
        except InputError as error:  # refused at the start: nothing has flown yet
            ranks = tuple(int(r) for r in re.findall(r"\d+", str(error).split("was started")[0]))
            return Verdict(Cause.PLAN, ranks, str(error)), 0.0
        ended = time.time_ns()
    last = max(log.now.updated_ns for log in read_folder(folder / FLIGHT_FOLDER))
    return diagnose_hang(folder), (ended - last) / 1e9


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
    if verdict.ranks[:1] != (fault.rank,):
        wrong.append(f"rank {verdict.ranks}")
    if fault.kind in AXES and verdict.axis not in AXES[fault.kind]:
        wrong.append(f"axis {verdict.axis}")
    if fault.kind in ACTIONS and ACTIONS[fault.kind] not in (verdict.action or ""):
        wrong.append(f"action {verdict.action}")
    if after_s > WATCHDOG_S + 10:
        wrong.append(f"{after_s:.0f} s")
    return wrong


def checkpoints_are_whole(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, each of which must be readable."""
    return [checkpoint.read_progress(p).step for p in checkpoint.complete(folder / CHECKPOINTS)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--resume-every", type=int, default=10, help="resume after every n-th run, to its last step")
    options = parser.parse_args()
    kinds, drawn = options.kinds.split(","), random.Random(options.seed)
    base = Path(tempfile.mkdtemp(prefix="meshwright-faults-"))
    failed = 0
    for number in range(options.runs):
        fault = Fault(kinds[number % len(kinds)], drawn.randrange(8), drawn.randrange(2, STEPS))
        folder = base / f"run-{number:03d}"
        started = time.monotonic()
        verdict, after_s = run_fault(fault, folder)
        took = time.monotonic() - started
        wrong = wrong_with(fault, verdict, after_s)
        saved = checkpoints_are_whole(folder)
        before = list(range(EVERY, fault.step, EVERY))
        if fault.kind not in ("plan",) and not set(before) <= set(saved):
            wrong.append(f"checkpoints {saved}, had {before}")
        if saved and saved[-1] < STEPS and number % options.resume_every == 0:
            train_forked(make_job(folder, resume=checkpoint.complete(folder / CHECKPOINTS)[-1]))
            saved = [*saved, *[s for s in checkpoints_are_whole(folder) if s not in saved]]
        failed += bool(wrong)
        said = f"WRONG {'; '.join(wrong)}" if wrong else "right"
        print(f"{number + 1:>3} {fault.kind:<8} rank {fault.rank} step {fault.step}  {said}  ", end="")
        print(f"({after_s:.1f} s after the last event, {took:.0f} s in all, checkpoints {saved})")
        print(f"      {verdict.cause}: {verdict.sentence[:400]}", flush=True)
        if not wrong:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{options.runs - failed} of {options.runs} verdicts right; watchdog {WATCHDOG_S:g} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

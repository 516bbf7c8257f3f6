"""`make survival`: a run that is killed again and again ends with the loss curve of an unbroken one.

Trains a tiny Llama by forked ranks; at random moments - while it starts, between steps, while a checkpoint is being
written - one rank gets SIGKILL. The command must end with one line and exit code 1, leave no rank behind, and go on
with --resume. Once on one layout (the losses must then be equal to the bit), once on a random other layout after every
kill.
Writes build/survival.json: seed, every kill, the difference of the curves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meshwright.layout import HybridParallelConfig
from meshwright.layout.config import Precision
from meshwright.plan import ModelSection, Plan, TrainingRun, TrainingWorkload

MOMENTS = ("start", "step", "checkpoint")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 pp2 dp2": {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True, "zero": 1},
    "pp4 dp2": {"pp": 4, "dp": 2, "zero": 2},
    "dp8": {"dp": 8, "zero": 3},
}
TOLERANCE = 1e-3
"""Relative, of a loss where layouts change: they add up in another order, and training carries that on."""
POLL_S = 0.002
PATIENCE_S = 600.0
MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: planned for a `moment`, it hit `rank` after `step` steps were in metrics.jsonl; `unfinished`: a
    checkpoint was being written."""

    layout: str
    moment: str
    rank: int
    step: int
    delay_s: float
    unfinished: bool


@dataclass(frozen=True)
class Job:
    """What is trained, and where."""

    folder: Path
    data: Path
    steps: int
    every: int
    layouts: dict[str, dict[str, Any]]
    global_batch: int = 8
    seq: int = 32

    def plan(self, layout: str) -> Path:
        file = self.folder / f"{layout.replace(' ', '-')}.yaml"
        config = HybridParallelConfig(global_batch=self.global_batch, precision=Precision.FP32, **self.layouts[layout])
        run = TrainingRun(steps=self.steps, learning_rate=3e-3, warmup_steps=3, seed=1)
        Plan.from_parts(
            ModelSection(name="tiny", config=MODEL), config, TrainingWorkload(seq=self.seq), training=run
        ).write(file)
        return file

    def start(self, layout: str, out: Path) -> subprocess.Popen[str]:
        options = ["--data", self.data, "--out", out, "--checkpoint-every", self.every, "--resume"]
        command = [sys.executable, "-m", "meshwright", "train", self.plan(layout), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )


def losses_of(out: Path) -> dict[int, float]:
    """Loss by step, as far as metrics.jsonl goes."""
    file = out / "metrics.jsonl"
    lines = (
        [line for line in file.read_text().splitlines() if line.startswith('{"kind": "step"')] if file.exists() else []
    )
    found: dict[int, float] = {}
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:  # being written
            continue
        found[values["step"]] = values["loss"]
    return found


def children(pid: int) -> list[int]:
    """Child processes in the order of their start: the ranks."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # has just ended
                continue
            if int(after_name[1]) == pid and after_name[0] != "Z":
                found.append(int(entry.name))
    return sorted(found)


def unfinished(out: Path) -> bool:
    return any((out / "checkpoints").glob(".step-*.incomplete"))


def wait_for(moment: str, process: subprocess.Popen[str], out: Path, drawn: random.Random, ranks: int) -> float:
    """Return at the chosen moment (or when the process has ended); the random delay that was added to it."""
    deadline = time.monotonic() + PATIENCE_S

    def until(condition: Any) -> None:
        while process.poll() is None and not condition():
            if time.monotonic() > deadline:
                sys.exit(f"survival: the run did not come to its {moment} in {PATIENCE_S:g} s")
            time.sleep(POLL_S)

    until(lambda: len(children(process.pid)) == ranks)
    steps = drawn.randint(1, 4)
    delay = drawn.uniform(0.0, {"start": 2.0, "step": 0.2, "checkpoint": 0.05}[moment])
    if moment != "start":
        before = max(losses_of(out), default=0)
        # a resumed run begins by dropping lines after its checkpoint: count from where it stands then
        until(lambda: max(losses_of(out), default=0) != before)
        target = max(losses_of(out), default=0) + steps - 1
        until(lambda: max(losses_of(out), default=0) >= target)
    if moment == "checkpoint":
        until(lambda: unfinished(out))
    time.sleep(delay)
    return delay


def kill_once(job: Job, layout: str, moment: str, out: Path, drawn: random.Random) -> Kill | None:
    """Start or resume the run and kill one rank; None where it finished first."""
    process = job.start(layout, out)
    config = job.layouts[layout]
    ranks = config.get("tp", 1) * config.get("pp", 1) * config.get("dp", 1)
    delay = wait_for(moment, process, out, drawn, ranks)
    pids = children(process.pid)
    rank = drawn.randrange(ranks)
    if len(pids) != ranks:
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(f"survival: the run failed by itself:\n{errors}")
        return None
    step = max(losses_of(out), default=0)
    os.kill(pids[rank], signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE_S)
    if process.returncode == 0:
        return None
    lines = [line for line in errors.splitlines() if line.startswith("meshwright: rank")]
    expected = f"meshwright: rank {rank} was killed by SIGKILL; "
    if process.returncode != 1 or len(lines) != 1 or not lines[0].startswith(expected) or "Traceback" in errors:
        sys.exit(f"survival: exit code {process.returncode}, expected 1 and one line '{expected}...', got:\n{errors}")
    if any(Path(f"/proc/{pid}").exists() for pid in pids):
        sys.exit("survival: a rank was left behind")
    return Kill(layout, moment, rank, step, round(delay, 3), unfinished(out))


def finish(job: Job, layout: str, out: Path) -> dict[int, float]:
    """Run to the end undisturbed; the losses."""
    process = job.start(layout, out)
    _, errors = process.communicate(timeout=PATIENCE_S)
    if process.returncode:
        sys.exit(f"survival: the run failed:\n{errors}")
    return losses_of(out)


def survive(job: Job, out: Path, kills: int, seed: int, change_layout: bool) -> tuple[list[Kill], dict[int, float]]:
    """Kill a run `kills` times, then let it finish."""
    drawn = random.Random(seed)
    names = list(job.layouts)
    layout = names[0]
    made: list[Kill] = []
    while len(made) < kills:
        moment = MOMENTS[len(made) % len(MOMENTS)]
        kill = kill_once(job, layout, moment, out, drawn)
        if kill is None:
            sys.exit(f"survival: the run ended after {len(made)} kills; give it more --steps")
        print(f"  {kill}", flush=True)
        made.append(kill)
        if change_layout:
            layout = drawn.choice([name for name in names if name != layout])
    return made, finish(job, layout, out)


def difference(unbroken: dict[int, float], survived: dict[int, float]) -> float:
    """The largest relative difference of a loss; infinite where a step is missing."""
    if unbroken.keys() != survived.keys():
        return float("inf")
    return max(abs(survived[step] - loss) / loss for step, loss in unbroken.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="in all: half on one layout, half with changing ones")
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/survival.json"))
    arguments = parser.parse_args()
    folder = arguments.out.parent / "survival"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = shutil.copytree("docs", folder / "data")  # what is trained on must not change within the minutes of this run
    job = Job(folder, data, arguments.steps, every=2, layouts=LAYOUTS)
    started = time.monotonic()
    unbroken = finish(job, next(iter(LAYOUTS)), folder / "unbroken")
    result: dict[str, Any] = {"seed": arguments.seed, "steps": arguments.steps, "runs": []}
    ends = []
    for change in (False, True):
        name = "changing layouts" if change else "one layout"
        print(f"{name}:", flush=True)
        kills, losses = survive(job, folder / name.replace(" ", "-"), arguments.kills // 2, arguments.seed, change)
        worst = difference(unbroken, losses)
        ends.append(worst <= (TOLERANCE if change else 0.0))
        result["runs"].append({"run": name, "kills": [asdict(k) for k in kills], "largest_relative_difference": worst})
        print(f"{name}: {len(kills)} kills, largest relative difference of a loss {worst:.1e}", flush=True)
    result["seconds"] = round(time.monotonic() - started)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"survival: loss {unbroken[1]:.4f} to {unbroken[arguments.steps]:.4f}, {result['seconds']} s")
    if not all(ends):
        sys.exit("survival: the curves differ")


if __name__ == "__main__":
    main()

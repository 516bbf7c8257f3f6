"""`make elastic`: a job of two torchrun agents of two ranks loses one agent, and goes on with the two ranks left.

Kills an agent and its ranks with SIGKILL in the middle of a step (a machine that is gone). The other agent must meet
again alone, `train --replan` must choose a layout for two ranks and go on from the last complete checkpoint, and the
losses must be those of a run that nothing happened to. Linux. Logs are in build/elastic.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from meshwright.runtime import checkpoint
from meshwright.runtime.trainer import CHECKPOINTS

FOLDER = Path("build/elastic")
PLAN = "examples/tiny-llama-two-machines.yaml"
PORT = 29493
STEPS, KILL_AFTER = 16, 7
LIMIT_S = 300.0
TOLERANCE = 1e-4
"""Relative, of losses in fp32: sums over ranks are ordered otherwise."""


def agent(index: int) -> subprocess.Popen[bytes]:
    """torchrun on one machine of one or two. The last call waits for the second one to start."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "2"]
    meeting = ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{PORT}"]
    meeting += ["--rdzv-id", "elastic", "--rdzv-conf", f"is_host={int(index == 0)},last_call_timeout=15"]
    meeting += ["--local-addr", "127.0.0.1"]
    job = ["-m", "meshwright", "train", PLAN, "--data", "docs", "--out", str(FOLDER / "run"), "--steps", str(STEPS)]
    job += ["--checkpoint-every", "2", "--keep", "100", "--watchdog", "30", "--replan"]
    log = (FOLDER / f"agent-{index}.log").open("wb")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*torchrun, *meeting, *job], stdout=log, stderr=log, env=environment)


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if line["kind"] == kind]


def lose(lost: subprocess.Popen[bytes]) -> None:
    """What a machine that is gone leaves: nothing of the agent, nothing of its ranks."""
    ranks = Path(f"/proc/{lost.pid}/task/{lost.pid}/children").read_text(encoding="ascii").split()
    lost.kill()
    for pid in ranks:
        os.kill(int(pid), signal.SIGKILL)
    lost.wait()


def wait_for(what: str, is_there: Any, left: subprocess.Popen[bytes]) -> None:
    """Until it is there, which only an agent that is left can bring about."""
    until = time.monotonic() + LIMIT_S
    while not is_there():
        if time.monotonic() > until or left.poll() is not None:
            sys.exit(f"elastic: {what} was not reached; logs are in {FOLDER}")
        time.sleep(0.05)


def broken_run(run: Path) -> tuple[str, float]:
    """Two agents, of which one is lost: the last checkpoint that was complete then, seconds until training went on."""
    agents = [agent(index) for index in range(2)]
    try:
        wait_for(f"step {KILL_AFTER}", lambda: any(s["step"] >= KILL_AFTER for s in lines_of(run, "step")), agents[0])
        complete = checkpoint.complete(run / CHECKPOINTS)
        lost_at, done = time.monotonic(), len(lines_of(run, "step"))
        lose(agents[1])
        print(f"agent 1 and its ranks killed after step {lines_of(run, 'step')[-1]['step']}", flush=True)
        wait_for(
            "another step", lambda: len(lines_of(run, "run")) > 1 and len(lines_of(run, "step")) > done + 1, agents[0]
        )
        back_s = time.monotonic() - lost_at
        if agents[0].wait(LIMIT_S):
            sys.exit(f"elastic: torchrun ended with {agents[0].returncode}; logs are in {FOLDER}")
    finally:
        for one in agents:
            if one.poll() is None:
                one.terminate()
    return complete[-1].name, back_s


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    run, whole = FOLDER / "run", FOLDER / "whole"
    complete, back_s = broken_run(run)
    starts = lines_of(run, "run")
    log = (FOLDER / "agent-0.log").read_text(encoding="utf-8", errors="replace")
    said = [line for line in log.splitlines() if line.startswith("replan:")]
    print("\n".join(said))
    print(f"first step after the loss: {back_s:.0f} s later, from {starts[-1]['resumed_from']}")
    command = [sys.executable, "-m", "meshwright", "train", PLAN, "--data", "docs", "--out", str(whole), "--json"]
    command += ["--steps", str(STEPS)]
    unbroken = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["losses"]
    losses = {line["step"]: line["loss"] for line in lines_of(run, "step")}  # of steps done twice the later
    worst = max(abs(losses[step] / loss - 1.0) for step, loss in enumerate(unbroken, start=1))
    worlds = [start["ranks"] for start in starts]
    print(f"ranks {worlds}; {STEPS} steps, losses within {worst:.1e} of an unbroken run's")
    wrong = [
        *(["no layout was chosen"] if not said else []),
        *([f"worlds of {worlds} ranks"] if worlds != [4, 2] else []),
        *([f"{complete} was complete, but not the start"] if Path(starts[-1]["resumed_from"]).name < complete else []),
        *(["losses differ"] if not worst <= TOLERANCE else []),
    ]
    if wrong:
        sys.exit(f"elastic: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()

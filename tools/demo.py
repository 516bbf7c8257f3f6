"""`make demo`: the main job on real input, then a small plan that runs here.

Plans Llama-3.1-70B on 64 H100 and looks at the plan from every side; trains a tiny Llama on this project's own
documentation by 8 ranks of 2 x 2 x 2. Each command is printed as a user would type it, runs in its own process, and
must succeed. Writes build/plan.yaml and build/demo-run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

BUILD = Path("build")
PLAN = str(BUILD / "plan.yaml")
RUN = BUILD / "demo-run"
JOB = ["llama-3.1-70b", "--cluster", "h100-sxm", "--nodes", "8", "--seq", "8192", "--global-batch", "512"]


def meshwright(*arguments: str, quiet: bool = False) -> str:
    """Run one command, show it, and stop the demo where it fails."""
    print(f"\n$ meshwright {' '.join(arguments)}", flush=True)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if not quiet:
        print(done.stdout, end="")
    print(f"({time.monotonic() - start:.1f} s)", flush=True)
    if done.returncode:
        sys.exit(f"demo: the command above ended with {done.returncode}")
    return done.stdout


def main() -> None:
    BUILD.mkdir(exist_ok=True)
    start = time.monotonic()
    meshwright("plan", *JOB, "-o", PLAN)
    document = json.loads(meshwright("plan", *JOB, "--json", quiet=True))
    best = document["plans"][0]
    print(f"  the same as JSON: {sorted(best)}; searched {document['search']}")
    meshwright("estimate", PLAN)
    meshwright("layout", PLAN)
    meshwright("scale", *JOB[:3], *JOB[5:7], "--global-batch", "2048", "--gpus", "64..4096", "--weak")
    shutil.rmtree(RUN, ignore_errors=True)
    meshwright(
        "train", "examples/tiny-llama-2x2x2.yaml", "--data", "docs", "--steps", "30", "--ledger", "--out", str(RUN)
    )
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    if not losses[-1] < losses[0] / 1.5:
        sys.exit(f"demo: the loss did not fall enough: {losses[0]:.3f} to {losses[-1]:.3f}")
    print(f"\ndemo: all commands succeeded in {time.monotonic() - start:.0f} s; the plan is in {PLAN}")


if __name__ == "__main__":
    main()

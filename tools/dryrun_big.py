"""`make dryrun-big`: dry runs of plans for up to 16,384 GPUs; seconds and memory of each, and where they go.

In: plan files (examples/big). Out: a line for each; exit code 1 if one does not agree, takes longer than a minute or
holds more than 4 GB, all processes of its dry run together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

PLANS = Path("examples/big")
MOST_SECONDS, MOST_BYTES = 60.0, 4e9
PAGE = os.sysconf("SC_PAGE_SIZE")


class Memory:
    """The most that a process and all its descendants have held at once, looked at five times a second. Pages that
    forked processes share count once for each: an upper bound."""

    def __init__(self, pid: int) -> None:
        self._pid, self.most = pid, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, sum(_resident(pid) for pid in _tree(self._pid)))
            sleep(0.2)


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return [pid]
    return [pid, *(other for child in children for other in _tree(int(child)))]


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:  # it has ended
        return 0


def run(plan: Path) -> tuple[dict[str, Any], float, int]:
    """The proof, the seconds from start to end, and the most memory."""
    command = [sys.executable, "-m", "meshwright", "dryrun", str(plan), "--json"]
    began = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        with Memory(process.pid) as memory:
            assert process.stdout is not None
            text = process.stdout.read()
        if process.wait() not in (0, 1):
            raise RuntimeError(f"{plan}: exit code {process.returncode}")
    return json.loads(text), perf_counter() - began, memory.most


def main() -> int:
    failed = False
    for plan in [Path(p) for p in sys.argv[1:]] or sorted(PLANS.glob("*.yaml")):
        proof, seconds, memory = run(plan)
        ranks = proof["ranks"]
        good = proof["agrees"] and seconds <= MOST_SECONDS and memory <= MOST_BYTES
        failed |= not good
        calls = sum(line["calls"] for rank in ranks for line in rank["traced"])
        each = ", ".join(f"{r['coordinate']['pp']}: {r['seconds']:.0f}" for r in ranks)
        repeated = sum(r["microbatches_repeated"] for r in ranks)
        print(
            f"{'ok' if good else 'NOT OK'} {plan.stem}: {seconds:.0f} s, {memory / 1e6:.0f} MB; "
            f"agrees: {proof['agrees']}; {len(ranks)} roles, {calls:,} calls, {repeated} microbatches repeated\n"
            f"  seconds by stage {each}; {len(proof['matched_ranks'])} ranks matched in "
            f"{proof['seconds']['matching']:.0f} s",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

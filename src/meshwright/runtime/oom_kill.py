"""What the launcher knows of a rank that the kernel killed: SIGKILL, and a count of out-of-memory kills that grew.

In: the run's folder. Out: `launcher.json` there when a forked job dies. The count is the cgroup's own (memory.events of
version 2, memory.oom_control of version 1); where there is none, a kill is only a kill.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshwright.files import write_text
from meshwright.runtime.launch import RankFailedError

LAUNCHER_FILE = "launcher.json"
CGROUPS = Path("/sys/fs/cgroup")
MOST_REASON = 4000


def oom_kills(process: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> int | None:
    """Out-of-memory kills in this process' cgroup so far, None where the system does not count them."""
    try:
        lines = process.read_text("utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if controllers == "":
            candidates = (root / inside / "memory.events", root / "memory.events")
        elif "memory" in controllers.split(","):
            candidates = (root / "memory" / inside / "memory.oom_control", root / "memory" / "memory.oom_control")
        else:
            continue
        for file in candidates:
            if file.is_file():
                return _counted(file)
    return None


def _counted(file: Path) -> int | None:
    for line in file.read_text("utf-8").splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.strip().isdigit():
            return int(value)
    return None


@contextmanager
def noting_kills(folder: Path) -> Iterator[None]:
    """Around a forked job: if a rank fails, say how, and whether the kernel killed for memory meanwhile."""
    (folder / LAUNCHER_FILE).unlink(missing_ok=True)
    before = oom_kills()
    try:
        yield
    except RankFailedError as error:
        after = oom_kills()
        killed = None if before is None or after is None else after - before
        record = {
            "rank": error.rank,
            "reason": error.reason[-MOST_REASON:],
            "exit_code": error.exit_code,
            "oom_kills": killed,
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / LAUNCHER_FILE, json.dumps(record, indent=1) + "\n")
        raise

"""`make fuzz`: hostile run folders, flight logs, Flight Recorder dumps, plan and cluster files.

Takes good inputs of each kind, damages them at random (bits, cuts, splices, numbers, whole fields), and gives them to
what reads them. An answer or an InputError is right; another exception, more than LIMIT_S or MOST_BYTES, or an attempt
to run code (an audit hook watches) is not.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from meshwright.doctor.hang import diagnose_hang
from meshwright.doctor.run_records import read_run
from meshwright.errors import InputError
from meshwright.flight import FLIGHT_FOLDER, FlightLog, Identity
from meshwright.flight.reader import log_path
from meshwright.hardware import load as load_cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.grid import rank_layout
from meshwright.ledger import Collective, Phase
from meshwright.plan import Plan

LIMIT_S = 20
MOST_BYTES = 1 << 30
"""Resident at most, over all cases."""
RUNS_CODE = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)
SIZES = {"dp": 2, "pp": 2, "tp": 2}
PLAN = Path("examples/tiny-llama-2x2x2.yaml")
CLUSTER = b"""[clusters.mine]
accelerator = "h100-80gb-sxm"
gpus_per_node = 8
intra = "nvlink4"
inter = "ib-ndr"
oversubscription = 2.0
"""


class FoundError(Exception):
    """Something that must not happen."""


class Evil:
    """What a pickle of it would do when loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch hostile-pickle-ran",)


def good_logs(folder: Path) -> None:
    """Eight flight logs of a job that stands still in a tp call."""
    layout = rank_layout(HybridParallelConfig(**SIZES, global_batch=2))
    for rank in range(8):
        coordinates = {axis: int(at[0]) for axis, at in layout.coordinates([rank]).items()}
        who = Identity(rank, 8, coordinates, "node-0", 1, 1, "boot", "plan", 5)
        log = FlightLog(log_path(folder, rank), who, records=16, steps=4)
        for step in range(3):
            log.step_begins(step)
            log.action("F", coordinates["pp"], 0)
            for axis in ("tp", "dp"):
                ranks = tuple(int(r) for r in layout.group_of(rank, axis))
                log.issued(axis, ranks, Collective.ALL_REDUCE, Phase.FORWARD, "output", 64, "float32")
                log.wait_begins(axis, ranks)
                log.wait_ends()
            log.step_ends()


def good_dump(rank: int) -> dict[str, Any]:
    entries = [
        {
            "process_group": ("0", "default_pg"), "collective_seq_id": i + 1, "p2p_seq_id": 0, "is_p2p": False,
            "profiling_name": "nccl:all_reduce", "input_sizes": [[16, 4]], "input_dtypes": ["Float"],
            "state": "completed" if i < 3 else "scheduled", "time_created_ns": 10**18 + i, "frames": [],
            "time_discovered_completed_ns": 10**18 + i + 5 if i < 3 else None,
        }
        for i in range(5)
    ]  # fmt: skip
    config = {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2, 3]"}}
    return {"version": "2.10", "pg_config": config, "entries": entries, "rank": rank}


def damaged(content: bytes, drawn: random.Random) -> bytes:
    """One to eight small disasters."""
    data = bytearray(content)
    for _ in range(drawn.randint(1, 8)):
        at = drawn.randrange(len(data) + 1)
        length = drawn.choice((1, 2, 4, 8, 64, 4096))
        kind = drawn.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << drawn.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = drawn.randbytes(min(length, 64))
        elif kind == 3:
            data[at : at + length] = drawn.choice((b"\xff", b"\0", b"9", b"[", b"{")) * length
        elif kind == 4:
            other = drawn.randrange(len(data) + 1)
            data[at : at + length] = data[other : other + length]
        elif kind == 5 and drawn.random() < 0.3:
            del data[at:]
        else:
            data[at : at + 8] = drawn.choice((1 << 63, 1 << 31, 255, (1 << 64) - 1)).to_bytes(8, "little")
    return bytes(data)


def case_of_logs(folder: Path, seeds: dict[str, bytes], drawn: random.Random) -> None:
    flight = folder / FLIGHT_FOLDER
    flight.mkdir()
    hit = set(drawn.sample(sorted(seeds), drawn.randint(1, 3)))
    for name, content in seeds.items():
        if name in hit and drawn.random() < 0.1:
            continue
        # most of a log is its ring: half of the disasters go to the part before it
        head = drawn.randint(64, 1024)
        spoilt = damaged(content[:head], drawn) + content[head:] if drawn.random() < 0.5 else damaged(content, drawn)
        (flight / name).write_bytes(spoilt if name in hit else content)
    if drawn.random() < 0.2:
        (folder / "ranks").mkdir()
        (flight / drawn.choice(("states.json", "noticed", "../ranks/rank-00000.error.json"))).write_bytes(
            drawn.randbytes(99)
        )
    diagnose_hang(folder)


def case_of_dumps(folder: Path, seeds: dict[str, bytes], drawn: random.Random) -> None:
    for rank in range(4):
        document: Any = good_dump(rank)
        if drawn.random() < 0.5:
            document["entries"][drawn.randrange(5)][drawn.choice(list(document["entries"][0]))] = drawn.choice(
                (None, -1, 1 << 80, "x" * 200, [], {}, [[[]]], True, 0.5, "nccl:send 9999->2", [1 << 70])
            )
        if drawn.random() < 0.2:
            document["pg_config"]["0"]["ranks"] = drawn.choice(
                ("[0, 0]", "[9999999]", [0, 1], "[" * 500, None, "[1e9]")
            )
        if drawn.random() < 0.2:
            document["entries"].append(Evil())
            content = pickle.dumps(document)
        elif drawn.random() < 0.5:
            content = pickle.dumps(document, protocol=drawn.randint(2, 4))
        else:
            content = json.dumps(document).encode()
        spoil = drawn.random() < 0.5
        (folder / f"nccl_trace_rank_{rank}").write_bytes(damaged(content, drawn) if spoil else content)
    diagnose_hang(folder)


def case_of_runs(folder: Path, seeds: dict[str, bytes], drawn: random.Random) -> None:
    plan = Plan.read(str(PLAN)).to_dict()
    lines = [{"kind": "run", "first_step": 0, "steps": 3, "ranks": 8, "plan": plan, "resumed_from": None}]
    lines += [{"kind": "step", "step": i, "tokens": 10, "step_s": 0.5, "axis_wait_s": {"tp": 0.1}} for i in range(3)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / "metrics.jsonl").write_bytes(damaged(content, drawn))
    read_run(folder)


def case_of_plans(folder: Path, seeds: dict[str, bytes], drawn: random.Random) -> None:
    (folder / "plan.yaml").write_bytes(damaged(PLAN.read_bytes(), drawn))
    Plan.read(str(folder / "plan.yaml"))


def case_of_clusters(folder: Path, seeds: dict[str, bytes], drawn: random.Random) -> None:
    (folder / "mine.toml").write_bytes(damaged(CLUSTER, drawn))
    load_cluster(str(folder / "mine.toml"))


CASES: tuple[Callable[[Path, dict[str, bytes], random.Random], None], ...] = (
    *(case_of_logs, case_of_dumps, case_of_runs, case_of_plans, case_of_clusters),
)


def watch_for_code(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook while a case runs."""
    if _watching and event.startswith(RUNS_CODE):
        raise FoundError(f"{event} {arguments}")


_watching: list[bool] = []
"""Not empty while a case runs: audit hooks cannot be taken out again."""


def too_long(number: int, frame: FrameType | None) -> None:
    raise FoundError(f"more than {LIMIT_S} s")


def fuzz(cases: int, seed: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """How the cases from number `first` on ended, and what must not have happened."""
    ended: Counter[str] = Counter()
    wrong: list[str] = []
    sys.addaudithook(watch_for_code)
    before = signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = Path(name)
        good_logs(base / "good")
        seeds = {path.name: path.read_bytes() for path in (base / "good").glob("*.flight")}
        for number in range(first, first + cases):
            case = CASES[number % len(CASES)]
            folder = base / f"case-{number}"
            folder.mkdir()
            signal.alarm(LIMIT_S)
            _watching.append(True)
            try:
                case(folder, seeds, random.Random(f"{seed}-{number}"))
                ended["answered"] += 1
            except InputError:
                ended["refused"] += 1
            except Exception as error:
                wrong.append(f"case {number} of {case.__name__}: {type(error).__name__}: {error}"[:300])
            finally:
                signal.alarm(0)
                _watching.clear()
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
    signal.signal(signal.SIGALRM, before)
    return ended, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case: a long run in parts")
    options = parser.parse_args()
    ended, wrong = fuzz(options.cases, options.seed, options.first)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if peak_bytes > MOST_BYTES:
        wrong.append(f"took {peak_bytes / 2**30:.1f} GiB")
    print("\n".join(wrong[:40]))
    print(f"{options.cases} cases: {ended['answered']} answered, {ended['refused']} refused, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

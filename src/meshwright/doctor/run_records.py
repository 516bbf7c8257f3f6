"""A run's folder as the doctor reads it: the plan, every rank's steps, memory and failure, what the launcher saw.

In: a folder that a run left (complete, killed, or hostile). Out: a `Run` of checked plain data. Whatever cannot be
read is left out and named in `notes`; nothing in a folder is trusted: files have a limit, numbers are checked, and
only plain JSON is read.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from meshwright.errors import InputError
from meshwright.ledger import Collective, Phase, TrafficEntry
from meshwright.plan import Plan

METRICS, RANKS, LAUNCHER = "metrics.jsonl", "ranks", "launcher.json"
MOST_BYTES = 64 * 2**20
MOST_RANKS = 200_000
MOST_NUMBER = 1e18
Json = dict[str, Any]


@dataclass(frozen=True)
class RankStep:
    """One step of one rank: its length, what the host computed, what it waited on each axis."""

    step: int
    step_s: float
    compute_s: float
    cpu_s: float
    waited_s: dict[str, float]


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at its last record. `peak_bytes` less `before_bytes` is what the job took."""

    device: str
    allocated_bytes: int
    peak_bytes: int
    before_bytes: int
    reserved_bytes: int | None
    capacity_bytes: int | None
    by_kind: dict[str, int]


@dataclass(frozen=True)
class RankFailure:
    """How a rank's step ended in an exception."""

    type: str
    message: str
    step: int
    module: str | None
    action: str | None
    chunk: int | None
    microbatch: int | None


@dataclass(frozen=True)
class RankRun:
    """All of one rank."""

    rank: int
    host: str
    coordinates: dict[str, int]
    steps: tuple[RankStep, ...]
    memory: RankMemory | None
    failure: RankFailure | None


@dataclass(frozen=True)
class LauncherNote:
    """What the launcher saw when a rank died."""

    rank: int
    reason: str
    exit_code: int | None
    oom_kills: int | None


@dataclass(frozen=True)
class RouterStep:
    """Of a model with experts, one step: tokens by expert and rows by rank over the whole job, the fullest expert over
    the mean by layer, copies of tokens beyond the capacity."""

    step: int
    tokens_per_expert: tuple[int, ...]
    rows_per_rank: tuple[int, ...]
    imbalance_per_layer: dict[int, float]
    dropped: int


@dataclass(frozen=True)
class Run:
    """Everything of a folder that can be read. `traffic` by pipeline stage, of the last step."""

    folder: Path
    plan: Plan | None
    ranks: tuple[RankRun, ...]
    step_s: dict[int, float]
    tokens_per_step: int | None
    traffic: dict[int, tuple[TrafficEntry, ...]]
    launcher: LauncherNote | None
    notes: tuple[str, ...] = field(default=())
    router: tuple[RouterStep, ...] = ()


def read_run(folder: Path) -> Run:
    """The run in a folder; an InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the --out of a `meshwright train`")
    notes: list[str] = []
    lines = list(json_lines(folder / METRICS, notes)) if _exists(folder / METRICS) else []
    plan, since = _plan(lines, notes), _since(lines)
    ranks = tuple(
        replace(rank, steps=tuple(s for s in rank.steps if s.step > since))
        for rank in _ranks(folder / RANKS, notes)
        if plan is None or rank.rank < plan.parallel.world_size
    )
    launcher = _launcher(folder / LAUNCHER, notes)
    if not lines and not ranks and launcher is None:
        raise InputError(f"{folder}: holds no run (neither {METRICS} nor {RANKS}/)")
    steps = {s["step"]: s for s in lines if s.get("kind") == "step" and isinstance(s.get("step"), int)}
    steps = {number: step for number, step in steps.items() if number > since}
    tokens = [value for s in steps.values() if (value := _whole(s, "tokens")) is not None]
    return Run(
        folder=folder,
        plan=plan,
        ranks=ranks,
        step_s={n: seconds for n, s in steps.items() if (seconds := _number(s, "step_s")) is not None},
        tokens_per_step=tokens[-1] if tokens else None,
        traffic=_traffic(lines),
        launcher=launcher,
        notes=tuple(dict.fromkeys(notes)),
        router=tuple(r for n in sorted(steps) if (r := _router(n, steps[n])) is not None),
    )


def _router(step: int, line: Json) -> RouterStep | None:
    table = line.get("router_load")
    if not isinstance(table, dict):
        return None
    load = cast(Json, table)
    experts, rows = (_counts(load.get(name)) for name in ("tokens_per_expert", "rows_per_rank"))
    layers = load.get("imbalance_per_layer")
    if experts is None or rows is None or not isinstance(layers, dict):
        return None
    numbers = _numbers(cast(Json, layers)).items()
    by_layer = {int(name): value for name, value in numbers if name.isascii() and name.isdigit() and len(name) < 7}
    return RouterStep(step, experts, rows, by_layer, _whole(load, "dropped") or 0)


def _counts(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 up, not longer than there may be ranks."""
    if not isinstance(value, list) or not 0 < len(cast("list[Any]", value)) <= MOST_RANKS:
        return None
    found = [_whole({"n": n}, "n") for n in cast("list[Any]", value)]
    return None if None in found else tuple(n for n in found if n is not None)


def _plan(lines: list[Json], notes: list[str]) -> Plan | None:
    """The plan that the newest start of the run wrote down."""
    for line in reversed(lines):
        if line.get("kind") == "run" and isinstance(line.get("plan"), dict):
            try:
                return Plan.model_validate(line["plan"])
            except (ValidationError, InputError, RecursionError) as error:
                notes.append(f"{METRICS}: the plan in it cannot be read ({str(error).splitlines()[0][:120]})")
    return None


def _since(lines: list[Json]) -> int:
    """Steps done when the newest layout began: a run that went on with other ranks has steps of two layouts."""
    starts = [line for line in lines if line.get("kind") == "run" and isinstance(line.get("plan"), dict)]
    layouts = [cast(Json, line["plan"]).get("parallel") for line in starts]
    first = len(layouts)
    while first > 0 and layouts[first - 1] == layouts[-1]:
        first -= 1
    return (_whole(starts[first], "first_step") or 0) if first < len(starts) else 0


def _traffic(lines: list[Json]) -> dict[int, tuple[TrafficEntry, ...]]:
    found: dict[int, tuple[TrafficEntry, ...]] = {}
    for line in lines:
        stage, entries = _whole(line, "stage"), line.get("traffic")
        if line.get("kind") != "ledger" or stage is None or not isinstance(entries, list):
            continue
        found[stage] = tuple(e for one in cast("list[Any]", entries) if (e := _entry(one)) is not None)
    return found


def _entry(value: Any) -> TrafficEntry | None:
    if not isinstance(value, dict):
        return None
    table = cast(Json, value)
    axis, what = table.get("axis"), table.get("what")
    size, calls, total = (_whole(table, name) for name in ("group_size", "calls", "total_bytes"))
    if not isinstance(axis, str) or not isinstance(what, str) or size is None or calls is None or total is None:
        return None
    try:
        collective, phase = Collective(str(table.get("collective"))), Phase(str(table.get("phase")))
    except ValueError:
        return None
    return TrafficEntry(axis[:40], collective, phase, what[:80], size, calls, total)


def _ranks(folder: Path, notes: list[str]) -> Iterator[RankRun]:
    """Every rank that left anything, by number."""
    if not folder.is_dir():
        return
    numbers: set[int] = set()
    for path in folder.iterdir():
        digits = path.name.removeprefix("rank-").partition(".")[0]
        if path.name.startswith("rank-") and digits.isascii() and digits.isdigit() and int(digits[:9]) < MOST_RANKS:
            numbers.add(int(digits[:9]))
    for rank in sorted(numbers):
        found = _rank(folder, rank, notes)
        if found is not None:
            yield found


def _rank(folder: Path, rank: int, notes: list[str]) -> RankRun | None:
    stem = f"rank-{rank:05d}"
    lines = list(json_lines(folder / f"{stem}.jsonl", notes)) if _exists(folder / f"{stem}.jsonl") else []
    memory = json_file(folder / f"{stem}.memory.json", notes)
    failure = json_file(folder / f"{stem}.error.json", notes)
    heads = [one for one in (*[line for line in lines if line.get("kind") == "rank"], memory, failure) if one]
    if not heads:
        return None
    steps = {s.step: s for line in lines if line.get("kind") == "step" and (s := _step(line)) is not None}
    host = next((h["host"] for h in reversed(heads) if isinstance(h.get("host"), str)), "?")
    places = [h["coordinates"] for h in heads if isinstance(h.get("coordinates"), dict)]
    coordinates = _numbers(places[-1]) if places else {}
    return RankRun(
        rank=rank,
        host=host[:100],
        coordinates={axis: int(value) for axis, value in coordinates.items()},
        steps=tuple(steps[n] for n in sorted(steps)),
        memory=None if memory is None else _memory(memory),
        failure=None if failure is None else _failure(failure),
    )


def _step(line: Json) -> RankStep | None:
    step = _whole(line, "step")
    numbers = [_number(line, name) for name in ("step_s", "compute_s", "cpu_s")]
    waited = line.get("waited_s")
    if step is None or not isinstance(waited, dict) or any(n is None for n in numbers):
        return None
    step_s, compute_s, cpu_s = (float(n or 0.0) for n in numbers)
    return RankStep(step, step_s, compute_s, cpu_s, _numbers(cast(Json, waited)))


def _memory(table: Json) -> RankMemory | None:
    allocated, peak, before = (_whole(table, name) for name in ("allocated_bytes", "peak_bytes", "before_bytes"))
    if allocated is None or peak is None:
        return None
    kinds = table.get("by_kind")
    return RankMemory(
        device=str(table.get("device"))[:20],
        allocated_bytes=allocated,
        peak_bytes=peak,
        before_bytes=before or 0,
        reserved_bytes=_whole(table, "reserved_bytes"),
        capacity_bytes=_whole(table, "capacity_bytes"),
        by_kind={k: int(v) for k, v in _numbers(cast(Json, kinds)).items()} if isinstance(kinds, dict) else {},
    )


def _failure(table: Json) -> RankFailure:
    def text(name: str, most: int = 200) -> str | None:
        value = table.get(name)
        return value[:most] if isinstance(value, str) else None

    return RankFailure(
        type=text("type") or "?",
        message=text("message", 4000) or "",
        step=_whole(table, "step") or 0,
        module=text("module"),
        action=text("action"),
        chunk=_whole(table, "chunk"),
        microbatch=_whole(table, "microbatch"),
    )


def _launcher(path: Path, notes: list[str]) -> LauncherNote | None:
    table = json_file(path, notes)
    rank = None if table is None else _whole(table, "rank")
    if table is None or rank is None:
        return None
    code = table.get("exit_code")
    reason = table.get("reason")
    return LauncherNote(
        rank=rank,
        reason=reason[:4000] if isinstance(reason, str) else "",
        exit_code=code if isinstance(code, int) and abs(code) < 2**31 else None,
        oom_kills=_whole(table, "oom_kills"),
    )


def _number(table: Json, name: str) -> float | None:
    """A finite number from 0 up."""
    value = table.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_NUMBER:
        return None
    return float(value)


def _whole(table: Json, name: str) -> int | None:
    value = table.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_NUMBER:
        return None
    return value


def _numbers(table: Json) -> dict[str, float]:
    """The entries of a table that are numbers from 0 up (at most 64 of them)."""
    names = [str(name) for name in table][:64]
    return {n[:40]: value for n in names if (value := _number(table, n)) is not None and math.isfinite(value)}


def _exists(path: Path) -> bool:
    """Whether there is a plain file (no pipe, device or folder)."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _text(path: Path, notes: list[str]) -> str | None:
    """At most MOST_BYTES of a plain file."""
    if not _exists(path):
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        notes.append(f"{path.name}: cannot be read ({error.strerror or error})")
        return None
    if len(data) > MOST_BYTES:
        notes.append(f"{path.name}: only its first {MOST_BYTES >> 20} MiB were read")
    return data[:MOST_BYTES].decode("utf-8", errors="replace")


def json_file(path: Path, notes: list[str]) -> Json | None:
    """A JSON object in a file, None where there is none."""
    text = _text(path, notes)
    if text is None:
        return None
    value = _parsed(text)
    if not isinstance(value, dict):
        notes.append(f"{path.name}: holds no JSON object")
        return None
    return cast(Json, value)


def json_lines(path: Path, notes: list[str]) -> Iterator[Json]:
    """The JSON objects of a file, one a line. What is cut off or no object is counted in the notes."""
    wrong = 0
    for line in (_text(path, notes) or "").splitlines():
        value = _parsed(line)
        if isinstance(value, dict):
            yield cast(Json, value)
        else:
            wrong += bool(line.strip())
    if wrong:
        notes.append(f"{path.name}: {wrong} lines could not be read")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None

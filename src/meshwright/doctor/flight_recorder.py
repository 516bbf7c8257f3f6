"""PyTorch Flight Recorder dumps (NCCL and gloo; JSON or pickle) as the same model as our own flight logs.

In: a folder with one dump per rank, its rank the last number of the file's name. Out: `RankLog`s. Dumps are hostile
until shown otherwise: the pickle reader can build nothing but plain data, and every value is checked.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np

from meshwright.doctor.plain_pickle import load_plain
from meshwright.errors import InputError
from meshwright.flight import Group, Identity, RankLog
from meshwright.flight.layout import COLLECTIVES, MESSAGES, RECORD, STEP
from meshwright.flight.reader import Now
from meshwright.ledger import Collective

DUMP_NAME = re.compile(r"[\w.\-]{0,80}?(\d{1,7})(\.json|\.pickle|\.pkl|\.dump)?")
MOST_DUMP_BYTES, MOST_DUMPS, MOST_ENTRIES, MOST_RANKS = 64 << 20, 65536, 100_000, 1 << 20
SIGNS = (b"pg_config", b"entries")
DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Byte": "uint8", "Bool": "bool", "Char": "int8",
}  # fmt: skip
WORDS: tuple[tuple[Collective, tuple[str, ...]], ...] = (
    (Collective.ALL_REDUCE, ("allreduce", "all_reduce")),
    (Collective.ALL_GATHER, ("allgather", "all_gather")),
    (Collective.REDUCE_SCATTER, ("reduce_scatter", "reducescatter")),
    (Collective.ALL_TO_ALL, ("alltoall", "all_to_all")),
    (Collective.BROADCAST, ("broadcast",)),
    (Collective.SEND, ("send",)),
    (Collective.RECEIVE, ("recv", "receive")),
)
"""What `profiling_name` holds ('nccl:all_reduce', 'gloo:allreduce'); the first that fits."""


def read_dumps(folder: Path) -> list[RankLog]:
    """The dumps in a folder as logs, in rank order; none where there is no dump."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir())[:MOST_DUMPS] if folder.is_dir() else []:
        match = DUMP_NAME.fullmatch(path.name)
        if not match or not path.is_file() or not _looks_like_a_dump(path):
            continue
        if found.setdefault(int(match[1]), path) != path:
            raise InputError(f"{folder}: {found[int(match[1])].name} and {path.name} are of one rank")
    documents = {rank: _document(path) for rank, path in found.items()}
    world = max((max(rank, _largest_rank(document)) + 1 for rank, document in documents.items()), default=0)
    if world > MOST_RANKS:
        raise InputError(f"{folder}: a dump speaks of rank {world - 1}")
    return [_log(rank, world, documents[rank], found[rank]) for rank in sorted(documents)]


def _looks_like_a_dump(path: Path) -> bool:
    try:
        if path.stat().st_size > MOST_DUMP_BYTES:
            return False
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return all(sign in content for sign in SIGNS)


def _document(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    try:
        read: object = json.loads(content) if content[:1] == b"{" else load_plain(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a Flight Recorder dump ({type(error).__name__})") from None
    document = cast("dict[str, Any]", read) if isinstance(read, dict) else {}
    if not isinstance(document.get("entries"), list) or not isinstance(document.get("pg_config"), dict):
        raise InputError(f"{path}: a Flight Recorder dump without lists of entries and groups")
    if len(document["entries"]) > MOST_ENTRIES:
        raise InputError(f"{path}: more entries than a Flight Recorder keeps")
    return document


def _groups(document: dict[str, Any]) -> list[tuple[str, Group]]:
    """(torch's name, group) of every process group whose ranks are given."""
    found: list[tuple[str, Group]] = []
    for name, config in cast("dict[Any, Any]", document["pg_config"]).items():
        values = cast("dict[str, Any]", config) if isinstance(config, dict) else {}
        ranks = _ranks(values.get("ranks"))
        if ranks:
            found.append((str(name), Group(_axis(str(values.get("desc") or name)), ranks)))
    return found


def _ranks(value: Any) -> tuple[int, ...]:
    """'[0, 1, 2, 3]', as torch writes them, or a list of numbers."""
    text = value if isinstance(value, str) else repr(cast("list[Any]", value)) if isinstance(value, list) else ""
    if not re.fullmatch(r"\[[\d, ]*\]", text):
        return ()
    ranks = tuple(int(word) for word in re.findall(r"\d{1,7}", text))
    return ranks if len(set(ranks)) == len(ranks) and max(ranks, default=0) < MOST_RANKS else ()


def _largest_rank(document: dict[str, Any]) -> int:
    return max((max(group.ranks) for _, group in _groups(document)), default=0)


def _axis(description: str) -> str:
    """'tp:0' (ours), 'mesh_tp' and 'default_pg' as a word."""
    return re.sub(r"\W", "", description.partition(":")[0].removeprefix("mesh_"))[:20] or "world"


def _log(rank: int, world: int, document: dict[str, Any], path: Path) -> RankLog:
    named = _groups(document)
    numbers = {name: i for i, (name, _) in enumerate(named)}
    groups = tuple(group for _, group in named)
    rows = [r for e in cast("list[Any]", document["entries"]) if (r := _row(e, numbers, groups, rank)) is not None]
    records = np.zeros(len(rows), RECORD)
    for i, row in enumerate(rows):
        for field, value in row.items():
            records[field][i] = value
        records["serial"][i] = records["check"][i] = i + 1
    last = int(records["issued_ns"].max()) if rows else 0
    pending = np.flatnonzero((records["returned_ns"] == 0) & (records["peer"] < 0))
    blocked = records[pending[0]] if len(pending) else None  # the oldest that is not done
    now = Now(
        updated_ns=last,
        step=0,
        chunk=-1,
        microbatch=-1,
        waiting_group=-1 if blocked is None else int(blocked["group"]),
        waiting_since_ns=0 if blocked is None else int(blocked["issued_ns"]),
        peer=-1,
        activity="step",
        action="",
    )
    who = Identity(rank, world, {"rank": rank}, path.name, 0, 0, "", "", 0, groups)
    return RankLog(who, now, records, np.zeros(0, STEP))


def _row(entry: Any, numbers: dict[str, int], groups: tuple[Group, ...], rank: int) -> dict[str, Any] | None:
    """A record's fields, or None for an entry that makes no sense."""
    if not isinstance(entry, dict):
        return None
    values = cast("dict[str, Any]", entry)
    pair, called = values.get("process_group"), str(values.get("profiling_name", ""))
    name = str(cast("list[Any]", pair)[0]) if isinstance(pair, (list, tuple)) and pair else "0"
    name = name if name in numbers else ""  # torch's name for the default group in the list of groups
    collective = next((c for c, words in WORDS if any(word in called.lower() for word in words)), None)
    issued = _number(values.get("time_created_ns"))
    if name not in numbers or collective is None or not issued or rank not in groups[numbers[name]].ranks:
        return None
    message = collective in MESSAGES
    peer = _peer(called, groups[numbers[name]].ranks, rank) if message else -1
    if message and peer < 0:
        return None
    dtypes = values.get("input_dtypes")
    first = str(cast("list[Any]", dtypes)[0]) if isinstance(dtypes, list) and dtypes else ""
    sequence = values.get("p2p_seq_id") if message else values.get("collective_seq_id", values.get("seq_id"))
    done = values.get("state") == "completed" or values.get("retired") is True  # gloo's state stays 'scheduled'
    return {
        "sequence": _number(sequence),
        "issued_ns": issued,
        "returned_ns": max(issued, _number(values.get("time_discovered_completed_ns"))) if done else 0,
        "bytes": _elements(values.get("input_sizes")),
        "group": numbers[name],
        "collective": COLLECTIVES.index(collective),
        "microbatch": -1,
        "chunk": -1,
        "peer": peer,
        "dtype": DTYPES.get(first, first.lower()[:12]).encode("ascii", "replace"),
        "what": re.sub(r"[^\w:.> -]", "", called)[:44].encode("ascii", "replace"),
    }


def _peer(called: str, ranks: tuple[int, ...], rank: int) -> int:
    """'nccl:send 0->1' names places in the group."""
    match = re.search(r"(\d{1,7})\s*(?:->|<-)\s*(\d{1,7})", called)
    places = [int(place) for place in match.groups()] if match else []
    return next((ranks[p] for p in places if p < len(ranks) and ranks[p] != rank), -1)


def _elements(sizes: Any) -> int:
    """Elements of all inputs, which stand for bytes: members that agree on them and on the dtype agree on both."""
    total = 0
    for shape in cast("list[Any]", sizes)[:64] if isinstance(sizes, list) else []:
        count = 1
        for length in cast("list[Any]", shape)[:16] if isinstance(shape, (list, tuple)) else []:
            count = min(count * _number(length), 1 << 50)
        total += count
    return total


def _number(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 62 else 0

"""Flight Recorder dumps of torch are read as plain data, and lead to the verdicts that our own logs do."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.doctor.flight_recorder import read_dumps
from meshwright.doctor.hang import Cause, diagnose_hang
from meshwright.doctor.plain_pickle import load_plain
from meshwright.errors import InputError

WORLD = 4


def entry(sequence: int, done: bool, size: int = 8, dtype: str = "Float", called: str = "nccl:all_reduce") -> Any:
    return {
        "process_group": ("0", "default_pg"),
        "collective_seq_id": sequence,
        "profiling_name": called,
        "input_sizes": [[size, 4]],
        "input_dtypes": [dtype],
        "state": "completed" if done else "scheduled",
        "time_created_ns": 10**18 + sequence,
        "time_discovered_completed_ns": 10**18 + sequence + 5 if done else None,
    }


def dump(entries: list[Any]) -> dict[str, Any]:
    return {"version": "2.10", "pg_config": {"0": {"desc": "default_pg", "ranks": "[0, 1, 2, 3]"}}, "entries": entries}


def write(folder: Path, documents: dict[int, Any], as_pickle: bool) -> Path:
    for rank, document in documents.items():
        content = pickle.dumps(document) if as_pickle else json.dumps(document).encode()
        (folder / f"nccl_trace_rank_{rank}").write_bytes(content)
    return folder


@pytest.mark.parametrize("as_pickle", [True, False])
def test_the_rank_that_did_not_come_is_the_one_that_all_wait_for(tmp_path: Path, as_pickle: bool) -> None:
    waiting = dump([entry(1, True), entry(2, True), entry(3, False)])
    documents = {rank: dump([entry(1, True), entry(2, True)]) if rank == 2 else waiting for rank in range(WORLD)}
    verdict = diagnose_hang(write(tmp_path, documents, as_pickle))
    assert (verdict.cause, verdict.ranks) == (Cause.WAITED_FOR, (2,))


def test_gloo_that_never_says_completed_says_retired(tmp_path: Path) -> None:
    def calls(count: int) -> Any:
        return dump([entry(i + 1, False, called="gloo:all_reduce") | {"retired": i < 3} for i in range(count)])

    documents = {rank: calls(3 if rank == 1 else 4) for rank in range(WORLD)}
    assert diagnose_hang(write(tmp_path, documents, True)).ranks == (1,)


@pytest.mark.parametrize(("field", "cause"), [("size", Cause.SIZE), ("dtype", Cause.DTYPE)])
def test_a_size_or_dtype_that_only_one_rank_has_is_its_fault(tmp_path: Path, field: str, cause: Cause) -> None:
    odd: dict[str, Any] = {"size": 16} if field == "size" else {"dtype": "BFloat16"}
    documents = {r: dump([entry(1, True), entry(2, False, **(odd if r == 3 else {}))]) for r in range(WORLD)}
    verdict = diagnose_hang(write(tmp_path, documents, True))
    assert (verdict.cause, verdict.ranks) == (cause, (3,))


def test_a_rank_without_a_dump_is_missing(tmp_path: Path) -> None:
    documents = {rank: dump([entry(1, False)]) for rank in (0, 1, 3)}
    verdict = diagnose_hang(write(tmp_path, documents, False))
    assert (verdict.cause, verdict.ranks) == (Cause.MISSING, (2,))


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made-by-a-hostile-dump",)


def test_a_pickle_that_would_call_something_is_refused_and_calls_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "dumps"
    folder.mkdir()
    write(folder, {0: dump([entry(1, True), Evil()])}, True)
    with pytest.raises(InputError, match="asks for"):
        read_dumps(folder)
    assert not (tmp_path / "made-by-a-hostile-dump").exists()


def test_dumps_that_torch_wrote_are_read(tmp_path: Path) -> None:
    """The oracle of the format: a gloo world of one, its recorder's own dump."""
    script = (
        "import os, sys, torch, torch.distributed as dist\n"
        "from torch._C._distributed_c10d import _dump_fr_trace\n"
        "store = dist.HashStore()\n"
        "dist.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
        "for n in (3, 5): dist.all_reduce(torch.ones(n))\n"
        "open(sys.argv[1], 'wb').write(_dump_fr_trace())\n"
    )
    environment = os.environ | {"TORCH_FR_BUFFER_SIZE": "100"}
    path = tmp_path / "dump_0"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=environment, timeout=120)
    (log,) = read_dumps(tmp_path)
    assert [bytes(what) for what in log.records["what"]] == [b"gloo:all_reduce"] * 2
    assert log.records["bytes"].tolist() == [3, 5]
    assert log.records["dtype"].tolist() == [b"float32"] * 2
    assert log.identity.groups[0].ranks == (0,)


def test_a_pickle_that_asks_for_a_memo_larger_than_itself_is_refused_before_room_is_made():
    """Five bytes make the C unpickler allocate 16 bytes for each of four billion places."""
    held = pickle.dumps({"entries": [], "pg_config": {}}, protocol=2)
    bomb = held[:-1] + b"r\xff\xff\xff\xff" + b"."
    with pytest.raises(InputError, match="remembers more things"):
        load_plain(bomb)
    with pytest.raises(InputError, match="remembers more things"):
        load_plain(held[:-1] + b"p4000000000\n.")


@given(
    st.recursive(
        st.integers() | st.text() | st.floats(allow_nan=False) | st.none() | st.booleans(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    ),
    st.integers(0, 5),
)
def test_plain_data_survives_every_protocol(value: object, protocol: int):
    assert load_plain(pickle.dumps(value, protocol)) == value

"""Reading a run's folder: what a trainer leaves, what a crash leaves, and what an enemy leaves."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright import diagnose_efficiency
from meshwright import diagnose_oom as diagnose_memory
from meshwright.doctor.oom import diagnose_oom
from meshwright.doctor.run_records import read_run
from meshwright.errors import InputError

from .runs import folder, plan

KEYS = ("kind", "rank", "step", "step_s", "compute_s", "cpu_s", "waited_s", "host", "coordinates", "plan", "traffic",
        "stage", "peak_bytes", "allocated_bytes", "by_kind", "message", "exit_code", "oom_kills", "reason")  # fmt: skip
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(KEYS)
NAMES = st.sampled_from(KEYS) | st.text(max_size=4)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=6),
    max_leaves=12,
)


def test_a_folder_is_read_back(tmp_path: Path):
    run = read_run(folder(tmp_path / "run", plan(dp=2, global_batch=4)))
    assert [rank.rank for rank in run.ranks] == [0, 1]
    assert run.ranks[1].steps[3].waited_s == {"dp": 0.02}
    assert run.ranks[0].memory is not None
    assert run.plan is not None
    assert run.plan.parallel.dp == 2
    assert run.notes == ()


def test_a_line_cut_off_by_a_crash_is_left_out_and_said(tmp_path: Path):
    where = folder(tmp_path / "run", plan(dp=2, global_batch=4))
    file = where / "ranks" / "rank-00001.jsonl"
    file.write_text(file.read_text()[:-20])
    run = read_run(where)
    assert len(run.ranks[1].steps) == 7
    assert run.notes == ("rank-00001.jsonl: 1 lines could not be read",)


def test_no_folder_and_an_empty_one_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        read_run(tmp_path / "none")
    with pytest.raises(InputError, match="holds no run"):
        read_run(tmp_path)


def test_pipes_and_devices_are_not_read(tmp_path: Path):
    where = folder(tmp_path / "run", plan(dp=2, global_batch=4))
    os.mkfifo(where / "launcher.json")
    (where / "ranks" / "rank-00007.jsonl").symlink_to("/dev/zero")
    assert len(read_run(where).ranks) == 2


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8), which=st.integers(0, 4))
def test_any_json_in_any_file_is_survived(tmp_path_factory: pytest.TempPathFactory, table: object, which: int):
    where = folder(tmp_path_factory.mktemp("run") / "r", plan(dp=2, global_batch=4))
    names = ("metrics.jsonl", "ranks/rank-00000.jsonl", "ranks/rank-00001.memory.json", "ranks/rank-00001.error.json",
             "launcher.json")  # fmt: skip
    (where / names[which]).write_text(json.dumps(table) + "\n")
    diagnosed(where)


@pytest.mark.parametrize("seed", range(40))
def test_bytes_turned_over_are_survived(tmp_path: Path, seed: int):
    where = folder(tmp_path / "run", plan(dp=2, global_batch=4))
    drawn = random.Random(seed)
    for file in [p for p in where.rglob("*") if p.is_file()]:
        data = bytearray(file.read_bytes())
        for _ in range(drawn.randint(0, 12)):
            data[drawn.randrange(len(data))] = drawn.randrange(256)
        file.write_bytes(bytes(data[: drawn.randint(0, len(data))] if drawn.random() < 0.3 else data))
    diagnosed(where)


def test_deep_nesting_and_huge_numbers_are_survived(tmp_path: Path):
    where = folder(tmp_path / "run", plan(dp=2, global_batch=4))
    (where / "launcher.json").write_text("[" * 200_000)
    (where / "ranks" / "rank-00001.memory.json").write_text('{"peak_bytes": ' + "9" * 5000 + "}")
    diagnosed(where)


def diagnosed(where: Path) -> None:
    """Read and diagnose; bad input may be refused in a line, and nothing else may happen."""
    with contextlib.suppress(InputError):
        diagnose_oom(read_run(where))


def test_a_script_asks_by_the_guides_names(tmp_path: Path):
    where = folder(tmp_path / "run", plan(dp=2, global_batch=4))
    assert diagnose_memory(where, cluster="cpu").fits
    report = diagnose_efficiency(str(where))
    assert report.parts.transfer_s == {"dp": pytest.approx(0.02)}
    assert not diagnose_memory(plan(dp=2, micro_batch=512, global_batch=1024)).fits


def test_of_a_run_that_went_on_with_fewer_ranks_only_the_newest_layout_counts(tmp_path: Path):
    where = folder(tmp_path / "run", plan(dp=4, global_batch=4), ranks=4, steps=6)
    smaller = {"kind": "run", "plan": plan(dp=2, global_batch=4).to_dict(), "first_step": 4, "ranks": 2}
    with (where / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(smaller) + "\n")
    found = read_run(where)
    assert [rank.rank for rank in found.ranks] == [0, 1]
    assert [step.step for step in found.ranks[0].steps] == [5, 6]
    assert sorted(found.step_s) == [5, 6]


def test_a_run_resumed_on_its_own_layout_keeps_all_its_steps(tmp_path: Path):
    where = folder(tmp_path / "run", plan(dp=2, global_batch=4), steps=6)
    again = {"kind": "run", "plan": plan(dp=2, global_batch=4).to_dict(), "first_step": 4, "ranks": 2}
    with (where / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    assert sorted(read_run(where).step_s) == [1, 2, 3, 4, 5, 6]

"""Files of rows from outside: whatever is in them, one line says what is wrong and where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.validation.rows import MODEL, ROW, row

from meshwright.errors import InputError
from meshwright.validation import validate_file
from meshwright.validation.lines import LONGEST_LINE_BYTES, read_rows


def test_rows_come_in_order_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n\n  \n{"id": "b"}')
    assert [r.values["id"] for r in read_rows(path)] == ["a", "b"]
    assert [r.label for r in read_rows(path)] == ["rows.jsonl:1", "rows.jsonl:4"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b'{"id": null}\n{"id": ', r"rows.jsonl:2: not valid JSON"),
        (b"[1, 2]\n", r"rows.jsonl:1: must be a JSON object, got list"),
        (b"null\n", r"rows.jsonl:1: must be a JSON object"),
        (b'{"tp": NaN}\n', r"rows.jsonl:1: not valid JSON .NaN is not a number"),
        (b'{"tp": -Infinity}\n', r"rows.jsonl:1: not valid JSON"),
        (b'{"tp": "\xff"}\n', r"rows.jsonl:1: not UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"\n", r"rows.jsonl:1: nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}\n", r"rows.jsonl:1: not valid JSON"),
        (b'{"a": "' + b"x" * LONGEST_LINE_BYTES + b'"}\n', r"rows.jsonl:1: longer than"),
        (b"\x00\x01\x02", r"rows.jsonl:1: not valid JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        validate_file(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        validate_file(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="not a file"):
        validate_file(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tp": "two"}, "tp must be a whole number, got 'two'"),
        ({"tp": True}, "tp must be a whole number, got True"),
        ({"tp": 0}, "tp must be from 1"),
        ({"tp": -2}, "tp must be from 1"),
        ({"gpus": 1e30}, "gpus must be"),
        ({"seq": 1.5}, "seq must be a whole number"),
        ({"sp": "yes"}, "sp must be true or false"),
        ({"zero": 7}, "zero must be from 0 to 3"),
        ({"zero": "fspd"}, "zero must be 0 to 3, 'fsdp' or 'hsdp'"),
        ({"recompute": "some"}, "recompute must be none, selective or full"),
        ({"model": 3}, "model must be an object"),
        ({"measured": [1]}, "measured must be an object"),
        ({"measured": {"tokens_per_s_per_gpu": "fast"}}, "tokens_per_s_per_gpu must be a finite number"),
        ({"measured": {"peak_mem_gib": -1}}, "peak_mem_gib must not be negative"),
        ({"intra_bw": -1}, "intra_bw must be GB/s"),
        ({"flags": "none"}, "flags must be a list"),
        ({"model": MODEL | {"hidden": "wide"}}, "hidden must be a whole number"),
        ({"model": MODEL | {"kv_heads": 5}}, "not a multiple of kv_heads"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_line(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(row(**changes)) + "\n")
    with pytest.raises(InputError, match=words) as caught:
        validate_file(path)
    assert str(caught.value).startswith("rows.jsonl:2: ")
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(ROW)), JSON, max_size=3))
@settings(max_examples=150, deadline=None)
def test_hostile_values_end_in_an_input_error_a_skip_or_a_score_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps(row(**changes)) + "\n")
    outcome: str | int
    try:
        outcome = validate_file(path).rows
    except InputError as error:
        outcome = str(error)
    assert outcome == 1 or (isinstance(outcome, str) and "\n" not in outcome)

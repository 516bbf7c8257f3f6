"""Documents are strict JSON, whatever the dataclasses hold."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest

from meshwright.layout.config import HybridParallelConfig, Schedule
from meshwright.ledger import MemoryKind
from meshwright.report.json_documents import config_document, dumps, plain


@dataclass(frozen=True)
class Held:
    name: str
    values: tuple[float, ...]


def test_what_is_not_finite_becomes_null() -> None:
    held = Held("x", (1.0, math.inf, -math.inf, math.nan))
    assert json.loads(dumps(held)) == {"name": "x", "values": [1.0, None, None, None]}


def test_enums_arrays_and_mappings_become_plain() -> None:
    value = {
        MemoryKind.LOGITS: np.int64(7),
        "schedule": Schedule.ZBV,
        "a": np.array([1.5, np.nan]),
        "b": np.bool_(True),
    }
    assert plain(value) == {"logits": 7, "schedule": "zbv", "a": [1.5, None], "b": True}
    assert isinstance(plain(np.float32(1)), float)


def test_what_has_no_json_form_is_a_defect_not_a_guess() -> None:
    with pytest.raises(TypeError, match="no JSON form for object"):
        plain(object())


def test_a_config_document_has_every_field_and_what_follows() -> None:
    config = config_document(HybridParallelConfig(dp=4, tp=2, micro_batch=2, global_batch=16))
    assert (config["world_size"], config["num_microbatches"], config["expert_dp"]) == (8, 2, 8)
    assert config["schedule"] == "1f1b"

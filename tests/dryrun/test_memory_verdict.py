"""Memory is part of a dry run's verdict: state to the byte, the peak beside it within 3 %."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tools.memory_matrix import COMMON, LLAMA, layout

from meshwright.dryrun import proof
from meshwright.dryrun.memory_verdict import BESIDE_STATE, SMALL_BYTES, memory_differences
from meshwright.dryrun.tracker import MemoryTrace, Peak
from meshwright.ledger import MemoryKind
from meshwright.plan import ModelSection, Plan, TrainingWorkload

TRACED = MemoryTrace(
    {MemoryKind.PARAMETERS: 100, MemoryKind.ACTIVATIONS: 100 * SMALL_BYTES},
    Peak({}, "F0.0", ""),
    Peak({MemoryKind.PARAMETERS: 100, MemoryKind.ACTIVATIONS: 100 * SMALL_BYTES}, "F0.0", ""),
    (),
)


@pytest.mark.parametrize(
    ("parameters", "beside", "judged", "wrong"),
    [
        (100, 100 * SMALL_BYTES, True, []),
        (100, 103 * SMALL_BYTES, True, []),
        (100, 104 * SMALL_BYTES, True, [BESIDE_STATE]),
        (100, 96 * SMALL_BYTES, True, [BESIDE_STATE]),
        (100, 96 * SMALL_BYTES, False, []),
        (101, 100 * SMALL_BYTES, False, ["parameters"]),
    ],
)
def test_state_agrees_to_the_byte_and_the_peak_to_three_percent(
    parameters: int, beside: int, judged: bool, wrong: list[str]
) -> None:
    predicted = {MemoryKind.PARAMETERS: parameters, MemoryKind.ACTIVATIONS: beside}
    assert [d.what for d in memory_differences(predicted, TRACED, judged)] == wrong


def test_a_plan_whose_memory_is_not_what_the_model_says_is_not_proved(
    meshwright: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = COMMON | LLAMA | {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 4096}
    section, file = ModelSection(name="small", config=shape), tmp_path / "plan.yaml"
    # ZeRO-3 without anybody to shard with is no ZeRO
    Plan.from_parts(section, layout(tp=2, zero=3, global_batch=2), TrainingWorkload(seq=1024)).write(file)
    sound = meshwright("dryrun", file, "--json")
    assert sound.code == 0, sound.err
    assert all(r["memory"]["peak_judged"] and not r["memory"]["differences"] for r in json.loads(sound.out)["ranks"])

    predicted = proof.predicted_memory
    more = {MemoryKind.OPTIMIZER: 4, MemoryKind.TEMPORARIES: 1 << 28}
    monkeypatch.setattr(
        proof, "predicted_memory", lambda *parts: {k: n + more.get(k, 0) for k, n in predicted(*parts).items()}
    )
    wrong = meshwright("dryrun", file)
    assert wrong.code == 1
    assert "memory DIFFERS: optimizer" in wrong.out
    assert "memory DIFFERS: peak beside state" in wrong.out
    assert "0 differ in their ledger and 1 in memory" in wrong.out

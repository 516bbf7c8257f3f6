"""A checkpoint of any layout resumes on any other; what is damaged or of another run is refused in one line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.runtime import checkpoint
from meshwright.runtime.checkpoint import DataPosition
from meshwright.runtime.checkpoint_files import CheckpointReader, tensor_shapes
from meshwright.runtime.engine import Engine, EngineOptions, build_engine
from meshwright.runtime.families import family_of
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.weights import SeededWeights

from .jobs import SEQ, VOCABULARY, plan, run
from .layouts import layout
from .tiny import tiny

TP2_PP2_DP2: dict[str, Any] = {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}
PP4_DP2: dict[str, Any] = {"pp": 4, "dp": 2, "zero": 2}
DP8: dict[str, Any] = {"dp": 8, "zero": 3}

FP32_ROUNDING = 2e-6
"""Relative, of a loss after a few steps: other layouts add up in another order."""


def test_a_run_resumed_on_other_layouts_follows_an_unbroken_one(tmp_path: Path):
    unbroken = run(tmp_path, "unbroken", 6, TP2_PP2_DP2, checkpoint_every=2, keep=9).losses
    at_2 = tmp_path / "unbroken" / "checkpoints" / "step-00000002"
    second = run(tmp_path, "second", 6, PP4_DP2, resume=at_2, checkpoint_every=2, keep=9)
    at_4 = tmp_path / "second" / "checkpoints" / "step-00000004"
    third = run(tmp_path, "third", 6, DP8, resume=at_4)
    assert second.losses == pytest.approx(unbroken[2:], rel=FP32_ROUNDING)
    assert third.losses == pytest.approx(unbroken[4:], rel=FP32_ROUNDING)
    assert unbroken[-1] < unbroken[0] - 0.5


def test_a_run_resumed_on_its_own_layout_is_the_unbroken_one_to_the_bit(tmp_path: Path):
    layout_of_both: dict[str, Any] = {"tp": 2, "dp": 2, "zero": 1, "sequence_parallel": True}
    unbroken = run(tmp_path, "unbroken", 4, layout_of_both, checkpoint_every=2, keep=9).losses
    resumed = run(
        tmp_path, "resumed", 4, layout_of_both, resume=tmp_path / "unbroken" / "checkpoints" / "step-00000002"
    )
    assert resumed.losses == unbroken[2:]
    assert (resumed.first_step, resumed.checkpoint) == (2, tmp_path / "resumed" / "checkpoints" / "step-00000004")


CASES = [
    ("llama", {"tie_word_embeddings": True}, TP2_PP2_DP2 | {"zero": 3}, {"pp": 2}),
    ("phi3", {"vocab": 97}, {"tp": 2, "dp": 2, "zero": 2}, {"tp": 4}),
    ("gpt2", {"tie_word_embeddings": True}, {"pp": 3, "layer_split": (1, 2, 1)}, {"tp": 2, "sequence_parallel": True}),
    ("mixtral", {}, {"tp": 2, "dp": 2, "ep": 2, "expert_tp": 2, "zero": 2}, {"pp": 2, "dp": 2, "ep": 2}),
    ("qwen3", {"kv_heads": 1}, {"tp": 4}, {"dp": 4, "zero": 3, "zero_shards": 2}),
]


@pytest.mark.parametrize(("family", "changes", "one", "other"), CASES, ids=[c[0] for c in CASES])
def test_weights_and_optimizer_state_survive_a_change_of_layout_to_the_bit(
    tmp_path: Path, family: str, changes: dict[str, Any], one: dict[str, Any], other: dict[str, Any]
):
    model = tiny(family, **changes)
    there, back = (layout(precision=Precision.FP32, **sizes) for sizes in (one, other))
    run_ranks(there.world_size, train_and_save, model, there, tmp_path / "there")
    run_ranks(back.world_size, load_and_save, model, back, tmp_path / "there" / "step-00000002", tmp_path / "back")
    written, again = (whole_tensors(tmp_path / name / "step-00000002") for name in ("there", "back"))
    assert written.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in written.items())
    assert all(float(tensor.abs().max()) > 0 for tensor in written.values())


def engine_of(model: Any, config: HybridParallelConfig, seed: int) -> Engine:
    groups = ProcessGroupManager(config, Device("cpu", "gloo"))
    return build_engine(config, model, groups, SeededWeights(model, family_of(model), seed), EngineOptions(seq=SEQ))


def train_and_save(model: Any, config: HybridParallelConfig, folder: Path) -> None:
    engine = engine_of(model, config, 0)
    tokens = torch.randint(0, 90, (config.global_batch // config.dp, SEQ))
    for _ in range(2):
        engine.step(tokens, tokens)
    checkpoint.save(engine, folder, DataPosition(0, 0, SEQ, "none"), plan(model, 2), model)


def load_and_save(model: Any, config: HybridParallelConfig, source: Path, folder: Path) -> None:
    engine = engine_of(model, config, 1)
    progress = checkpoint.load(engine, source)
    assert (progress.step, engine.steps_done, engine.optimizer.steps_taken) == (2, 2, 2)
    checkpoint.save(engine, folder, DataPosition(0, 0, SEQ, "none"), plan(model, 2), model)


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Put together from the parts that the index names, without torch.distributed."""
    metadata = CheckpointReader(folder).read_metadata()
    wholes = {name: torch.zeros(shape) for name, shape in tensor_shapes(folder).items()}
    for index, place in metadata.storage_data.items():
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            part = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        assert index.offset is not None
        where = tuple(slice(o, o + n) for o, n in zip(index.offset, part.shape, strict=True))
        wholes[index.fqn][where] = part
    return wholes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on one rank, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, "run", 3, {}, checkpoint_every=1, keep=2)
    return folder


def copy_of(finished: Path, to: Path) -> Path:
    """A copy of the run's last checkpoint beside the text that it was trained on."""
    shutil.copytree(finished, to, dirs_exist_ok=True)
    return to / "run" / "checkpoints" / "step-00000003"


def resume(folder: Path, source: Path, **options: Any) -> None:
    run(folder, "resumed", 4, options.pop("layout", {}), resume=source, **options)


def test_the_last_checkpoints_stay_and_unfinished_ones_do_not_count(finished: Path, tmp_path: Path):
    last = copy_of(finished, tmp_path)
    folder = last.parent
    assert [c.name for c in checkpoint.complete(folder)] == ["step-00000002", "step-00000003"]
    (folder / ".step-00000009.incomplete").mkdir()
    (folder / "step-00000008").mkdir()
    assert checkpoint.complete(folder)[-1] == last
    held = {p.name for p in last.iterdir()}
    assert held == {"__0_0.distcp", "index.json", "progress.json", "plan.yaml", "config.json"}


def test_a_part_cut_short_or_missing_is_named(finished: Path, tmp_path: Path):
    last = copy_of(finished, tmp_path)
    part = last / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"__0_0\.distcp: cut short"):
        resume(tmp_path, last)
    part.unlink()
    with pytest.raises(InputError, match=r"__0_0\.distcp: missing"):
        resume(tmp_path, last)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"weight.x": {"dtype": "float32", "shape": [true], "parts": []}}', "[" * 90_000]
)
def test_an_index_that_is_none_is_refused(finished: Path, tmp_path: Path, content: str):
    last = copy_of(finished, tmp_path)
    (last / "index.json").write_text(content)
    with pytest.raises(InputError, match="not the index of a checkpoint"):
        tensor_shapes(last)


def test_an_index_cannot_name_files_elsewhere(finished: Path, tmp_path: Path):
    last = copy_of(finished, tmp_path)
    index = (last / "index.json").read_text().replace("__0_0.distcp", "../step-00000002/__0_0.distcp")
    (last / "index.json").write_text(index)
    with pytest.raises(InputError, match="outside its folder"):
        CheckpointReader(last).read_metadata()


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"step": True}, {"format": 9}, {"loss_scale": 0.0}, {"loss_scale": "NaN"}, {"extra": 1}]
)
def test_progress_that_cannot_be_is_refused(finished: Path, tmp_path: Path, change: dict[str, object]):
    last = copy_of(finished, tmp_path)
    state = last / checkpoint.STATE_FILE
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    with pytest.raises(InputError):
        checkpoint.read_progress(last)


def test_a_checkpoint_of_another_model_seed_or_data_is_refused(finished: Path, tmp_path: Path):
    last = copy_of(finished, tmp_path)
    with pytest.raises(InputError, match=r"48\] in the checkpoint|is \[.*\] in the checkpoint"):
        resume(tmp_path, last, model=tiny(vocab=VOCABULARY, mlp=64))
    with pytest.raises(InputError, match="seed 0"):
        resume(tmp_path, last, layout={"training": {"seed": 5}})
    with pytest.raises(InputError, match="3 of 3 steps already"):
        run(tmp_path, "resumed", 3, {}, resume=last)
    (tmp_path / "text.txt").write_text("other words " * 200)
    with pytest.raises(InputError, match="the text or the tokenizer has changed"):
        resume(tmp_path, last)

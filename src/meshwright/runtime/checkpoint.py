"""Checkpoints by torch.distributed.checkpoint that any layout can load: every rank writes boxes of the whole tensors.

The keys and shapes are those of the Hugging Face model, not of the layout: a rank's parameter is a box of such a tensor
(tp cuts one dim, FSDP rows), and a rank that loads reads the parts of other ranks' boxes that it needs. A checkpoint
folder appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Size, Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from meshwright.errors import InputError
from meshwright.files import sync_folder, write_text
from meshwright.plan import Plan
from meshwright.runtime.checkpoint_files import CheckpointReader, CheckpointWriter
from meshwright.runtime.engine import Engine
from meshwright.runtime.weights import saved_buffers

STATE_FILE, PLAN_FILE, CONFIG_FILE = "progress.json", "plan.yaml", "config.json"
FORMAT = 1
NAME = re.compile(r"step-(\d{8})")
WEIGHT = "weight"


@dataclass(frozen=True)
class Progress:
    """What a run must know beside tensors. All randomness (weights, order of the data, dropout) follows from the seed
    and the position, so no generator's state is needed. `optimizer_steps` lacks those that fp16 skipped."""

    step: int
    optimizer_steps: int
    sequences: int
    seed: int
    seq: int
    data: str
    loss_scale: float | None = None
    good_steps: int = 0
    format: int = FORMAT


@dataclass(frozen=True)
class DataPosition:
    """Sequences of `seq` tokens consumed of the order that `seed` gives; `data`: digest of the tokens."""

    sequences: int
    seed: int
    seq: int
    data: str


class Boxes:
    """This rank's parts of one global tensor, in the protocol by which torch.distributed.checkpoint asks a tensor for
    its pieces. Copies that another rank writes have nothing to write, but are read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = Size(shape)
        self._parts: list[tuple[Size, Tensor, bool]] = []

    def add(self, tensor: Tensor, offsets: tuple[int, ...], writes: bool) -> None:
        if tensor.numel():
            self._parts.append((Size(offsets), tensor, writes))

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(offsets, tensor.size()),
                    TensorProperties.create_from_tensor(tensor),
                    self._shape,
                ),
            )
            for offsets, tensor, writes in self._parts
            if writes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, tensor.size()) for offsets, tensor, _ in self._parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(tensor for offsets, tensor, _ in self._parts if offsets == index.offset)

    def size(self) -> Size:
        return self._shape

    def copied_into(self, buffers: list[Tensor]) -> Boxes:
        """The parts that this rank writes, copied to the host: into `buffers` where these are there from the last time,
        else into new ones, which are left there."""
        copy = Boxes(tuple(self._shape))
        written = [(offsets, tensor) for offsets, tensor, writes in self._parts if writes]
        if len(buffers) != len(written):
            buffers[:] = [torch.empty_like(tensor, device="cpu") for _, tensor in written]
        for (offsets, tensor), buffer in zip(written, buffers, strict=True):
            copy.add(buffer.copy_(tensor), tuple(offsets), writes=True)
        return copy


class BoxSavePlanner(DefaultSavePlanner):
    """torch's planner, told how to find a box (it looks for plain tensors only)."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class BoxLoadPlanner(DefaultLoadPlanner):
    """The same for reading: from every part that overlaps with a box."""

    def __init__(self, boxes: Mapping[str, Boxes]) -> None:
        super().__init__()
        self._boxes = boxes

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, boxes in self._boxes.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise InputError(f"no tensor {name} in the checkpoint: it is of another model")
            if stored.size != boxes.size():
                raise InputError(
                    f"{name} is {list(stored.size)} in the checkpoint and {list(boxes.size())} in the plan's model"
                )
            items += create_read_items_for_chunk_list(name, stored, boxes.__create_chunk_list__())
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._boxes[index.fqn].__get_tensor_shard__(index)


def tensors_of(engine: Engine) -> dict[str, Boxes]:
    """Weights (the optimizer's masters), optimizer state and saved buffers of this rank, by name."""
    engine.optimizer.create_state()
    found: dict[str, Boxes] = {}
    for leaf, parameter in zip(engine.optimizer.leaves, engine.parameters, strict=True):
        if parameter.second_copy and engine.holds_first_copy(parameter):
            continue
        state = engine.optimizer.adamw.state[leaf]
        writes = engine.owns(parameter)
        tensors = {WEIGHT: leaf.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        for kind, tensor in tensors.items():
            boxes = found.setdefault(f"{kind}.{parameter.slice.name}", Boxes(parameter.slice.shape))
            boxes.add(tensor, parameter.offsets, writes)
    first = engine.groups.axis("tp").is_first and engine.groups.axis("dp_cp").is_first
    for module in engine.chunks.values():
        for name, buffer in saved_buffers(module).items():
            boxes = found.setdefault(f"{WEIGHT}.{name}", Boxes(tuple(buffer.shape)))
            boxes.add(buffer, (0,) * buffer.dim(), first)
    return found


@dataclass(frozen=True)
class Snapshot:
    """A run at one step, ready to be written: this rank's tensors and where the run stands."""

    tensors: Mapping[str, Boxes]
    progress: Progress


def snapshot(engine: Engine, position: DataPosition) -> Snapshot:
    """The run as it stands; its tensors are the engine's own, not copies."""
    return Snapshot(tensors_of(engine), _progress(engine, position))


def save(
    engine: Engine, folder: Path, position: DataPosition, plan: Plan, model_config: Any, keep: int | None = None
) -> Path:
    """Write `folder`/step-N on all ranks together; of the complete checkpoints the last `keep` stay (None: all)."""
    return write(snapshot(engine, position), folder, plan, model_config, keep)


def write(
    taken: Snapshot,
    folder: Path,
    plan: Plan,
    model_config: Any,
    keep: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """The same of a snapshot, talking over `group` (None: the world's). Fails on all ranks where it fails on one. What
    has its name is whole at every moment: folders get it when they are full and lose it before they are removed."""
    target = folder / f"step-{taken.progress.step:08d}"
    beside = folder / f".{target.name}.incomplete"
    _together(lambda: _make_room(folder), group)
    writer = CheckpointWriter(beside)
    try:
        save_state_dict(dict(taken.tensors), storage_writer=writer, planner=BoxSavePlanner(), process_group=group)
    except CheckpointException as error:  # not an Exception; raised on all ranks, whose error it is stands in it
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        said = str(cause).strip().splitlines()[0][:200]
        raise OSError(f"{target.name} cannot be written by rank {rank}: {said}") from None

    def name_it() -> None:
        plan.write(beside / PLAN_FILE)
        write_text(beside / CONFIG_FILE, json.dumps(model_config.to_dict(), indent=1, default=str))
        write_text(beside / STATE_FILE, json.dumps(asdict(taken.progress)))
        sync_folder(beside)
        if target.exists():  # of the same step: a run that diverged from it was resumed
            _remove(target)
        beside.rename(target)
        sync_folder(folder)
        for old in complete(folder)[: -keep if keep else 0]:
            _remove(old)

    _together(name_it, group)
    return target


def _together(work: Callable[[], None], group: dist.ProcessGroup | None) -> None:
    """Do `work` on the first rank; all ranks wait for it, and fail where it fails."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            problem = [f"cannot be written by rank 0: {error}"]
    dist.broadcast_object_list(problem, src=0, group=group)
    if problem[0] is not None:
        raise OSError(problem[0])


def _make_room(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob(".step-*.incomplete"), *folder.glob(".step-*.removed")):
        shutil.rmtree(leftover)


def _remove(checkpoint: Path) -> None:
    """Take its name away first: half a checkpoint must not look like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _progress(engine: Engine, position: DataPosition) -> Progress:
    scaler = engine.scaler
    return Progress(
        engine.steps_done,
        engine.optimizer.steps_taken,
        position.sequences,
        position.seed,
        position.seq,
        position.data,
        scaler.scale if scaler else None,
        scaler.good_steps if scaler else 0,
    )


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name) and (p / STATE_FILE).is_file())


def read_progress(checkpoint: Path) -> Progress:
    """What a checkpoint says of itself, checked."""
    try:
        progress = Progress(**json.loads((checkpoint / STATE_FILE).read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{checkpoint}: not a checkpoint of meshwright ({str(error)[:100]})") from None
    counts = (progress.step, progress.optimizer_steps, progress.sequences, progress.seed, progress.good_steps)
    scale = progress.loss_scale
    scale_is_wrong = scale is not None and not (isinstance(scale, float) and math.isfinite(scale) and scale > 0)
    if progress.format != FORMAT or scale_is_wrong or any(type(c) is not int or c < 0 for c in counts):
        raise InputError(f"{checkpoint}: its {STATE_FILE} has an unknown format or counts that cannot be")
    return progress


def load(engine: Engine, checkpoint: Path) -> Progress:
    """Read weights and optimizer state into an engine of any layout; returns where the run stands."""
    progress = read_progress(checkpoint)
    read_tensors(dict(tensors_of(engine)), checkpoint)
    engine.optimizer.restored(progress.optimizer_steps)
    engine.copy_second_copies()
    engine.steps_done = progress.step
    if engine.scaler and progress.loss_scale:
        engine.scaler.scale, engine.scaler.good_steps = progress.loss_scale, progress.good_steps
    return progress


def read_tensors(tensors: Mapping[str, Boxes], checkpoint: Path) -> None:
    """Fill tensors from a checkpoint, on all ranks together. All fail where one does."""
    try:
        load_state_dict(dict(tensors), storage_reader=CheckpointReader(checkpoint), planner=BoxLoadPlanner(tensors))
    except CheckpointException as error:  # not an Exception
        _, (cause, _) = next(iter(sorted(error.failures.items())))
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from None
        reason = str(cause).strip().splitlines()
        raise InputError(
            f"{checkpoint}: cannot be loaded into this model ({(reason or [type(cause).__name__])[0][:200]})"
        ) from None

"""Checkpoints by torch.distributed.checkpoint that any layout can load: every rank writes boxes of the whole tensors.

The keys and shapes are those of the Hugging Face model, not of the layout: a rank's parameter is a box of such a tensor
(tp cuts one dim, FSDP rows), and a rank that loads reads the parts of other ranks' boxes that it needs. A checkpoint
folder appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from meshwright.errors import InputError
from meshwright.runtime.data import write_text
from meshwright.runtime.engine import Engine

STATE_FILE = "meshwright.json"
FORMAT = 1
COMPLETE = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Progress:
    """What a run must know beside tensors. All randomness follows from the seed, the step and the sequence."""

    step: int
    optimizer_steps: int
    sequences: int
    seed: int
    loss_scale: float | None = None
    good_steps: int = 0
    format: int = FORMAT


class Boxes:
    """This rank's parts of one global tensor, in the protocol by which torch.distributed.checkpoint asks a tensor for
    its pieces. Copies that another rank writes have nothing to write, but are read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = torch.Size(shape)
        self._parts: list[tuple[torch.Size, Tensor, bool]] = []

    def add(self, tensor: Tensor, offsets: tuple[int, ...], writes: bool) -> None:
        if tensor.numel():
            self._parts.append((torch.Size(offsets), tensor, writes))

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

    def size(self) -> torch.Size:
        return self._shape


def tensors_of(engine: Engine) -> dict[str, Boxes]:
    """Weights and optimizer state of this rank, by name."""
    engine.optimizer.create_state()
    found: dict[str, Boxes] = {}
    for leaf, parameter in zip(engine.optimizer.leaves, engine.parameters, strict=True):
        if parameter.second_copy and engine.holds_first_copy(parameter):
            continue
        state = engine.optimizer.adamw.state[leaf]
        writes = engine.owns(parameter)
        tensors = {"weight": leaf.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        for kind, tensor in tensors.items():
            boxes = found.setdefault(f"{kind}.{parameter.slice.name}", Boxes(parameter.slice.shape))
            boxes.add(tensor, parameter.offsets, writes)
    return found


def save(engine: Engine, folder: Path, sequences: int, seed: int, keep: int = 2) -> Path:
    """Write `folder`/step-N on all ranks together; old complete checkpoints beyond `keep` are removed."""
    target = folder / f"step-{engine.steps_done:08d}"
    beside = folder / f".{target.name}.incomplete"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.incomplete"):
            shutil.rmtree(leftover)
    dist.barrier()
    save_distributed(dict(tensors_of(engine)), storage_writer=FileSystemWriter(beside, sync_files=True))
    if dist.get_rank() == 0:
        scaler = engine.scaler
        progress = Progress(
            engine.steps_done,
            engine.optimizer.steps_taken,
            sequences,
            seed,
            scaler.scale if scaler else None,
            scaler.good_steps if scaler else 0,
        )
        write_text(beside / STATE_FILE, json.dumps(asdict(progress)))
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
        _sync_folder(folder)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if COMPLETE.fullmatch(p.name) and (p / STATE_FILE).is_file())


def read_progress(checkpoint: Path) -> Progress:
    try:
        values = json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
        progress = Progress(**values)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{checkpoint}: not a checkpoint of meshwright ({str(error)[:100]})") from None
    counts = (progress.step, progress.optimizer_steps, progress.sequences, progress.seed)
    if progress.format != FORMAT or any(type(c) is not int or c < 0 for c in counts):
        raise InputError(f"{checkpoint}: its {STATE_FILE} has format {progress.format} or counts that cannot be")
    return progress


def load(engine: Engine, checkpoint: Path) -> Progress:
    """Read weights and optimizer state into an engine of any layout; returns where the run stands."""
    progress = read_progress(checkpoint)
    try:
        load_distributed(dict(tensors_of(engine)), storage_reader=CheckedReader(checkpoint))
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise InputError(f"{checkpoint}: cannot be loaded into this model ({reason[:200]})") from None
    engine.optimizer.restored(progress.optimizer_steps)
    engine.copy_second_copies()
    engine.steps_done = progress.step
    if engine.scaler and progress.loss_scale:
        engine.scaler.scale, engine.scaler.good_steps = progress.loss_scale, progress.good_steps
    return progress


class _KnownTypes(pickle.Unpickler):
    """Unpickles checkpoint metadata: nothing but the classes that torch writes there."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        known = module_name.startswith("torch.distributed.checkpoint.") or (module_name, global_name) in _ALLOWED
        if not known:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} has no place in a checkpoint")
        return super().find_class(module_name, global_name)


_ALLOWED = frozenset(
    {
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("collections", "OrderedDict"),
        *(("torch", str(dtype).removeprefix("torch.")) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        ("torch", "float16"),
        ("torch", "int64"),
    }
)


class CheckedReader(FileSystemReader):
    """torch's file reader, but a hostile .metadata file cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _KnownTypes(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, ImportError) as error:
            raise ValueError(f"{path}: not the metadata of a checkpoint ({error})") from None
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path}: not the metadata of a checkpoint")
        if getattr(metadata, "storage_meta", None) is None:
            raise ValueError(f"{path}: incomplete metadata")
        metadata.storage_meta.load_id = self.load_id  # pyright: ignore[reportOptionalMemberAccess]
        return metadata


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

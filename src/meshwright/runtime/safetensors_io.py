"""Hugging Face safetensors: read only the slices a rank needs, and write a model that transformers loads.

In: a folder with model.safetensors, or its shards with model.safetensors.index.json. Out: a `WeightSource`. Writing
assembles one whole tensor at a time on the first rank of each stage; each stage writes a file of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meshwright.errors import InputError
from meshwright.runtime.files import write_text
from meshwright.runtime.engine import Engine
from meshwright.runtime.slices import TensorSlice
from meshwright.runtime.state import LocalParameter

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsWeights:
    """Slices of the tensors of a Hugging Face model folder; only the bytes asked for are read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of = _files_by_tensor(folder)
        self._open: dict[str, Any] = {}

    def read(self, piece: TensorSlice) -> Tensor:
        if piece.name not in self._file_of:
            raise InputError(f"{self._folder}: no tensor {piece.name}; is it another model?")
        tensor = self._handle(self._file_of[piece.name]).get_slice(piece.name)
        shape = tuple(tensor.get_shape())
        if shape != piece.shape:
            raise InputError(f"{self._folder}: {piece.name} is {list(shape)}, the model has {list(piece.shape)}")
        if piece.dim is None:
            return tensor[:]
        ranges = tuple(slice(piece.start, piece.stop) if d == piece.dim else slice(0, n) for d, n in enumerate(shape))
        return tensor[ranges]

    def _handle(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self._folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{self._folder / name}: not a safetensors file ({str(error)[:100]})") from None
        return self._open[name]


def _files_by_tensor(folder: Path) -> dict[str, str]:
    if (folder / INDEX).is_file():
        try:
            found = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            names = {str(tensor): str(file) for tensor, file in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / INDEX}: not an index of safetensors ({str(error)[:100]})") from None
        strange = [file for file in names.values() if Path(file).name != file]
        if strange:
            raise InputError(f"{folder / INDEX}: names a file outside its folder ({strange[0][:80]})")
        return names
    if not (folder / SINGLE).is_file():
        raise InputError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
    try:
        with safe_open(folder / SINGLE, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), SINGLE)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / SINGLE}: not a safetensors file ({str(error)[:100]})") from None


def save_pretrained(engine: Engine, model_config: Any, folder: Path) -> None:
    """Write the model on all ranks together, as `AutoModelForCausalLM.from_pretrained(folder)` reads it."""
    stage, stages = engine.groups.axis("pp").rank, engine.groups.axis("pp").size
    file = SINGLE if stages == 1 else f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"
    writer = engine.groups.axis("tp").is_first and engine.groups.axis("dp").is_first
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    tensors = _assembled(engine, writer)
    if writer:
        beside = folder / f".{file}.tmp"
        save_file(tensors, beside, metadata={"format": "pt"})
        beside.replace(folder / file)
    names: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, sorted(tensors))
    stage_of_rank = [0] * dist.get_world_size()
    dist.all_gather_object(stage_of_rank, stage)
    if dist.get_rank() == 0:
        _write_index(folder, stages, names, stage_of_rank)
        model_config.save_pretrained(folder)
    dist.barrier()


def _write_index(folder: Path, stages: int, names: list[list[str] | None], stage_of_rank: list[int]) -> None:
    if stages == 1:
        return
    file_of = {
        name: f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"
        for stage, own in zip(stage_of_rank, names, strict=True)
        for name in own or ()
    }
    write_text(folder / INDEX, json.dumps({"metadata": {}, "weight_map": file_of}, indent=1))


def _assembled(engine: Engine, writer: bool) -> dict[str, Tensor]:
    """Whole tensors of this stage on its writer (on other ranks nothing), summed from the boxes of their owners."""
    wholes: dict[str, list[LocalParameter]] = {}
    for parameter in engine.parameters:
        if not parameter.second_copy:
            wholes.setdefault(parameter.slice.name, []).append(parameter)
    finished: dict[str, Tensor] = {}
    for name, parts in wholes.items():
        whole = torch.zeros(parts[0].slice.shape, dtype=parts[0].local.dtype, device=parts[0].local.device)
        for part in parts:
            if engine.owns(part):
                part.of(whole).copy_(part.local)
        for axis in ("tp", "dp"):
            group = engine.groups.axis(axis)
            if group.size > 1:
                dist.all_reduce(whole, group=group.group)
        if writer:
            finished[name] = whole.cpu()
    return finished

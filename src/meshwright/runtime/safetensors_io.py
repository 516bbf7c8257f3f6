"""Hugging Face safetensors: read only the slices a rank needs, and write a model that transformers loads.

In: a folder with model.safetensors, or its shards with model.safetensors.index.json. Out: a `WeightSource`. Writing
goes over the files of a checkpoint (of weights only): all ranks write their parts, then each rank reads whole tensors
for the files that are its own. No rank ever holds more than one file's tensors; nothing is gathered over the network.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from meshwright.errors import InputError
from meshwright.files import sync_folder, write_text
from meshwright.runtime.checkpoint import WEIGHT, Boxes, BoxLoadPlanner, BoxSavePlanner, tensors_of
from meshwright.runtime.checkpoint_files import CheckpointReader, CheckpointWriter, tensor_shapes
from meshwright.runtime.engine import COMPUTE_DTYPES, Engine
from meshwright.runtime.slices import TensorSlice

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_FILE_BYTES = 5 * 10**9
"""As transformers' save_pretrained cuts by default before version 5."""
PREFIXES = (("", ""), ("model.", ""), ("transformer.", ""), ("gpt_neox.", ""), ("model.", "model.language_model."))
PREFIXES += (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
"""(of our name, of the file's name): base models are stored without prefix, text models inside multimodal ones with."""


class SafetensorsWeights:
    """Slices of the tensors of a Hugging Face model folder; only the bytes asked for are read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of = _files_by_tensor(folder)
        self._open: dict[str, Any] = {}

    def read(self, piece: TensorSlice) -> Tensor:
        if piece.experts is not None and self._found(piece.name) is None:
            return torch.stack([self._expert(piece, number) for number in range(*piece.experts)])
        name = self._stored_name(piece.name)
        tensor = self._handle(name).get_slice(name)
        shape = tuple(tensor.get_shape())
        if shape != piece.shape:
            raise InputError(f"{self._folder}: {name} is {list(shape)}, the plan's model has {list(piece.shape)}")
        if piece.local_shape == shape:
            return tensor[:]
        return tensor[tuple(slice(start, stop) for start, stop in piece.bounds)]

    def _expert(self, piece: TensorSlice, number: int) -> Tensor:
        """One expert's part of stacked weights that are stored expert by expert; gate and up are rows one above the
        other when stacked."""
        stem, _, stacked = piece.name.rpartition(".")
        parts = ("gate_proj", "up_proj") if stacked == "gate_up_proj" else (stacked,)
        height = piece.shape[1] // len(parts)
        (_, (first, last), columns) = piece.bounds
        found: list[Tensor] = []
        for place, part in enumerate(parts):
            start, stop = (min(max(row - place * height, 0), height) for row in (first, last))
            if start < stop:
                one = TensorSlice(
                    f"{stem}.{number}.{part}.weight", (height, piece.shape[2]), 1, *columns, piece.shape[2]
                )
                found.append(self.read(one)[start:stop])
        return torch.cat(found)

    def _stored_name(self, name: str) -> str:
        found = self._found(name)
        if found is None:
            raise InputError(f"{self._folder}: no tensor {name}; is it another model?")
        return found

    def _found(self, name: str) -> str | None:
        for ours, theirs in PREFIXES:
            if name.startswith(ours):
                candidate = theirs + name.removeprefix(ours)
                for stored in (candidate, _mixtral_name(candidate)):
                    if stored in self._file_of:
                        return stored
        return None

    def _handle(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = _opened(self._folder / file)
        if name not in self._open[file].keys():  # noqa: SIM118 - not a mapping
            raise InputError(f"{self._folder / file}: has no tensor {name}, though {INDEX} says so")
        return self._open[file]


def _mixtral_name(name: str) -> str:
    """What Mixtral's checkpoints call a tensor that other families' call so."""
    for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        name = name.replace(f".{ours}.", f".{theirs}.") if ".experts." in name else name
    return name.replace(".mlp.", ".block_sparse_moe.")


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a safetensors file ({str(error)[:100]})") from None


def _files_by_tensor(folder: Path) -> dict[str, str]:
    if (folder / INDEX).is_file():
        try:
            found = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            names = {str(tensor): str(file) for tensor, file in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{folder / INDEX}: not an index of safetensors ({str(error)[:100]})") from None
        strange = [file for file in names.values() if Path(file).name != file]
        if strange:
            raise InputError(f"{folder / INDEX}: names a file outside its folder ({strange[0][:80]})")
        return names
    if not (folder / SINGLE).is_file():
        raise InputError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
    return dict.fromkeys(_opened(folder / SINGLE).keys(), SINGLE)


def save_pretrained(
    engine: Engine, model_config: Any, folder: Path, largest_file_bytes: int = LARGEST_FILE_BYTES
) -> None:
    """Write the model on all ranks together, as `AutoModelForCausalLM.from_pretrained(folder)` reads it."""
    parts = folder / ".parts.incomplete"
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
    dist.barrier()
    weights = {name: boxes for name, boxes in tensors_of(engine).items() if name.startswith(f"{WEIGHT}.")}
    save_state_dict(dict(weights), storage_writer=CheckpointWriter(parts), planner=BoxSavePlanner())
    dist.barrier()
    dtype = engine.options.dtype or COMPUTE_DTYPES[engine.config.precision]
    files = files_by_size(_weight_shapes(parts), dtype, largest_file_bytes)
    for number in range(rank, len(files), world):
        write_file(parts, files[number], dtype, folder / file_name(number, len(files)))
    dist.barrier()
    if rank == 0:
        _finish(folder, files, dtype, model_config)
        shutil.rmtree(parts)
    dist.barrier()


def export_checkpoint(
    checkpoint: Path, model_config: Any, folder: Path, dtype: torch.dtype, largest_file_bytes: int = LARGEST_FILE_BYTES
) -> None:
    """The weights of a checkpoint as safetensors, in this one process."""
    folder.mkdir(parents=True, exist_ok=True)
    files = files_by_size(_weight_shapes(checkpoint), dtype, largest_file_bytes)
    for number, names in enumerate(files):
        write_file(checkpoint, names, dtype, folder / file_name(number, len(files)))
    _finish(folder, files, dtype, model_config)


def _weight_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    shapes = tensor_shapes(checkpoint)
    prefix = f"{WEIGHT}."
    return {name.removeprefix(prefix): shape for name, shape in sorted(shapes.items()) if name.startswith(prefix)}


def files_by_size(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, largest_file_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in order, a new file before one would grow beyond the limit; a larger tensor has a file of its own."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        needed = torch.Size(shape).numel() * dtype.itemsize
        if files[-1] and filled + needed > largest_file_bytes:
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += needed
    return files


def file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_file(checkpoint: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, target: Path) -> None:
    """One safetensors file with whole tensors read from a checkpoint, in `dtype`."""
    wholes = {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    boxes: dict[str, Boxes] = {}
    for name, whole in wholes.items():
        boxes[f"{WEIGHT}.{name}"] = Boxes(tuple(whole.shape))
        boxes[f"{WEIGHT}.{name}"].add(whole, (0,) * whole.dim(), writes=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # this rank reads by itself
        load_state_dict(
            dict(boxes), storage_reader=CheckpointReader(checkpoint), planner=BoxLoadPlanner(boxes), no_dist=True
        )
    beside = target.with_name(f".{target.name}.tmp")
    save_file({name: whole.to(dtype) for name, whole in wholes.items()}, beside, metadata={"format": "pt"})
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    beside.replace(target)


def _finish(folder: Path, files: Sequence[Mapping[str, tuple[int, ...]]], dtype: torch.dtype, config: Any) -> None:
    """Index and config.json. Files of an older, differently cut export go."""
    names = [file_name(number, len(files)) for number in range(len(files))]
    for old in folder.glob("model*.safetensors"):
        if old.name not in names:
            old.unlink()
    if len(files) == 1:
        (folder / INDEX).unlink(missing_ok=True)
    else:
        total = sum(torch.Size(s).numel() * dtype.itemsize for file in files for s in file.values())
        where = {name: file for file, shapes in zip(names, files, strict=True) for name in shapes}
        write_text(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))
    saved = copy.deepcopy(config)
    saved.dtype = dtype
    saved.architectures = [_architecture(config)]
    saved.save_pretrained(folder)
    sync_folder(folder)


def _architecture(config: Any) -> str:
    """The class that config.json names, for readers like vLLM that go by it."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])

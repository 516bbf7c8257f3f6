"""The files of a checkpoint: torch.distributed.checkpoint's writer and reader, with an index in JSON, not a pickle.

In: what torch's planners ask to write or read. Out: one file of tensors per rank and `index.json`, which says where
each part of each tensor stands. A hostile checkpoint cannot run code, and one that was cut short is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from meshwright.errors import InputError
from meshwright.files import write_text

INDEX_FILE = "index.json"
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


class CheckpointWriter(FileSystemWriter):
    """torch's file writer; every file is on disk before the index is."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self._folder = folder

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored = {r.index: r.storage_data for per_rank in results for r in per_rank}
        index: dict[str, Any] = {}
        for name, tensor in metadata.state_dict_metadata.items():
            if not isinstance(tensor, TensorStorageMetadata):
                raise TypeError(f"{name} is no tensor: checkpoints hold tensors only")
            parts = [_part(chunk, stored[MetadataIndex(name, chunk.offsets)]) for chunk in tensor.chunks]
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            index[name] = {"dtype": dtype, "shape": list(tensor.size), "parts": parts}
        write_text(self._folder / INDEX_FILE, json.dumps(index))


def _part(chunk: ChunkStorageMetadata, place: _StorageInfo) -> dict[str, Any]:
    return {
        "offsets": list(chunk.offsets),
        "sizes": list(chunk.sizes),
        "file": place.relative_path,
        "at": place.offset,
        "bytes": place.length,
    }


class CheckpointReader(FileSystemReader):
    """torch's file reader over `index.json`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, places = _read_index(self._folder)
        self._refuse_missing_bytes(places)
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))

    def _refuse_missing_bytes(self, places: dict[MetadataIndex, _StorageInfo]) -> None:
        needed: dict[str, int] = {}
        for place in places.values():
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
        for name, length in needed.items():
            file = self._folder / name
            if Path(name).name != name:
                raise InputError(f"{self._folder / INDEX_FILE}: names a file outside its folder ({name[:80]})")
            if not file.is_file():
                raise InputError(f"{file}: missing from the checkpoint; resume from another one")
            if file.stat().st_size < length:
                raise InputError(
                    f"{file}: cut short ({file.stat().st_size} of {length} bytes); resume from another one"
                )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint by name."""
    return {name: tuple(tensor.size) for name, tensor in _read_index(folder)[0].items()}


def _read_index(folder: Path) -> tuple[dict[str, Any], dict[MetadataIndex, _StorageInfo]]:
    file = folder / INDEX_FILE
    try:
        return _parse(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: not the index of a checkpoint ({str(error)[:80]})") from None


def _parse(index: Any) -> tuple[dict[str, Any], dict[MetadataIndex, _StorageInfo]]:
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in index.items():
        chunks: list[ChunkStorageMetadata] = []
        for number, part in enumerate(tensor["parts"]):
            chunk = ChunkStorageMetadata(_size(part["offsets"]), _size(part["sizes"]))
            file, at, length = part["file"], part["at"], part["bytes"]
            if not isinstance(file, str) or _size([at, length]) != torch.Size([at, length]):
                raise ValueError(f"{name}: a part without a place")
            chunks.append(chunk)
            places[MetadataIndex(name, chunk.offsets, number)] = _StorageInfo(file, at, length)
        properties = TensorProperties(dtype=DTYPES[tensor["dtype"]])
        tensors[name] = TensorStorageMetadata(properties, _size(tensor["shape"]), chunks)
    return tensors, places


def _size(values: Any) -> torch.Size:
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError(f"{str(values)[:40]} is no list of sizes")
    return torch.Size(values)

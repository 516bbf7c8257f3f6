"""Weights of a checkpoint of `meshwright train`, whatever layout wrote it, as a source that gives any slice.

In: the folder of one checkpoint. Out: a `WeightSource`; only the parts of files that a slice overlaps are read, by each
rank for itself.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict

from meshwright.runtime.checkpoint import WEIGHT, Boxes, BoxLoadPlanner, read_progress
from meshwright.runtime.checkpoint_files import CheckpointReader
from meshwright.runtime.slices import TensorSlice


class CheckpointWeights:
    """Slices of a checkpoint's weights, in the fp32 of the optimizer's masters."""

    def __init__(self, folder: Path) -> None:
        read_progress(folder)  # refuses what is no checkpoint
        self._folder = folder

    def read(self, piece: TensorSlice) -> Tensor:
        local = torch.empty(piece.local_shape, dtype=torch.float32)
        offsets = [0] * len(piece.shape)
        if piece.dim is not None:
            offsets[piece.dim] = piece.start
        boxes = Boxes(piece.shape)
        boxes.add(local, tuple(offsets), writes=False)
        name = f"{WEIGHT}.{piece.name}"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each rank reads by itself
            load_state_dict(
                {name: boxes},
                storage_reader=CheckpointReader(self._folder),
                planner=BoxLoadPlanner({name: boxes}),
                no_dist=True,
            )
        return local

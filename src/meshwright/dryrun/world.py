"""A rank of a world that does not exist: a fake process group, fake tensors, and answers where code asks for numbers.

In: a rank, a layout, a transformers config. Out: the runtime's own engine, built as in a real job. Nothing is sent and
nothing is stored; shapes, dtypes, collectives and their order are those of the real program.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshwright.dryrun.shapes import ShapeMode
from meshwright.layout.config import HybridParallelConfig
from meshwright.runtime.engine import Engine, EngineOptions, build_engine
from meshwright.runtime.launch import Device
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.recorder import Recorder
from meshwright.runtime.slices import TensorSlice

FAKE = Device("cpu", "fake")


@contextmanager
def fake_world(rank: int, world_size: int, *, as_gloo: bool = False) -> Iterator[Device]:
    """This process as one rank of a world of any size; collectives return at once. Messages are through as soon as
    anybody asks, as NCCL's mostly are. torch's own fake ones never are, nor (`as_gloo`) are gloo's until
    they are waited for: a step on the CPU holds all that it sends until its end."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    is_completed = FakeWork.is_completed
    if not as_gloo:
        FakeWork.is_completed = lambda self: True
    try:
        yield FAKE
    finally:
        FakeWork.is_completed = is_completed
        dist.destroy_process_group()


class FakeWeights:
    """A weight source of the right shapes, without values."""

    def read(self, piece: TensorSlice) -> Tensor:
        return torch.empty(piece.local_shape)


@contextmanager
def fake_tensors() -> Iterator[ShapeMode]:
    """Everything inside is computed on shapes alone."""
    mode = ShapeMode()
    with warnings.catch_warnings(), mode:
        # FSDP2 re-wraps fake tensors in autograd functions that say so at every layer
        warnings.filterwarnings("ignore", message=".*_wrap_tensor_autograd.*")
        yield mode


def fake_engine(config: HybridParallelConfig, model_config: Any, recorder: Recorder, options: EngineOptions) -> Engine:
    """The engine of this rank of a fake world. Call inside `fake_tensors`."""
    with unset_fake_temporarily():
        groups = ProcessGroupManager(config, FAKE, recorder)
    options = replace(options, sharding_context=unset_fake_temporarily)
    return build_engine(config, model_config, groups, FakeWeights(), options)


def batch_of(config: HybridParallelConfig, seq: int) -> Tensor:
    """Token ids of the right shape for one dp rank's share of a global batch."""
    return torch.zeros((config.global_batch // config.dp, seq), dtype=torch.int64)

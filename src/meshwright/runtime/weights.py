"""Where weights come from: a seed, or Hugging Face safetensors. Both give any slice of any tensor, on any layout.

Seeded weights do not depend on the layout: each module is drawn whole, in fp32 on the CPU, from a generator seeded by
its name, by the model's own initialiser. At most one decoder layer exists unsplit at a time.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM

from meshwright.runtime.families import Family, family_of
from meshwright.runtime.slices import TensorSlice


class WeightSource(Protocol):
    """Gives slices of the unsharded model's tensors."""

    def read(self, piece: TensorSlice) -> Tensor: ...


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends only on the values given."""
    digest = hashlib.blake2b("/".join(str(p) for p in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def meta_model(config: Any, attention: str = "sdpa") -> nn.Module:
    """The causal language model of a transformers config, without storage."""
    attention = family_of(config).attention_function or attention
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.train()


def draw(module: nn.Module, prefix: str, model: nn.Module, seed: int) -> None:
    """Give a meta module storage and its initial values, children first; `prefix` is its full name in the model."""
    with torch.random.fork_rng(devices=[]):
        for name, part in reversed(list(module.named_modules())):
            part.to_empty(device="cpu", recurse=False)
            torch.manual_seed(seed_of(seed, f"{prefix}.{name}".strip(".")))
            model._init_weights(part)  # pyright: ignore[reportCallIssue]


class SeededWeights:
    """Tensors drawn from a seed. `unit_of` decides what is drawn together: a decoder layer, or a single module."""

    def __init__(self, config: Any, family: Family, seed: int) -> None:
        self._model = meta_model(config)
        self._layers = f"{family.base}.{family.layers}."
        self._seed = seed
        self._unit = ""
        self._tensors: Mapping[str, Tensor] = {}

    @classmethod
    def of(cls, config: Any, seed: int) -> SeededWeights:
        """Of a transformers config, whose family is looked up."""
        return cls(config, family_of(config), seed)

    def read(self, piece: TensorSlice) -> Tensor:
        unit = self._unit_of(piece.name)
        if unit != self._unit:
            module = copy.deepcopy(self._model.get_submodule(unit))
            draw(module, unit, self._model, self._seed)
            tensors = (*module.named_parameters(), *module.named_buffers())
            self._tensors = {f"{unit}.{name}": tensor.detach() for name, tensor in tensors}
            self._unit = unit
        return piece.of(self._tensors[piece.name])

    def _unit_of(self, name: str) -> str:
        if name.startswith(self._layers):
            return self._layers + name.removeprefix(self._layers).partition(".")[0]
        return name.rpartition(".")[0]


def reference_model(config: Any, seed: int, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """The whole model in one process, with the weights that every layout of this seed has. Experts run one by one, as
    their classes define them: transformers' grouped product takes no float64."""
    model = meta_model(config, attention)
    own: Any = model.config
    own._experts_implementation = "eager"
    draw(model, "", model, seed)
    model.tie_weights()  # pyright: ignore[reportCallIssue]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def draw_buffers(module: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Restore the non-persistent buffers (rotary frequencies) of a module without parameters of its own."""
    module.to_empty(device=device, recurse=False)
    model._init_weights(module)  # pyright: ignore[reportCallIssue]


def materialize(
    stage: nn.Module,
    slices: Mapping[str, TensorSlice],
    source: WeightSource,
    dtype: torch.dtype,
    device: torch.device,
    tp_mesh: DeviceMesh | None,
    masters: dict[str, Tensor] | None = None,
) -> None:
    """Fill every meta parameter of a split stage with its slice, and every buffer that is saved with the model. Split
    parameters become DTensors on the tp mesh. `masters` gets the values of those that are stored less precisely than
    they come."""
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in list(stage.named_parameters(remove_duplicate=False)):
        owner_name, _, tensor_name = name.rpartition(".")
        if id(parameter) not in filled:
            given = source.read(slices[name])
            filled[id(parameter)] = _filled(slices[name], given, dtype, device, tp_mesh)
            if masters is not None and given.dtype.itemsize > dtype.itemsize:
                masters[name] = given.to(device=device, copy=True).contiguous()
        stage.get_submodule(owner_name).register_parameter(tensor_name, filled[id(parameter)])
    for name, buffer in saved_buffers(stage).items():
        owner_name, _, tensor_name = name.rpartition(".")
        whole = source.read(TensorSlice(name, tuple(buffer.shape))).to(device=device, dtype=buffer.dtype, copy=True)
        stage.get_submodule(owner_name).register_buffer(tensor_name, whole)


def saved_buffers(stage: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the model's state (corrections of a router), by name."""
    kept = stage.state_dict().keys()
    return {name: buffer for name, buffer in stage.named_buffers() if name in kept}


def _filled(
    piece: TensorSlice, given: Tensor, dtype: torch.dtype, device: torch.device, tp_mesh: DeviceMesh | None
) -> nn.Parameter:
    local = given.to(device=device, dtype=dtype, copy=True).contiguous()
    if tp_mesh is None or piece.dim is None or not piece.on_tp_mesh:
        return nn.Parameter(local)
    shape = torch.Size((*piece.shape[: piece.dim], piece.length, *piece.shape[piece.dim + 1 :]))
    stride = torch.empty(shape, device="meta").stride()
    return nn.Parameter(
        DTensor.from_local(local, tp_mesh, [Shard(piece.dim)], run_check=False, shape=shape, stride=stride)
    )

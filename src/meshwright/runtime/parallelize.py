"""Turn the modules of a Hugging Face decoder into tensor-parallel ones, following the family's description.

In: meta-device modules and a `Splitter`. Out: the same modules with their products replaced in place; parameters stay
on the meta device with their local shapes, and `parameter_slices` says which part of which tensor each one is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.errors import InputError
from meshwright.runtime.expert_parallel import ExpertRegion, split_experts
from meshwright.runtime.families import (
    Experts,
    Family,
    Product,
    Split,
    Units,
    expert_count,
    family_of,
    unit_count,
)
from meshwright.runtime.process_groups import AxisGroup, ProcessGroupManager
from meshwright.runtime.slices import GradientSum, TensorSlice, chunk_bounds
from meshwright.runtime.tensor_parallel import entering
from meshwright.runtime.tensor_parallel.attention import head_slice
from meshwright.runtime.tensor_parallel.embedding import VocabParallelEmbedding
from meshwright.runtime.tensor_parallel.linear import (
    ColumnParallelLinear,
    FusedColumnParallelLinear,
    RowParallelLinear,
    Slices,
    even_blocks,
)
from meshwright.runtime.tensor_parallel.region import TensorParallelRegion


@dataclass(frozen=True)
class Splitter:
    """What splitting a module needs to know: the family, its config, the tp region, and where its experts are."""

    family: Family
    config: Any
    region: TensorParallelRegion
    experts: ExpertRegion | None = None

    @property
    def tp(self) -> AxisGroup:
        return self.region.axis

    def layer(self, layer: nn.Module, prefix: str) -> None:
        """Split one decoder layer in place. `prefix` is its full name, with a dot at the end."""
        self._refuse_unknown_parts(layer, prefix)
        present = [product for product in self.family.products if _has(layer, product.path)]
        for product in present:
            name, parent = product.path.rpartition(".")[2], layer.get_submodule(product.path.rpartition(".")[0])
            replaced = self._product(product, layer.get_submodule(product.path), prefix + product.path)
            setattr(parent, name, replaced)
        self._make_counts_local(layer.get_submodule(self.family.attention))
        for path, units in self.family.vectors:
            self._vector(layer, path, units, prefix)
        moe = self.family.moe
        mlp = self.family.mlp
        if moe is not None and _has(layer, moe.experts):
            self._experts(layer, moe, prefix)
            mlp = moe.shared
        for block in (self.family.attention, mlp):
            if block is not None:
                entering.hook(layer.get_submodule(block), self.region)

    def _experts(self, layer: nn.Module, moe: Experts, prefix: str) -> None:
        assert self.experts is not None
        parent, name = layer.get_submodule(moe.experts.rpartition(".")[0]), moe.experts.rpartition(".")[2]
        spread = split_experts(layer.get_submodule(moe.experts), prefix + moe.experts, self.experts)
        setattr(parent, name, spread)
        spread.watch(layer.get_submodule(moe.router))

    def _vector(self, layer: nn.Module, path: str, units: Units, prefix: str) -> None:
        """A loose parameter of a module: its elements of this rank, as a plain tensor."""
        owner, name = layer.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        piece = replace(self._slice(prefix + path, tuple(owner.get_parameter(name).shape), units, 0), on_tp_mesh=False)
        owner.register_parameter(name, nn.Parameter(torch.empty(piece.local_shape, device="meta")))
        owner.slices = {name: piece}  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]

    def embedding(self, embedding: nn.Module, name: str) -> VocabParallelEmbedding:
        assert isinstance(embedding, nn.Embedding)
        rows = self.vocabulary_rows(f"{name}.weight", tuple(embedding.weight.shape))
        scale = getattr(embedding, "scalar_embed_scale", None)
        return VocabParallelEmbedding(rows, self.region, embedding.padding_idx, scale)

    def head(self, head: nn.Module, name: str, weight_name: str) -> ColumnParallelLinear:
        """`weight_name` is the embedding's where the two are tied."""
        assert isinstance(head, nn.Linear)
        slices = {"weight": self.vocabulary_rows(weight_name, tuple(head.weight.shape))}
        if head.bias is not None:
            slices["bias"] = self.vocabulary_rows(f"{name}.bias", tuple(head.bias.shape))
        return ColumnParallelLinear(slices)

    def vocabulary_rows(self, name: str, shape: tuple[int, ...]) -> TensorSlice:
        start, stop = chunk_bounds(shape[0], self.tp.rank, self.tp.size)
        last_start, last_stop = chunk_bounds(shape[0], self.tp.size - 1, self.tp.size)
        if last_start == last_stop:
            raise InputError(f"tp={self.tp.size} leaves ranks without a row of the vocabulary of {shape[0]}")
        return TensorSlice(name, shape, 0, start, stop, shape[0])

    def _product(self, product: Product, linear: nn.Module, name: str) -> nn.Module:
        shapes = {n: tuple(p.shape) for n, p in linear.named_parameters()}
        split_dim = 1 if (product.split is Split.ROW) != product.transposed else 0
        if product.split is Split.ROW:
            slices = {"weight": self._slice(f"{name}.weight", shapes["weight"], product.blocks[0], split_dim)}
            if "bias" in shapes:
                # added after the sum: under sequence parallelism to this rank's tokens only
                partial = GradientSum.TP if self.region.sequence_parallel else GradientSum.NONE
                slices["bias"] = self._replicated(f"{name}.bias", shapes["bias"], partial)
            return RowParallelLinear(slices, self.region, product.transposed)
        blocks: list[Slices] = []
        for units, (start, stop) in zip(product.blocks, self._block_bounds(product, shapes, split_dim), strict=True):
            block: dict[str, TensorSlice] = {}
            for tensor, shape in shapes.items():
                dim = split_dim if tensor == "weight" else 0
                block[tensor] = self._block(f"{name}.{tensor}", shape, units, dim, start, stop)
            blocks.append(block)
        if len(blocks) == 1:
            return ColumnParallelLinear(blocks[0], product.transposed)
        return FusedColumnParallelLinear(blocks, product.transposed)

    def _block_bounds(self, product: Product, shapes: dict[str, tuple[int, ...]], dim: int) -> list[tuple[int, int]]:
        """Where each block of a fused weight begins and ends along the split dimension."""
        width = shapes["weight"][dim]
        if product.blocks[0] is Units.MLP:
            return even_blocks([width // len(product.blocks)] * len(product.blocks))
        counts = [unit_count(self.config, units) or 0 for units in product.blocks]
        return even_blocks([width // sum(counts) * count for count in counts])

    def _block(self, name: str, shape: tuple[int, ...], units: Units, dim: int, start: int, stop: int) -> TensorSlice:
        alone = (*shape[:dim], stop - start, *shape[dim + 1 :])
        piece = self._slice(name, alone, units, dim)
        return replace(piece, shape=shape, start=piece.start + start, stop=piece.stop + start)

    def _slice(self, name: str, shape: tuple[int, ...], units: Units, dim: int) -> TensorSlice:
        count = unit_count(self.config, units) or shape[dim]
        if units is not Units.KV_HEADS and count % self.tp.size:
            raise InputError(f"tp={self.tp.size} does not divide {count} {units} ({name})")
        return head_slice(name, shape, count, self.tp, dim)

    def _replicated(self, name: str, shape: tuple[int, ...], gradient_sum: GradientSum) -> TensorSlice:
        if self.tp.size == 1:
            return TensorSlice(name, shape)
        return TensorSlice(name, shape, copy=self.tp.rank, copies=self.tp.size, gradient_sum=gradient_sum)

    def _make_counts_local(self, attention: nn.Module) -> None:
        """Head counts that the attention module keeps for itself must be those of this rank."""
        heads = unit_count(self.config, Units.HEADS) or 0
        kv_heads = unit_count(self.config, Units.KV_HEADS) or 0
        own_heads, own_kv_heads = heads // self.tp.size, max(1, kv_heads // self.tp.size)
        local_counts = {
            "num_key_value_groups": own_heads // own_kv_heads,
            "num_key_value_heads": own_kv_heads,
            "num_heads": own_heads,
        }
        for attribute, count in local_counts.items():
            if hasattr(attention, attribute):
                setattr(attention, attribute, count)
        if self.family.local_config_heads:
            own_config = copy.copy(self.config)
            own_config.num_attention_heads = own_heads
            attention.config = own_config
        if self.family.split_size:
            attention.split_size = int(attention.split_size) // self.tp.size  # pyright: ignore[reportArgumentType]

    def _refuse_unknown_parts(self, layer: nn.Module, prefix: str) -> None:
        family = self.family
        known = [*(p.path for p in family.products), *family.norms, *family.head_norms]
        if family.moe is not None:
            known += [family.moe.router, family.moe.experts]
        loose = [path for path, _ in family.vectors]
        for name, _ in layer.named_parameters():
            if name.rpartition(".")[0] not in known and name not in loose:
                raise InputError(
                    f"model type '{self.config.model_type}': it is not known how {prefix}{name} splits over tp"
                )


def parameter_slices(stage: nn.Module, splitter: Splitter) -> dict[str, TensorSlice]:
    """The slice behind every parameter of a split stage, by its name in the stage (tied parameters once)."""
    slices: dict[str, TensorSlice] = {}
    for name, parameter in stage.named_parameters():
        owner_name, _, tensor = name.rpartition(".")
        owned = getattr(stage.get_submodule(owner_name), "slices", None)
        slices[name] = owned[tensor] if owned else _replicated_slice(name, parameter, splitter)
    return slices


def _replicated_slice(name: str, parameter: Tensor, splitter: Splitter) -> TensorSlice:
    """Norms and position embeddings: whole on every tp rank. Their gradient is this rank's tokens' (sequence parallel,
    routers always) or this rank's heads' (norms of single heads), or already complete."""
    family, tp = splitter.family, splitter.tp
    if tp.size == 1:
        return TensorSlice(name, tuple(parameter.shape))
    inside = [*family.head_norms, *([family.moe.router] if family.moe else [])]
    by_head = any(f".{part}." in name for part in inside)
    partial = by_head or splitter.region.sequence_parallel
    gradient_sum = GradientSum.TP if partial else GradientSum.NONE
    return TensorSlice(name, tuple(parameter.shape), copy=tp.rank, copies=tp.size, gradient_sum=gradient_sum)


def _has(layer: nn.Module, path: str) -> bool:
    """Whether a layer has the part (a part that is None is none)."""
    return any(name == path for name, _ in layer.named_modules())


def split_groups(groups: ProcessGroupManager, config: Any) -> None:
    """Create the group of tp ranks that hold the same KV head, where there are fewer heads than ranks, and those that
    share the state of routed experts."""
    kv_heads = unit_count(config, Units.KV_HEADS) or 1
    tp = groups.axis("tp").size
    if tp > kv_heads and tp % kv_heads == 0:
        groups.split_axis("kv", "tp", tp // kv_heads)
    if expert_count(config, family_of(config)):
        _split_expert_groups(groups)


def _split_expert_groups(groups: ProcessGroupManager) -> None:
    """HSDP has as many copies of the experts' state as of the rest, unless that leaves each copy on one rank."""
    ranks, copies = groups.axis("expert_dp").size, groups.axis("zero_replica").size
    copies = copies if ranks > copies else 1
    if ranks % copies:
        raise InputError(f"{copies} copies of sharded state do not divide the {ranks} replicas of each expert")
    groups.split_axis("expert_shard", "expert_dp", ranks // copies)
    groups.across_axis("expert_replica", "expert_dp", ranks // copies)

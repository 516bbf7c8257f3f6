"""A pipeline chunk as a module: those of embedding, decoder layers, norm and head of a Hugging Face model that it has.

In: token ids [b, s] (first chunk) or hidden states [b, s or s/tp, h], and labels [b, s] on the last chunk; s is this cp
rank's part of the sequence. Out: hidden states, or the sum of the token losses. Layers are keyed by their global index,
so parameter names are those of the unsharded model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from meshwright.layout.config import Recompute
from meshwright.runtime import dropout
from meshwright.runtime.context_parallel import ContextShard
from meshwright.runtime.dropout import DropoutState
from meshwright.runtime.even_heads import has_uneven_heads, register_even_heads
from meshwright.runtime.expert_parallel import ExpertParallelMoE
from meshwright.runtime.expert_parallel.balance import RouterBalance
from meshwright.runtime.families import Family
from meshwright.runtime.parallelize import Splitter, parameter_slices
from meshwright.runtime.recompute import Contexts, no_contexts, recompute_layers, register_selective
from meshwright.runtime.slices import TensorSlice
from meshwright.runtime.split_backward import LeavesWeights, SplitBackward
from meshwright.runtime.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from meshwright.runtime.tensor_parallel.entering import enter
from meshwright.runtime.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from meshwright.runtime.tensor_parallel.region import TensorParallelRegion
from meshwright.runtime.weights import WeightSource, draw_buffers, materialize, meta_model

HEAD_INPUT = "head input"


@dataclass(frozen=True)
class ChunkPlan:
    """Which part of the model a chunk is."""

    layers: range
    first: bool
    last: bool


class StageModule(nn.Module):
    """One chunk. Children carry the names of the Hugging Face model: `model.layers.7...`, `lm_head`."""

    def __init__(self, whole: nn.Module, plan: ChunkPlan, splitter: Splitter) -> None:
        super().__init__()
        family = splitter.family
        self.plan = plan
        self.family: Family = family
        self.config: Any = splitter.config
        self.region: TensorParallelRegion = splitter.region
        self.split = SplitBackward()
        self.tied = bool(self.config.tie_word_embeddings)
        self.dropout = DropoutState()
        self.context: ContextShard | None = None
        self.balance: RouterBalance | None = None
        decoder = whole.get_submodule(family.base)
        base = nn.Module()
        if plan.first:
            self._take_embedding(base, decoder, splitter)
        layers = nn.ModuleDict()
        all_layers = decoder.get_submodule(family.layers)
        for index in plan.layers:
            layer = all_layers.get_submodule(str(index))
            splitter.layer(layer, f"{family.base}.{family.layers}.{index}.")
            layers[str(index)] = layer
        base.add_module(family.layers, layers)
        if family.rotary:
            base.add_module(family.rotary, decoder.get_submodule(family.rotary))
        if plan.last:
            base.add_module(family.final_norm, decoder.get_submodule(family.final_norm))
        self.add_module(family.base, base)
        if plan.last:
            self._take_head(whole, splitter)
        for part in self.modules():
            if isinstance(part, ColumnParallelLinear | RowParallelLinear | ExpertParallelMoE):
                part.split = self.split

    @property
    def decoder(self) -> nn.Module:
        return self.get_submodule(self.family.base)

    @property
    def layers(self) -> nn.ModuleDict:
        layers = self.decoder.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleDict)
        return layers

    @property
    def head(self) -> ColumnParallelLinear:
        head = self.get_submodule("lm_head")
        assert isinstance(head, ColumnParallelLinear)
        return head

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.plan.first:
            batch, seq = inputs.shape
        else:
            batch, seq = inputs.shape[0], inputs.shape[1] * self._sequence_shards
        held = torch.arange(seq) if self.context is None else self.context.own_positions()
        positions = held.to(inputs.device).unsqueeze(0)
        hidden = self.embed(inputs, positions) if self.plan.first else inputs
        proxy = hidden.new_empty((batch, seq, 1))  # tells masks and rotary embeddings the whole shape and dtype
        masks: dict[str, Tensor | None] = {}
        rotations: dict[str | None, Any] = {}
        for index, layer in self.layers.items():
            kind = self.layer_type(int(index))
            rotary_kind = kind if self.family.rotary_by_layer else None
            if kind not in masks:
                masks[kind] = self._mask(kind, proxy) if self.context is None else None
            keywords: dict[str, Any] = {"attention_mask": masks[kind], "position_ids": positions}
            if self.family.rotary:
                if rotary_kind not in rotations:
                    rotations[rotary_kind] = self.rotate(rotary_kind, proxy, positions)
                keywords["position_embeddings"] = rotations[rotary_kind]
            hidden = layer(hidden, **keywords)
        return self._loss(hidden, labels) if self.plan.last and labels is not None else self._logits_or_hidden(hidden)

    @property
    def _sequence_shards(self) -> int:
        return self.region.axis.size if self.region.sequence_parallel else 1

    def _logits_or_hidden(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden) if self.plan.last else hidden

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = self.decoder.get_submodule(self.family.embedding)(tokens)
        if self.family.position_embedding:
            own_positions = self.region.own_tokens(positions)
            hidden = hidden + self.decoder.get_submodule(self.family.position_embedding)(own_positions)
        if self.family.embedding_dropout:
            hidden = self.decoder.get_submodule(self.family.embedding_dropout)(hidden)
        return hidden

    def layer_type(self, index: int) -> str:
        """'full_attention' or 'sliding_attention'."""
        if self.family.layer_mask == "by layer":
            return str(self.config.layer_types[index])
        slides = self.family.layer_mask == "sliding" and self.config.sliding_window is not None
        return "sliding_attention" if slides else "full_attention"

    def _mask(self, kind: str, proxy: Tensor) -> Tensor | None:
        make = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        # without positions: given them, transformers looks at their values for packed sequences, and there are none
        return make(config=self.config, inputs_embeds=proxy, attention_mask=None, past_key_values=None)  # pyright: ignore[reportReturnType]

    def rotate(self, kind: str | None, proxy: Tensor, positions: Tensor) -> Any:
        rotary = self.decoder.get_submodule(self.family.rotary or "")
        return rotary(proxy, positions) if kind is None else rotary(proxy, positions, kind)

    def logits(self, hidden: Tensor) -> Tensor:
        """[b, s, v/tp]"""
        normed = self.decoder.get_submodule(self.family.final_norm)(hidden)
        logits = self.head(enter(normed, (self.head,), self.region, HEAD_INPUT))
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.logits(hidden)
        first_row = self.head.slices["weight"].start
        flat = logits.reshape(-1, logits.shape[-1])
        return vocab_parallel_cross_entropy(flat, labels.reshape(-1), first_row, self.region.axis)

    def accumulate_products(self, sums: LeavesWeights) -> None:
        """Weight gradients of linear products go to `sums` as they are made, but for a head that shares its weight with
        the embedding: autograd adds the two up."""
        for part in self.modules():
            shared = self.tied and self.plan.first and self.plan.last and part is self.head
            if isinstance(part, ColumnParallelLinear | RowParallelLinear) and not shared:
                part.sums = sums

    def watch_routers(self, balance: RouterBalance) -> None:
        """The executor adds the load-balancing loss of this chunk's routers."""
        moe = self.family.moe
        assert moe is not None
        self.balance = balance
        for name, part in self.named_modules():
            if name.endswith(f".{moe.router}") and not isinstance(part, ColumnParallelLinear):
                balance.watch(part)

    def _take_embedding(self, base: nn.Module, decoder: nn.Module, splitter: Splitter) -> None:
        family = self.family
        name = f"{family.base}.{family.embedding}"
        base.add_module(family.embedding, splitter.embedding(decoder.get_submodule(family.embedding), name))
        for part in (family.position_embedding, family.embedding_dropout):
            if part:
                base.add_module(part, decoder.get_submodule(part))

    def _take_head(self, whole: nn.Module, splitter: Splitter) -> None:
        weight_name = f"{self.family.base}.{self.family.embedding}.weight" if self.tied else "lm_head.weight"
        head = splitter.head(whole.get_submodule("lm_head"), "lm_head", weight_name)
        if self.tied and self.plan.first:
            head.register_parameter("weight", self._embedding_weight())
        self.add_module("lm_head", head)

    def _embedding_weight(self) -> nn.Parameter:
        weight = self.decoder.get_submodule(self.family.embedding).get_parameter("weight")
        assert isinstance(weight, nn.Parameter)
        return weight

    def tied_weight_name(self) -> str | None:
        """The parameter of this chunk that another chunk holds a copy of, if any."""
        if not self.tied or self.plan.first == self.plan.last:
            return None
        return f"{self.family.base}.{self.family.embedding}.weight" if self.plan.first else "lm_head.weight"


@dataclass(frozen=True)
class Stage:
    """A chunk with storage: the module and the slice behind each of its parameters. `masters`: the weights as they came
    of those that the module stores less precisely (where they were asked for)."""

    module: StageModule
    slices: dict[str, TensorSlice]
    masters: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class StageOptions:
    """How chunks compute: weights' dtype, where, and what is recomputed. `contexts` wrap recomputation; `context` is
    this rank's part of the sequence under context parallelism. `masters`: weights are also kept as precisely as they
    come."""

    dtype: torch.dtype
    device: torch.device
    recompute: Recompute = Recompute.NONE
    recompute_every: int = 1
    contexts: Contexts = no_contexts
    attention: str = "sdpa"
    dropout: DropoutState = field(default_factory=DropoutState)
    context: ContextShard | None = None
    masters: bool = False


def build_stage(
    plan: ChunkPlan, splitter: Splitter, source: WeightSource, options: StageOptions, tp_mesh: DeviceMesh | None
) -> Stage:
    """Cut a chunk from the model on the meta device, split it over tp and fill only its own slices."""
    selective = options.recompute is Recompute.SELECTIVE
    contexts = options.dropout.contexts(options.contexts)
    core = options.context.attention_name() if options.context else options.attention
    if core == "sdpa" and has_uneven_heads(splitter.config):
        core = register_even_heads(core)
    if dropout.has_attention_dropout(splitter.config):
        core = dropout.register_attention(core)
    attention = register_selective(contexts, core) if selective else core
    whole = meta_model(splitter.config, attention)
    module = StageModule(whole, plan, splitter)
    module.dropout, module.context = options.dropout, options.context
    dropout.install(module, splitter.family.attention, splitter.region, options.dropout)
    if options.context is not None:
        dropout.refuse_parts_of_sequences(splitter.config, module)
    if options.recompute is Recompute.FULL:
        recompute_layers(module.layers, options.recompute_every, contexts)
    slices = parameter_slices(module, splitter)
    masters: dict[str, Tensor] = {}
    kept = masters if options.masters else None
    materialize(module, slices, source, options.dtype, options.device, tp_mesh, kept)
    for part in module.modules():
        if any(buffer.is_meta for buffer in part.buffers(recurse=False)):  # of modules without parameters
            draw_buffers(part, whole, options.device)
    return Stage(module, slices, masters)

"""ModelSpec: a decoder as numbers - its tensors, its matrix products, its token mixers - layer by layer.

Distinct layer kinds are stored once (`kinds`) and `pattern[i]` says which kind layer i is, so that costs
are computed per kind and multiplied by counts. Shapes are global (unsplit); how a tensor splits over the tensor- or
expert-parallel axes is told by its `split_dim`, `split_units` and `experts` (per-rank counts: models.counting).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod
from os import PathLike
from typing import Literal

Split = Literal["column", "row", "none"]


class Part(StrEnum):
    """Which part of the model a tensor or product belongs to."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"  # any token mixer: softmax attention, linear attention, state space
    MLP = "mlp"
    SHARED_EXPERT = "shared_expert"
    EXPERT = "expert"  # routed experts: split over ep and expert_tp, not tp
    ROUTER = "router"
    NORM = "norm"
    HEAD = "head"
    MTP = "mtp"  # multi-token-prediction extras


@dataclass(frozen=True)
class TensorSpec:
    """One parameter tensor, named as transformers names it (relative to its layer for layer tensors).

    `split_units` is the number of indivisible pieces along dimension `split_dim` (query heads, KV heads, MLP columns,
    vocabulary rows), or None where the tensor is replicated over tp. Each tp rank holds ceil(units / tp) pieces, the
    last ranks fewer; with fewer pieces than ranks (KV heads < tp) each piece is replicated over a group of ranks.
    A tensor that fuses parts with different units (q heads beside KV heads) lists them in `fused` as (rows along
    `split_dim`, units); `split_units` is then the smallest of them. For routed experts, `experts` is their number
    (split over ep), and `split_units` splits over expert_tp. `bits` is the stored size of one element where the
    config says that the checkpoint is quantised (scales included), None elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    split_units: int | None = None
    experts: int = 0
    split_dim: int | None = None
    fused: tuple[tuple[int, int], ...] = ()
    bits: float | None = None

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class Matmul:
    """A weight product y[tokens, n] = x[tokens, k] W[k, n] (global sizes).

    `split` is 'column' (n is divided by tp), 'row' (k is), or 'none'. For routed experts k and n are those of one
    expert, and every token is multiplied `tokens_factor` = experts per token (top-k) times, spread over `experts`.
    """

    name: str
    k: int
    n: int
    split: Split
    part: Part
    split_units: int | None = None
    experts: int = 0
    tokens_factor: float = 1.0


@dataclass(frozen=True)
class Attention:
    """Softmax attention (MHA, GQA, MQA, MLA). Head sizes are per head; MLA has qk_dim != v_dim.

    `window` limits the keys a query sees (sliding or chunked), `top_k_keys` the keys a sparse indexer picks, whose
    own cost is `indexer_heads` x `indexer_dim` per query-key pair. `kv_cache_elements` is what a cached key
    takes in a layer before tp: 2 * kv_heads * head_dim, or kv_lora + rope for MLA (replicated over tp: then
    `kv_replicated`), `indexer_dim` of its index key included. `kv_compression` > 1 is compressed attention: besides the
    `window` latest tokens a query sees one key per that many tokens of the past (at most `top_k_keys` of them), and
    that is what the cache keeps. `absorbed_dims` are the (qk, v) sizes per head that MLA works with when it decodes
    from its compressed cache.
    """

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    kv_cache_elements: int
    kv_replicated: bool = False
    window: int | None = None
    top_k_keys: int | None = None
    indexer_heads: int = 0
    indexer_dim: int = 0
    kv_compression: int = 1
    chunked: bool = False  # the window is a fixed block of the sequence, not a sliding one (Llama 4)
    absorbed_dims: tuple[int, int] | None = None


@dataclass(frozen=True)
class LinearMixer:
    """A mixer whose cost is linear in sequence: gated delta net, Kimi delta attention, Mamba-2.

    State is heads x key_dim x value_dim per sequence; scanned in chunks of `chunk` tokens. `conv_channels` x
    `conv_kernel` is the short convolution. `state_bytes_per_element` is 4 where the config keeps it in fp32.
    `delta_rule` mixers (all but Mamba) correct what the state predicts before they update it.
    """

    name: str
    heads: int
    key_dim: int
    value_dim: int
    chunk: int
    conv_channels: int
    conv_kernel: int
    state_bytes_per_element: int = 2
    delta_rule: bool = True

    @property
    def state_bytes(self) -> int:
        """Bytes that one sequence keeps per layer: the state and the last conv_kernel - 1 inputs (16 bit)."""
        state = self.heads * self.key_dim * self.value_dim * self.state_bytes_per_element
        return state + self.conv_channels * (self.conv_kernel - 1) * 2


@dataclass(frozen=True)
class DenseMlp:
    """A feed-forward block of `width` columns; gated blocks have two input products."""

    width: int
    gated: bool


@dataclass(frozen=True)
class MoeMlp:
    """Routed experts. `shared_width` is the total width of the always-on experts (0: none). `latent` is the width of
    the tokens that travel to the experts where the layer projects them down first (None: hidden)."""

    experts: int
    top_k: int
    width: int
    gated: bool
    shared_width: int = 0
    shared_gated: bool = True
    latent: int | None = None


@dataclass(frozen=True)
class LayerKind:
    """One kind of decoder layer. `mixer` or `mlp` is None where the layer lacks it (Nemotron-H blocks).

    `norms` is the number of norms of hidden width that the layer applies to its input or outputs.
    """

    name: str
    mixer: Attention | LinearMixer | None
    mlp: DenseMlp | MoeMlp | None
    tensors: tuple[TensorSpec, ...]
    matmuls: tuple[Matmul, ...]
    norms: int = 2

    @property
    def top_k(self) -> int:
        """Experts per token, 0 where the layer has none."""
        return self.mlp.top_k if isinstance(self.mlp, MoeMlp) else 0


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only language model.

    `parameters` equals transformers' own model of the same config (multi-token-prediction layers, which
    transformers does not build, are in `mtp_tensors` and counted by `mtp_parameters`). `weight_bits` is the mean
    stored size of the tensors that a quantised checkpoint quantises; the others take `dtype_bits`.
    """

    name: str
    model_type: str
    hidden: int
    vocab: int
    kinds: tuple[LayerKind, ...]
    pattern: tuple[int, ...]
    embedding_tensors: tuple[TensorSpec, ...]  # token, position embeddings, and their norms
    final_tensors: tuple[TensorSpec, ...]  # final norm
    head_tensors: tuple[TensorSpec, ...]  # LM head; empty when tied
    tied_embeddings: bool
    activation: str = "silu"
    dropout: float = 0.0
    residual_streams: int = 1  # hyper-connections keep several
    max_positions: int | None = None
    mtp_tensors: tuple[TensorSpec, ...] = ()
    mtp_layers: int = 0  # multi-token-prediction modules; each costs an `mtp_kind` layer and a pass of the head
    mtp_kind: LayerKind | None = None  # their layer, with the product that joins its two inputs
    weight_bits: float | None = None  # of quantised checkpoints (average over quantised tensors)
    source: str = ""
    dtype_bits: int = 16  # of the tensors that are not quantised, as the config's dtype says
    balanced_experts: int = 0  # experts of the load-balancing loss that the config adds in training (0: it adds none)

    @classmethod
    def from_config(cls, config: str | PathLike[str] | dict[str, object]) -> ModelSpec:
        """The model of a config.json: its path, the folder that holds it, or its content."""
        from meshwright.models.from_config import spec_from_config

        return spec_from_config(config)

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    @property
    def parameters(self) -> int:
        """Total parameter count."""
        counts = self.layer_counts(0, self.num_layers)
        layers = sum(n * sum(t.size for t in kind.tensors) for n, kind in zip(counts, self.kinds, strict=True))
        return layers + sum(t.size for t in self.outer_tensors)

    @property
    def outer_tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor outside the decoder layers (and outside the multi-token-prediction layers)."""
        return self.embedding_tensors + self.final_tensors + self.head_tensors

    @property
    def tied_tensors(self) -> tuple[TensorSpec, ...]:
        """The embedding table, where the LM head uses it: the last stage of several holds a copy."""
        return self.embedding_tensors[:1] if self.tied_embeddings else ()

    @property
    def output_tensors(self) -> tuple[TensorSpec, ...]:
        """Tensors of the LM head on a stage that has no embedding: its own or the copy of the tied table."""
        return self.head_tensors + self.tied_tensors

    @property
    def head_matmul(self) -> Matmul:
        """The product of the LM head, tied or not."""
        return Matmul("lm_head", self.hidden, self.vocab, "column", Part.HEAD, self.vocab)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights as the checkpoint stores them (multi-token-prediction layers left out)."""

        def stored(tensors: tuple[TensorSpec, ...]) -> float:
            return sum(t.size * (self.dtype_bits if t.bits is None else t.bits) for t in tensors) / 8

        counts = self.layer_counts(0, self.num_layers)
        layers = sum(n * stored(kind.tensors) for n, kind in zip(counts, self.kinds, strict=True))
        return layers + stored(self.outer_tensors)

    @property
    def mtp_parameters(self) -> int:
        return sum(t.size for t in self.mtp_tensors)

    def layer_counts(self, start: int, stop: int) -> tuple[int, ...]:
        """Layers of each kind among layers start..stop-1."""
        window = self.pattern[start:stop]
        return tuple(window.count(k) for k in range(len(self.kinds)))

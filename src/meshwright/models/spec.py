"""ModelSpec: a decoder as numbers - its tensors, its matrix products, its token mixers - layer by layer.

Distinct layer kinds are stored once (`kinds`) and `pattern[i]` says which kind layer i is, so that costs
are computed per kind and multiplied by counts. Shapes are global (unsplit); how a tensor splits over the
tensor- or expert-parallel axes is part of its `Split`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod


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

    `split_units` is the number of indivisible pieces along the split dimension (query heads, KV heads, MLP
    columns, vocabulary rows), or None where the tensor is replicated over tp. A tensor with fewer units than
    ranks (KV heads < tp) is replicated in groups: a rank holds ceil(units / tp) / units of it. For routed
    experts, `experts` is their number (split over ep), and `split_units` splits over expert_tp.
    `trainable_state` is False for buffers that the state dict holds but no optimizer touches.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    split_units: int | None = None
    experts: int = 0

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class Matmul:
    """A weight product y[tokens, n] = x[tokens, k] W[k, n] (global sizes), `count` times per layer.

    `split` is 'column' (n is divided by tp), 'row' (k is), or 'none'. For routed experts tokens are the routed
    copies: `tokens_factor` = experts per token (top-k), spread over `experts` groups.
    """

    name: str
    k: int
    n: int
    split: str
    part: Part
    split_units: int | None = None
    experts: int = 0
    tokens_factor: float = 1.0


@dataclass(frozen=True)
class Attention:
    """Softmax attention (MHA, GQA, MQA, MLA). Head sizes are per head; MLA has qk_dim != v_dim.

    `window` limits the keys a query sees (sliding or chunked), `top_k_keys` the keys a sparse indexer picks, whose
    own cost is `indexer_heads` x `indexer_dim` per query-key pair. `kv_cache_elements` is what a token leaves in the
    cache per layer before tp: 2 * kv_heads * head_dim, or kv_lora + rope for MLA (replicated over tp: then
    `kv_replicated`).
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
    kv_compression: int = 1  # one cached key per this many tokens (compressed sparse attention)


@dataclass(frozen=True)
class LinearMixer:
    """A mixer whose cost is linear in sequence: gated delta net, Kimi delta attention, Mamba-2.

    State is heads x key_dim x value_dim per sequence; scanned in chunks of `chunk` tokens. `conv_channels` x
    `conv_kernel` is the short convolution. `state_bytes_per_element` is 4 where the config keeps it in fp32.
    """

    name: str
    heads: int
    key_dim: int
    value_dim: int
    chunk: int
    conv_channels: int
    conv_kernel: int
    state_bytes_per_element: int = 2


@dataclass(frozen=True)
class DenseMlp:
    """A feed-forward block of `width` columns; gated blocks have two input products."""

    width: int
    gated: bool


@dataclass(frozen=True)
class MoeMlp:
    """Routed experts. `shared_width` is the total width of the always-on experts (0: none)."""

    experts: int
    top_k: int
    width: int
    gated: bool
    shared_width: int = 0
    shared_gated: bool = True


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


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only language model.

    `parameters` equals transformers' own model of the same config (multi-token-prediction layers, which
    transformers does not build, are in `mtp_tensors` and counted by `mtp_parameters`).
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
    mtp_layers: int = 0  # predicted-token depth; each costs about a layer of the last kind plus a head pass
    weight_bits: float | None = None  # of quantised checkpoints (average over quantised tensors)
    source: str = ""

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    @property
    def parameters(self) -> int:
        """Total parameter count."""
        outer = self.embedding_tensors + self.final_tensors + self.head_tensors
        per_kind = [sum(t.size for t in kind.tensors) for kind in self.kinds]
        return sum(t.size for t in outer) + sum(per_kind[k] for k in self.pattern)

    @property
    def mtp_parameters(self) -> int:
        return sum(t.size for t in self.mtp_tensors)

    def layer_counts(self, start: int, stop: int) -> tuple[int, ...]:
        """Layers of each kind among layers start..stop-1."""
        window = self.pattern[start:stop]
        return tuple(window.count(k) for k in range(len(self.kinds)))

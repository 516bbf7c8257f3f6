"""The terms in which a decoder family of transformers is described; `parallelize` and `stage` follow them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Units(StrEnum):
    """What is indivisible along the split dimension of a product."""

    HEADS = "attention heads"
    KV_HEADS = "KV heads"
    MLP = "MLP columns"


class Split(StrEnum):
    COLUMN = "column"
    ROW = "row"


@dataclass(frozen=True)
class Product:
    """A linear module of a layer. `blocks`: units of each block of a fused weight (one block: not fused).

    `transposed`: stored [in, out] (GPT-2's Conv1D).
    """

    path: str
    split: Split
    blocks: tuple[Units, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Experts:
    """The routed experts of those layers of a family that have them, by path inside the layer.

    `router` chooses experts for the tokens of one tp rank; `experts` holds the stacked weights. `shared`: an always-on
    MLP beside them, split like any MLP. `count`: the config's name for the number of routed experts.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    shared: str | None = None
    count: str = "num_experts"


@dataclass(frozen=True)
class Family:
    """Names of the parts inside the causal language model of a family.

    `norms` are modules of a layer that are replicated over tp; `head_norms` those inside a split block, where each tp
    rank has a part of their gradient: norms of single heads, products before the split of latent attention. `vectors`
    are loose parameters with one element per unit. Parts that a layer does not have are passed over.
    """

    base: str
    embedding: str
    layers: str
    final_norm: str
    attention: str
    mlp: str
    products: tuple[Product, ...]
    norms: tuple[str, ...]
    rotary: str | None = "rotary_emb"
    position_embedding: str | None = None
    embedding_dropout: str | None = None
    head_norms: tuple[str, ...] = ()
    local_config_heads: bool = False  # attention reads config.num_attention_heads
    split_size: bool = False  # attention cuts its fused output at `split_size`
    layer_mask: str = "causal"  # 'causal', 'sliding' (all layers, if config has a window) or 'by layer' (layer_types)
    rotary_by_layer: bool = False
    moe: Experts | None = None
    vectors: tuple[tuple[str, Units], ...] = ()
    attention_function: str | None = None  # where the family has only this one


def unit_count(config: Any, units: Units) -> int | None:
    """How many of the units the model has; None where it is the width itself."""
    if units is Units.HEADS:
        return int(config.num_attention_heads)
    if units is Units.KV_HEADS:
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return None


def expert_count(config: Any, family: Family) -> int:
    """Routed experts per layer, 0 where the family has none."""
    return int(getattr(config, family.moe.count, None) or 0) if family.moe else 0

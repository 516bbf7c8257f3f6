"""Attention whose values are narrower than its keys (latent attention), on the CPU.

torch's CPU kernel wants heads of one size and else falls back to products over all pairs of tokens, s^2 fp32 numbers
per head that are kept for backward. Columns of zeros make the sizes even; they add nothing and are cut off again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

EVEN_HEADS = "meshwright_even_heads"


def has_uneven_heads(config: Any) -> bool:
    """Whether values are narrower than queries and keys."""
    value, plain = getattr(config, "v_head_dim", None), getattr(config, "qk_nope_head_dim", None)
    return value is not None and plain is not None and value < plain + int(config.qk_rope_head_dim)


def register_even_heads(attention: str) -> str:
    """Register `attention` with values widened where that helps; returns its name for transformers."""
    core = ALL_ATTENTION_FUNCTIONS[attention]

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **keywords: Any) -> Any:
        missing = q.shape[-1] - v.shape[-1]
        if missing == 0 or q.device.type != "cpu":
            return core(module, q, k, v, mask, **keywords)
        mixed, weights = core(module, q, k, functional.pad(v, (0, missing)), mask, **keywords)
        return mixed[..., : v.shape[-1]], weights

    name = f"{EVEN_HEADS}_{attention}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return name

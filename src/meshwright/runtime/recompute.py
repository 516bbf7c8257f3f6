"""Activation recompute: what of a layer's forward pass is thrown away and computed again in the backward pass.

`none` keeps everything, `full` keeps only the input of one layer of every n, `selective` recomputes core attention only
(Korthikanti et al. 2022, section 5). What recomputation communicates is booked on the backward phase, where it happens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes the contexts that wrap the forward pass and its recomputation (the second also runs during backward)."""

SELECTIVE = "meshwright_recomputed_sdpa"


def no_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), nullcontext()


def recompute_layers(layers: nn.ModuleDict, every: int, contexts: Contexts = no_contexts) -> None:
    """Recompute the layers whose global index is a multiple of `every`. Uses the hook that transformers' layers have
    inside their forward, so that FSDP's own hooks stay outside and run once."""
    for index, layer in layers.items():
        if int(index) % every == 0:
            layer.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]
            layer._gradient_checkpointing_func = partial(  # pyright: ignore[reportArgumentType]
                checkpoint, use_reentrant=False, context_fn=contexts
            )


def register_selective(contexts: Contexts = no_contexts, attention: str = "sdpa") -> str:
    """Register an attention function that recomputes core attention; returns its name for transformers."""
    core = ALL_ATTENTION_FUNCTIONS[attention]

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **keywords: Any) -> Any:
        return checkpoint(partial(core, module, **keywords), q, k, v, mask, use_reentrant=False, context_fn=contexts)

    AttentionInterface.register(SELECTIVE, attend)
    AttentionMaskInterface.register(SELECTIVE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return SELECTIVE

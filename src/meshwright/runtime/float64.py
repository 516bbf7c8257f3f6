"""Run Hugging Face modules wholly in float64: lift the casts to fp32 inside norms, softmax and rotary embeddings.

Those casts would hide errors below 1e-7 in a comparison of two float64 runs. `keep_float64()` is entered around the
forward pass of both; `recompute_contexts` re-enters it where checkpointing recomputes during backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOWER = frozenset({torch.float32, torch.bfloat16, torch.float16})
_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
_TYPED = frozenset({Tensor.to, Tensor.type, Tensor.type_as})


def _is_double(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


class keep_float64(TorchFunctionMode):  # noqa: N801 - read as a context manager, like torch.no_grad
    """While active, float64 tensors stay float64 whatever narrower floating type is asked for, and zeros to add to are
    float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        if func is torch.zeros and _is_lower(keywords.get("dtype")):  # sums that are begun in fp32 (routers' shares)
            keywords["dtype"] = torch.float64
        if args and _is_double(args[0]):
            if func in _CASTS:
                return args[0]
            if func in _TYPED:
                args = (args[0], *(torch.float64 if _is_lower(a) else a for a in args[1:]))
            if _is_lower(keywords.get("dtype")):
                keywords["dtype"] = torch.float64
        return func(*args, **keywords)


def _is_lower(value: object) -> bool:
    return isinstance(value, torch.dtype) and value in _LOWER


def recompute_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For torch.utils.checkpoint: the mode is already on in the forward pass and off during backward."""
    return nullcontext(), keep_float64()

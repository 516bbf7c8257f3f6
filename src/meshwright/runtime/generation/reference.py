"""What one process of plain transformers answers in float32, and how sure it is of each token.

In: a folder of safetensors (or a config and seed) and prompts. Out: per prompt the greedy token ids with the gap
between the largest and the second largest logit: where a served token differs, it says whether rounding can explain
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class ReferenceAnswer:
    """Token ids, and at each the gap between the two largest logits."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]


def reference_answers(
    folder: Path, prompts: Sequence[Sequence[int]], new_tokens: int, model: Any | None = None
) -> list[ReferenceAnswer]:
    """Greedy answers of `new_tokens` tokens each (no end token stops them), one prompt at a time."""
    loaded: Any = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded.eval()
    found: list[ReferenceAnswer] = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            out = loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            gaps: list[float] = []
            for logits in out.logits:
                first, second = logits[0].topk(2).values.tolist()
                gaps.append(first - second)
            found.append(ReferenceAnswer(tuple(out.sequences[0, len(prompt) :].tolist()), tuple(gaps)))
    return found

"""How a framework that balances stages by cost cuts the layers: what nanotron does where others count layers.

In: a model and the number of stages. Out: layers per stage. Walking through the blocks (layers, then the LM head), a
stage takes blocks until their cumulative weight reaches its share of the total; a block weighs what its products do.
"""

from __future__ import annotations

from meshwright.models.spec import ModelSpec, Part


def split_by_cost(model: ModelSpec, stages: int) -> tuple[int, ...]:
    """Decoder layers of each stage; the last may be left with the head alone."""
    per_kind = [
        sum(m.k * m.n * m.tokens_factor for m in kind.matmuls if m.part is not Part.HEAD) for kind in model.kinds
    ]
    weights = [per_kind[kind] for kind in model.pattern]
    total = sum(weights) + model.vocab * model.hidden
    split = [0] * stages
    stage, so_far = 0, 0.0
    for weight in weights:
        split[stage] += 1
        so_far += weight
        if so_far >= total * (stage + 1) / stages:
            stage = min(stage + 1, stages - 1)
    return tuple(split)

"""Strategies and brute force for the tests of layouts."""

from __future__ import annotations

from itertools import product

from hypothesis import strategies as st

from meshwright.layout import HybridParallelConfig

small = st.integers(1, 4)


@st.composite
def configs(draw: st.DrawFn, context: bool = True) -> HybridParallelConfig:
    """Consistent configs of up to a few hundred ranks, expert axes included."""
    dp, tp, pp = draw(small), draw(small), draw(small)
    cp = draw(st.integers(1, 3)) if context else 1
    ranks = dp * cp * tp
    expert_tp = draw(st.sampled_from([d for d in range(1, ranks + 1) if ranks % d == 0]))
    ep = draw(st.sampled_from([d for d in range(1, ranks // expert_tp + 1) if ranks // expert_tp % d == 0]))
    shards = draw(st.sampled_from([None, *(d for d in range(1, dp * cp + 1) if dp * cp % d == 0)]))
    return HybridParallelConfig(dp=dp, tp=tp, pp=pp, cp=cp, ep=ep, expert_tp=expert_tp, zero_shards=shards)


def brute_groups(order: str, sizes: dict[str, int], inside: set[str]) -> list[list[int]]:
    """Groups by counting: rank = sum of coordinate x stride, axes innermost first in `order`; ranks that agree on all
    axes but those of `inside` form a group. Groups and members in Megatron's order: innermost axis fastest."""
    axes = order.split("-")
    stride, strides = 1, {}
    for axis in axes:
        strides[axis] = stride
        stride *= sizes[axis]
    outer_first = axes[::-1]

    def places(names: list[str]) -> list[dict[str, int]]:
        return [dict(zip(names, place, strict=True)) for place in product(*(range(sizes[a]) for a in names))]

    def rank(place: dict[str, int]) -> int:
        return sum(strides[a] * c for a, c in place.items())

    outside = [a for a in outer_first if a not in inside]
    within = [a for a in outer_first if a in inside]
    return [[rank({**group, **member}) for member in places(within)] for group in places(outside)]

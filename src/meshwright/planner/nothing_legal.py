"""Why a space of configurations is empty, as one line that says what to change.

The user's fixed sizes are tried one by one against the rules of layout, then together against the number of GPUs and
the global batch; what is left is a matter of counts that do not divide.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import gcd

from meshwright.errors import InputError
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig, Schedule
from meshwright.layout.rules import nearest
from meshwright.layout.validate import violations
from meshwright.models.spec import ModelSpec
from meshwright.planner.constraints import Constraints
from meshwright.planner.enumerate import space
from meshwright.planner.legality import model_facts
from meshwright.planner.table import divisors

SHARED = ("tp", "pp", "cp", "dp")


def nothing_legal(model: ModelSpec, cluster: Cluster, seq: int, global_batch: int, fixed: Constraints) -> InputError:
    """The error for a search that has nothing to search."""
    return InputError(
        _one_size(model, seq, fixed)
        or _sizes_together(cluster.gpus, fixed)
        or _batch(cluster.gpus, global_batch, fixed)
        or _one_knob_too_many(model, cluster, seq, global_batch, fixed)
        or _counts(model, cluster, seq, global_batch, fixed)
    )


def _one_size(model: ModelSpec, seq: int, fixed: Constraints) -> str:
    """A fixed size that the model does not allow, in the words of layout's rules."""
    facts = model_facts(model, seq)
    for name in ("tp", "pp", "cp", "ep", "expert_tp"):
        messages: list[str] = []
        for value in getattr(fixed, name) or ():
            room = value if name in ("ep", "expert_tp") else 1
            config = replace(HybridParallelConfig(dp=room, global_batch=room), **{name: value})
            messages += violations(config, facts)[:1]
        if messages and len(messages) == len(getattr(fixed, name)):
            return messages[0]
    return _chunks(model, fixed)


def _chunks(model: ModelSpec, fixed: Constraints) -> str:
    """Fixed vpp that makes more chunks than the model has layers, whatever pp it is combined with."""
    if fixed.vpp is None:
        return ""
    stages, chunks = fixed.pp or (2,), fixed.vpp
    if any(pp * vpp <= model.num_layers for pp, vpp in product(stages, chunks)):
        return ""
    pp, vpp = min(stages), min(chunks)
    return (
        f"pp={pp} x vpp={vpp} = {pp * vpp} chunks, but the model has {model.num_layers} layers; use vpp of at most "
        f"{model.num_layers // pp}"
    )


def _sizes_together(gpus: int, fixed: Constraints) -> str:
    """Fixed sizes whose product does not divide the GPUs, whichever of the allowed values are combined."""
    named = [n for n in SHARED if getattr(fixed, n) is not None]
    choices = [getattr(fixed, n) for n in named]
    if not named or any(gpus % _product(values) == 0 for values in product(*choices)):
        return ""
    values = next(product(*choices))
    whole = _product(values)
    sizes = " x ".join(f"{n}={v}" for n, v in zip(named, values, strict=True))
    hint = nearest(whole, divisors(gpus))
    return f"{sizes} = {whole} does not divide {gpus} GPUs; try a product of {hint}"


def _product(values: tuple[int, ...]) -> int:
    whole = 1
    for value in values:
        whole *= value
    return whole


def _batch(gpus: int, global_batch: int, fixed: Constraints) -> str:
    """A fixed dp or micro batch that does not divide the global batch."""
    replicas = fixed.dp or (1,)
    micro = fixed.micro_batch or (1,)
    units = sorted({d * m for d in replicas for m in micro})
    if any(global_batch % unit == 0 for unit in units):
        return ""
    unit = units[0]
    below = global_batch // unit * unit
    near = " or ".join(str(b) for b in (below, below + unit) if b)
    return f"global batch {global_batch} is not a multiple of dp x micro batch = {unit} on {gpus} GPUs; try {near}"


def _one_knob_too_many(model: ModelSpec, cluster: Cluster, seq: int, global_batch: int, fixed: Constraints) -> str:
    """A single fixed knob without which something is legal."""
    for name, values in fixed.fixed.items():
        freed = space(model, cluster, seq, cluster.gpus, global_batch, replace(fixed, **{name: None}))
        if len(freed) == 0:
            continue
        first = next(freed.chunks(1))[1].config(0)
        value = getattr(first, name)
        shown = value.value if isinstance(value, Schedule) else value
        asked = ", ".join(str(getattr(v, "value", v)) for v in values)
        return f"no legal configuration of {cluster.gpus} GPUs has {name}={asked}; without it {name}={shown} is one"
    return ""


def _counts(model: ModelSpec, cluster: Cluster, seq: int, global_batch: int, fixed: Constraints) -> str:
    """GPUs and global batch that have no split: the smallest batches that would."""
    for batch in (global_batch + 1, gcd(cluster.gpus, 2**20), cluster.gpus):
        if batch > 0 and len(space(model, cluster, seq, cluster.gpus, batch, fixed)):
            return f"{cluster.gpus} GPUs cannot share a global batch of {global_batch} sequences; try {batch}"
    heads = model_facts(model).heads
    return (
        f"{cluster.gpus} GPUs do not divide into tp (of {heads} heads), pp (of {model.num_layers} layers) and dp (of "
        f"{global_batch} sequences); try a power of two of GPUs"
    )

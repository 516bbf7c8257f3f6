"""The parts that decoder layers are made of: linears, norms, attention (GQA, MLA), MLPs, routed experts.

Each function returns a `Block`: tensors under transformers' names with their split, the weight products, and the
mixer or MLP they make up. Family recipes add blocks into layer kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshwright.models.spec import (
    Attention,
    DenseMlp,
    LayerKind,
    LinearMixer,
    Matmul,
    MoeMlp,
    Part,
    Split,
    TensorSpec,
)

Mixer = Attention | LinearMixer
Mlp = DenseMlp | MoeMlp


@dataclass(frozen=True)
class Block:
    """A part of a layer. Adding blocks concatenates their tensors and products."""

    tensors: tuple[TensorSpec, ...] = ()
    matmuls: tuple[Matmul, ...] = ()
    mixer: Mixer | None = None
    mlp: Mlp | None = None
    norms: int = 0

    def __add__(self, other: Block) -> Block:
        return Block(
            self.tensors + other.tensors,
            self.matmuls + other.matmuls,
            self.mixer or other.mixer,
            self.mlp or other.mlp,
            self.norms + other.norms,
        )

    def kind(self, name: str) -> LayerKind:
        """The layer kind made of this block alone."""
        return LayerKind(name, self.mixer, self.mlp, self.tensors, self.matmuls, self.norms)


def prefixed(prefix: str, tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(t, name=f"{prefix}{t.name}") for t in tensors)


def vector(name: str, size: int, part: Part, units: int | None = None) -> Block:
    """A loose one-dimensional parameter (sinks, decay rates, biases)."""
    return Block((TensorSpec(name, (size,), part, units, split_dim=None if units is None else 0),))


def norm(name: str, size: int, bias: bool = False, *, over_hidden: bool = True, units: int | None = None) -> Block:
    """A norm's weight (and bias). `over_hidden` says that it runs over the hidden width; `units` that it is split."""
    dim = None if units is None else 0
    tensors = [TensorSpec(f"{name}.weight", (size,), Part.NORM, units, split_dim=dim)]
    if bias:
        tensors.append(TensorSpec(f"{name}.bias", (size,), Part.NORM, units, split_dim=dim))
    return Block(tuple(tensors), norms=1 if over_hidden else 0)


def linear(
    name: str,
    k: int,
    n: int,
    split: Split,
    part: Part,
    units: int | None = None,
    *,
    bias: bool = False,
    transposed: bool = False,
    fused: tuple[tuple[int, int], ...] = (),
) -> Block:
    """A linear layer [n, k] (Conv1D, `transposed`: [k, n]). `fused` lists (columns, units) of parts of n that split by
    different units; each becomes a product of its own, so that products keep one unit each."""
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    units = min(u for _, u in fused) if fused else units
    dim = {"column": out_dim, "row": in_dim, "none": None}[split]
    shape = (k, n) if transposed else (n, k)
    tensors = [TensorSpec(f"{name}.weight", shape, part, units, split_dim=dim, fused=fused)]
    if bias:
        column = split == "column"
        tensors.append(
            TensorSpec(f"{name}.bias", (n,), part, units if column else None, 0, 0 if column else None, fused)
        )
    products = [(name, n, units)]
    if fused:
        products = [(f"{name}.{i}", columns, u) for i, (columns, u) in enumerate(fused)]
    return Block(tuple(tensors), tuple(Matmul(label, k, width, split, part, u) for label, width, u in products))


@dataclass(frozen=True)
class Heads:
    """The head counts and sizes of grouped-query attention."""

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int | None = None

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_dim is None else self.v_dim


def softmax_attention(sizes: Heads, window: int | None = None, *, chunked: bool = False) -> Attention:
    """Grouped-query attention as a mixer; the cache keeps keys and values of every KV head."""
    return Attention(
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        sizes.value_dim,
        kv_cache_elements=sizes.kv_heads * (sizes.head_dim + sizes.value_dim),
        window=window,
        chunked=chunked,
    )


def gqa(
    hidden: int,
    sizes: Heads,
    *,
    prefix: str = "self_attn.",
    output: str = "o_proj",
    qkv_bias: bool = False,
    output_bias: bool = False,
    window: int | None = None,
    chunked: bool = False,
    gated_output: bool = False,
    values: bool = True,
) -> Block:
    """Separate q, k, v and output projections. `gated_output` doubles q by an output gate (Qwen3-Next);
    `values=False` is attention whose values are its keys (Gemma 4)."""
    q_width = sizes.heads * sizes.head_dim * (2 if gated_output else 1)
    k_width, v_width = sizes.kv_heads * sizes.head_dim, sizes.kv_heads * sizes.value_dim
    part = Part.ATTENTION
    block = linear(f"{prefix}q_proj", hidden, q_width, "column", part, sizes.heads, bias=qkv_bias)
    block += linear(f"{prefix}k_proj", hidden, k_width, "column", part, sizes.kv_heads, bias=qkv_bias)
    if values:
        block += linear(f"{prefix}v_proj", hidden, v_width, "column", part, sizes.kv_heads, bias=qkv_bias)
    o_width = sizes.heads * sizes.value_dim
    block += linear(f"{prefix}{output}", o_width, hidden, "row", part, sizes.heads, bias=output_bias)
    return replace(block, mixer=softmax_attention(sizes, window, chunked=chunked))


def fused_qkv(name: str, hidden: int, sizes: Heads, *, bias: bool = False, transposed: bool = False) -> Block:
    """One projection to queries, keys and values. With as many KV heads as heads it splits by heads."""
    q, kv = sizes.heads * sizes.head_dim, 2 * sizes.kv_heads * sizes.head_dim
    fused = ((q, sizes.heads), (kv, sizes.kv_heads)) if sizes.kv_heads != sizes.heads else ()
    block = linear(
        name, hidden, q + kv, "column", Part.ATTENTION, sizes.heads, bias=bias, transposed=transposed, fused=fused
    )
    return replace(block, mixer=softmax_attention(sizes))


@dataclass(frozen=True)
class MlaSizes:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). `q_rank` None: q is not compressed."""

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim


def mla(hidden: int, sizes: MlaSizes, *, bias: bool = False) -> Block:
    """Latent attention: the down-projections are replicated over tp, the up-projections split by heads."""
    part, heads, prefix = Part.ATTENTION, sizes.heads, "self_attn."
    q_width = heads * sizes.qk_dim
    if sizes.q_rank is None:
        block = linear(f"{prefix}q_proj", hidden, q_width, "column", part, heads)
    else:
        block = linear(f"{prefix}q_a_proj", hidden, sizes.q_rank, "none", part, bias=bias)
        block += norm(f"{prefix}q_a_layernorm", sizes.q_rank, over_hidden=False)
        block += linear(f"{prefix}q_b_proj", sizes.q_rank, q_width, "column", part, heads)
    cached = sizes.kv_rank + sizes.rope_dim
    block += linear(f"{prefix}kv_a_proj_with_mqa", hidden, cached, "none", part, bias=bias)
    block += norm(f"{prefix}kv_a_layernorm", sizes.kv_rank, over_hidden=False)
    kv_width = heads * (sizes.nope_dim + sizes.v_dim)
    block += linear(f"{prefix}kv_b_proj", sizes.kv_rank, kv_width, "column", part, heads)
    block += linear(f"{prefix}o_proj", heads * sizes.v_dim, hidden, "row", part, heads, bias=bias)
    mixer = Attention(
        heads,
        heads,
        sizes.qk_dim,
        sizes.v_dim,
        kv_cache_elements=cached,
        kv_replicated=True,
        absorbed_dims=(cached, sizes.kv_rank),
    )
    return replace(block, mixer=mixer)


def gated_mlp(
    hidden: int, width: int, *, prefix: str = "mlp.", bias: bool = False, fused: bool = False, part: Part = Part.MLP
) -> Block:
    """down(act(gate(x)) * up(x)). `fused`: gate and up are one tensor `gate_up_proj`."""
    if fused:
        halves = linear(f"{prefix}gate_up_proj", hidden, 2 * width, "column", part, width, bias=bias)
    else:
        halves = linear(f"{prefix}gate_proj", hidden, width, "column", part, width, bias=bias)
        halves += linear(f"{prefix}up_proj", hidden, width, "column", part, width, bias=bias)
    block = halves + linear(f"{prefix}down_proj", width, hidden, "row", part, width, bias=bias)
    return replace(block, mlp=DenseMlp(width, True) if part is Part.MLP else None)


def plain_mlp(
    hidden: int,
    width: int,
    names: tuple[str, str],
    *,
    bias: bool = True,
    transposed: bool = False,
    part: Part = Part.MLP,
) -> Block:
    """down(act(up(x))) with the two linears named by `names`."""
    block = linear(names[0], hidden, width, "column", part, width, bias=bias, transposed=transposed)
    block += linear(names[1], width, hidden, "row", part, width, bias=bias, transposed=transposed)
    return replace(block, mlp=DenseMlp(width, False) if part is Part.MLP else None)


def router(name: str, hidden: int, experts: int, *, bias: bool = False) -> Block:
    return linear(name, hidden, experts, "none", Part.ROUTER, bias=bias)


@dataclass(frozen=True)
class ExpertSizes:
    """The routed experts of a layer. `inner` is the width of their input where it is not hidden (latent experts)."""

    experts: int
    top_k: int
    width: int
    gated: bool = True
    inner: int | None = None


def routed_experts(
    hidden: int, sizes: ExpertSizes, *, prefix: str = "mlp.experts.", transposed: bool = False, bias: bool = False
) -> Block:
    """Stacked 3-D expert weights as transformers holds them: gate_up_proj [E, 2I, H], down_proj [E, H, I]
    (`transposed`: [E, H, 2I] and [E, I, H])."""
    e, inner, width, part = sizes.experts, sizes.inner or hidden, sizes.width, Part.EXPERT
    columns, name = (2 * width, "gate_up_proj") if sizes.gated else (width, "up_proj")
    up_shape, down_shape = (
        ((e, inner, columns), (e, width, inner))
        if transposed
        else (
            (e, columns, inner),
            (e, inner, width),
        )
    )
    up_dim, down_dim = (2, 1) if transposed else (1, 2)
    tensors = [TensorSpec(f"{prefix}{name}", up_shape, part, width, e, up_dim)]
    if bias:
        tensors.append(TensorSpec(f"{prefix}{name}_bias", (e, columns), part, width, e, 1))
    tensors.append(TensorSpec(f"{prefix}down_proj", down_shape, part, width, e, down_dim))
    if bias:
        tensors.append(TensorSpec(f"{prefix}down_proj_bias", (e, inner), part, None, e))
    products = (
        Matmul(f"{prefix}{name}", inner, columns, "column", part, width, e, sizes.top_k),
        Matmul(f"{prefix}down_proj", width, inner, "row", part, width, e, sizes.top_k),
    )
    mlp = MoeMlp(e, sizes.top_k, width, sizes.gated, latent=sizes.inner)
    return Block(tuple(tensors), products, mlp=mlp)


def with_shared_expert(block: Block, shared: Block, width: int, *, gated: bool = True) -> Block:
    """A block of routed experts plus the always-on expert of total `width`."""
    if not isinstance(block.mlp, MoeMlp):
        raise TypeError("a shared expert belongs beside routed experts")
    return replace(block + shared, mlp=replace(block.mlp, shared_width=width, shared_gated=gated))

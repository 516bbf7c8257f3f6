"""Small builders of model shapes for the tests of cost/: a decoder from its sizes, without a config file."""

from __future__ import annotations

from meshwright.models.spec import Attention, DenseMlp, LayerKind, Matmul, ModelSpec, MoeMlp, Part, TensorSpec


def dense_kind(hidden: int, heads: int, kv_heads: int, head_dim: int, width: int, gated: bool) -> LayerKind:
    """A layer of softmax attention and a dense feed-forward block, without biases; norms have a weight only."""
    q, kv = heads * head_dim, kv_heads * head_dim
    attention = (
        TensorSpec("q", (q, hidden), Part.ATTENTION, heads, split_dim=0),
        TensorSpec("k", (kv, hidden), Part.ATTENTION, kv_heads, split_dim=0),
        TensorSpec("v", (kv, hidden), Part.ATTENTION, kv_heads, split_dim=0),
        TensorSpec("o", (hidden, q), Part.ATTENTION, heads, split_dim=1),
    )
    products = (
        Matmul("q", hidden, q, "column", Part.ATTENTION, heads),
        Matmul("k", hidden, kv, "column", Part.ATTENTION, kv_heads),
        Matmul("v", hidden, kv, "column", Part.ATTENTION, kv_heads),
        Matmul("o", q, hidden, "row", Part.ATTENTION, heads),
    )
    columns = ("gate", "up") if gated else ("up",)
    mlp = tuple(TensorSpec(n, (width, hidden), Part.MLP, width, split_dim=0) for n in columns)
    mlp += (TensorSpec("down", (hidden, width), Part.MLP, width, split_dim=1),)
    products += tuple(Matmul(n, hidden, width, "column", Part.MLP, width) for n in columns)
    products += (Matmul("down", width, hidden, "row", Part.MLP, width),)
    norms = tuple(TensorSpec(n, (hidden,), Part.NORM) for n in ("norm1", "norm2"))
    mixer = Attention(heads, kv_heads, head_dim, head_dim, 2 * kv)
    return LayerKind("dense", mixer, DenseMlp(width, gated), attention + mlp + norms, products)


def moe_kind(dense: LayerKind, hidden: int, experts: int, top_k: int, width: int) -> LayerKind:
    """The same attention with routed experts (gated) instead of the dense block."""
    kept = tuple(t for t in dense.tensors if t.part in (Part.ATTENTION, Part.NORM))
    products = tuple(m for m in dense.matmuls if m.part is Part.ATTENTION)
    routed = tuple(
        TensorSpec(n, shape, Part.EXPERT, width, experts, split_dim=dim)
        for n, shape, dim in (("gate_up", (experts, 2 * width, hidden), 1), ("down", (experts, hidden, width), 2))
    )
    products += (
        Matmul("gate_up", hidden, 2 * width, "column", Part.EXPERT, width, experts, float(top_k)),
        Matmul("expert_down", width, hidden, "row", Part.EXPERT, width, experts, float(top_k)),
    )
    router = (TensorSpec("router", (experts, hidden), Part.ROUTER),)
    return LayerKind("moe", dense.mixer, MoeMlp(experts, top_k, width, gated=True), kept + routed + router, products)


def decoder(
    layers: int = 8,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int | None = None,
    width: int = 256,
    vocab: int = 512,
    gated: bool = False,
    tied: bool = True,
    moe_from: int | None = None,
    experts: int = 8,
    top_k: int = 2,
    expert_width: int = 64,
) -> ModelSpec:
    """A decoder whose layers from `moe_from` on have routed experts."""
    kinds = [dense_kind(hidden, heads, kv_heads or heads, hidden // heads, width, gated)]
    pattern = [0] * layers
    if moe_from is not None:
        kinds.append(moe_kind(kinds[0], hidden, experts, top_k, expert_width))
        pattern = [int(i >= moe_from) for i in range(layers)]
    return ModelSpec(
        name="shape",
        model_type="test",
        hidden=hidden,
        vocab=vocab,
        kinds=tuple(kinds),
        pattern=tuple(pattern),
        embedding_tensors=(TensorSpec("embed", (vocab, hidden), Part.EMBEDDING, vocab, split_dim=0),),
        final_tensors=(TensorSpec("norm", (hidden,), Part.NORM),),
        head_tensors=() if tied else (TensorSpec("head", (vocab, hidden), Part.HEAD, vocab, split_dim=0),),
        tied_embeddings=tied,
    )

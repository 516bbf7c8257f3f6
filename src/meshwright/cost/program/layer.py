"""A decoder layer of a model as the runtime runs it: which parts, of which sizes on this rank.

In: a ModelSpec's layer kind and what the rank computes. Out: a function that walks through the layer's forward pass.
Families whose modules are not written down here have none (`written_down`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from meshwright.cost.program.attention import fused, separate
from meshwright.cost.program.core import Heads, core_of
from meshwright.cost.program.experts import Mixture, mixture
from meshwright.cost.program.feed_forward import gated, tanh_gelu_in_steps
from meshwright.cost.program.latent import Ranks, latent
from meshwright.cost.program.parts import Norm, Result, gemma_norm, layer_norm, rms_norm
from meshwright.cost.program.tape import Storage, Tape
from meshwright.cost.program.work import FP32, Work
from meshwright.models.spec import Attention, DenseMlp, LayerKind, ModelSpec, MoeMlp

LLAMA_KIN = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
LATENT = ("deepseek_v3",)
GEMMA = ("gemma3_text",)
GPT2 = ("gpt2",)
FAMILIES = LLAMA_KIN + LATENT + GEMMA + GPT2
PRECISE_ROUTERS = ("deepseek_v3",)

Walk = Callable[[Tape, Storage], Result]


@dataclass(frozen=True, eq=False)
class Model:
    """What of a ModelSpec the program reads. Told apart by identity: a spec is long to compare."""

    spec: ModelSpec

    @property
    def norm(self) -> Norm:
        if self.spec.model_type in GPT2:
            return layer_norm
        return gemma_norm if self.spec.model_type in GEMMA else rms_norm

    @property
    def sandwiched(self) -> bool:
        """Norms after each block too."""
        return self.spec.model_type in GEMMA


def written_down(spec: ModelSpec) -> bool:
    """Whether the modules of this family are."""
    return spec.model_type in FAMILIES and all(
        isinstance(kind.mixer, Attention) and kind.mlp is not None for kind in spec.kinds
    )


def layer(model: Model, kind: LayerKind, work: Work, selective: bool) -> Walk:
    """The layer as a function of its input, which its caller holds."""
    attend, feed = _attention(model, kind, work, selective), _feed_forward(model, kind, work)

    def norm(tape: Tape, x: Storage) -> Result:
        return model.norm(tape, work, x, work.rows, work.hidden)

    def block(tape: Tape, x: Storage, inside: Walk) -> Result:
        """x + inside(norm(x)), with a norm more where they are sandwiched."""
        normed, of_norm = norm(tape, x)
        out, of_inside = inside(tape, normed)
        tape.drop(normed)
        of_last = None
        if model.sandwiched:
            last, of_last = norm(tape, out)
            tape.drop(out)
            out = last
        total = tape.new(work.stream)
        tape.drop(out)

        def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
            residual = tape.hold(gradient)
            if of_last is not None:
                gradient = of_last(gradient)
            return tape.add(of_norm(of_inside(gradient), residual), accumulated)

        return total, backward

    def walk(tape: Tape, x: Storage) -> Result:
        middle, of_attention = block(tape, x, attend)
        out, of_feed = block(tape, middle, feed)
        tape.drop(middle)

        def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
            return of_attention(of_feed(gradient), accumulated)

        return out, backward

    return walk


def recomputed(walk: Walk) -> Walk:
    """The layer inside a checkpoint: its input is kept, the rest is made again in backward."""

    def run(tape: Tape, x: Storage) -> Result:
        with tape.forgetting():
            out, _ = walk(tape, x)
        kept = tape.hold(x)

        def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
            again, of_layer = walk(tape, x)
            tape.drop(again)
            of_input = of_layer(gradient, accumulated)
            tape.drop(kept)
            return of_input

        return out, backward

    return run


def _attention(model: Model, kind: LayerKind, work: Work, selective: bool) -> Walk:
    mixer = kind.mixer
    assert isinstance(mixer, Attention)
    queries, keys = ceil(mixer.heads / work.tp), ceil(mixer.kv_heads / work.tp)
    heads = Heads(queries, keys, mixer.qk_dim, mixer.v_dim, mixer.window)
    core = core_of(work, heads, selective)
    family = model.spec.model_type
    if family in LATENT:
        ranks = _latent_ranks(kind, mixer)
        return lambda tape, x: latent(tape, work, x, heads, core, ranks)
    if family in GPT2:
        return lambda tape, x: fused(tape, work, x, heads, core)
    of_heads = model.norm if any("q_norm" in t.name for t in kind.tensors) else None
    return lambda tape, x: separate(tape, work, x, heads, core, of_heads, norms_last=family in GEMMA)


def _latent_ranks(kind: LayerKind, mixer: Attention) -> Ranks:
    """From the weights' own shapes."""
    rows = {t.name.rpartition("self_attn.")[2]: t.shape for t in kind.tensors}
    compressed, up = rows["kv_a_proj_with_mqa.weight"], rows["kv_b_proj.weight"]
    query = rows.get("q_a_proj.weight", (0,))
    return Ranks(query[0], up[1], compressed[0] - up[1])


def _feed_forward(model: Model, kind: LayerKind, work: Work) -> Walk:
    if isinstance(kind.mlp, MoeMlp):
        moe = _mixture(model, kind.mlp, work)
        return lambda tape, x: mixture(tape, work, x, moe)
    assert isinstance(kind.mlp, DenseMlp)
    width, hidden = ceil(kind.mlp.width / work.tp), work.hidden
    if model.spec.model_type in GPT2:
        return lambda tape, x: tanh_gelu_in_steps(tape, work, x, width, hidden)
    return lambda tape, x: gated(tape, work, x, width, hidden)


def _mixture(model: Model, mlp: MoeMlp, work: Work) -> Mixture:
    precise = model.spec.model_type in PRECISE_ROUTERS
    return Mixture(
        mlp.experts,
        mlp.top_k,
        mlp.width / work.expert_tp,
        ceil(mlp.shared_width / work.tp),
        precise,
        FP32 if precise else 2 * FP32,
    )

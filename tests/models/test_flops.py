"""FLOPs per token against the published conventions, published measurements, and sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.errors import InputError
from meshwright.layout.config import Recompute
from meshwright.models import (
    CONVENTIONS,
    Attention,
    LinearMixer,
    active_parameters,
    backward_flops_per_token,
    forward_flops_per_token,
    load,
    matmul_parameters,
    mean_keys,
    model_flops_per_token,
    recompute_flops_per_token,
)
from meshwright.models.flops import attention_flops_per_token, linear_mixer_flops_per_token

# Published TFLOP/s and tokens/s per GPU of one run each, which together state the FLOPs per token that the source
# counts: (model, seq, convention, TFLOP/s, tokens/s). Sources: NeMo 24.07 performance guide, Megatron-LM llama FP8
# table, Megatron-Bridge performance summary, torchtitan A100 table (MFU x 312 TFLOP/s).
PUBLISHED = [
    ("llama-3-8b", 8192, "model_full", 711, 12273),
    ("llama-3-70b", 8192, "model_full", 734, 1524),
    ("llama-2-70b", 4096, "model_full", 768, 1728),
    ("nemotron-4-340b", 4096, "model_full", 686, 326),
    ("gpt3-175b", 2048, "model_full", 771, 716),
    ("llama-3-8b", 8192, "model_full", 800, 13812),
    ("llama-3.1-405b", 8192, "model_causal", 2646, 1048),
    ("llama-3-8b", 8192, "model_causal", 1933, 37556),
    ("qwen3-235b-a22b", 4096, "model_causal", 1306, 8816),
    ("qwen3-30b-a3b", 4096, "model_causal", 1029, 44544),
    ("deepseek-v3", 4096, "model_causal", 1635, 6288),
    ("gpt-oss-120b", 4096, "model_causal", 1077, 33024),
    ("qwen3-8b", 4096, "model_causal", 512.7, 10456.348),
    ("llama-3-8b", 8192, "model_full_emb2", 0.568 * 312, 2904),
]


@pytest.mark.parametrize(("model", "seq", "convention", "tflops", "tokens_per_s"), PUBLISHED)
def test_conventions_reproduce_published_flops_per_token(
    model: str, seq: int, convention: str, tflops: float, tokens_per_s: float
) -> None:
    published = tflops * 1e12 / tokens_per_s
    assert float(model_flops_per_token(load(model), seq, convention)) == pytest.approx(published, rel=0.005)


def test_conventions_are_their_formulas_for_a_dense_model() -> None:
    model, seq = load("llama-2-70b"), 4096
    layers, hidden, heads, dim, vocab = 80, 8192, 64, 128, 32000
    n = layers * (2 * hidden * hidden + 2 * hidden * 8 * dim + 3 * hidden * 28672) + hidden * vocab
    a = 12 * layers * seq * heads * dim
    expected = {
        "model_full": 6 * n + a,
        "model_causal": 6 * n + a / 2,
        "model_full_emb2": 6 * (n + vocab * hidden) + a,
        "hw_full_recompute": 4 / 3 * (6 * (n - vocab * hidden) + a) + 6 * vocab * hidden,
        "model_6N": 6 * n,
        "x8_6N": 8 * n,
    }
    assert matmul_parameters(model) == n
    assert set(expected) == set(CONVENTIONS)
    for convention, flops in expected.items():
        assert float(model_flops_per_token(model, seq, convention)) == pytest.approx(flops, rel=1e-12)


def test_recompute_convention_is_eq_3_of_narayanan_et_al() -> None:
    # F = 96 B s l h^2 (1 + s / 6h + V / 16 l h) per step for GPT with full recomputation (arXiv 2104.04473, eq. 3).
    model, seq = load("gpt-1t"), 2048
    layers, hidden, vocab = 128, 25600, 51200
    per_token = 96 * layers * hidden**2 * (1 + seq / (6 * hidden) + vocab / (16 * layers * hidden))
    assert float(model_flops_per_token(model, seq, "hw_full_recompute")) == pytest.approx(per_token, rel=1e-12)


def test_unknown_convention_is_an_input_error_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean model_full"):
        model_flops_per_token(load("gpt2"), 1024, "modelfull")


def test_forward_backward_and_recompute_add_up_to_the_conventions() -> None:
    model, seq = load("llama-3-8b"), 8192
    forward = forward_flops_per_token(model, seq, causal=False)
    backward = backward_flops_per_token(model, seq, causal=False)
    again = recompute_flops_per_token(model, seq, Recompute.FULL, causal=False)
    assert backward == pytest.approx(2 * forward)
    assert forward + backward == pytest.approx(model_flops_per_token(model, seq, "model_full"))
    assert forward + backward + again == pytest.approx(model_flops_per_token(model, seq, "hw_full_recompute"))
    assert recompute_flops_per_token(model, seq, Recompute.NONE) == 0
    assert recompute_flops_per_token(model, seq, Recompute.FULL, every=4, causal=False) == pytest.approx(again / 4)
    cores = recompute_flops_per_token(model, seq, Recompute.SELECTIVE)
    assert cores == pytest.approx(forward_flops_per_token(model, seq) - matmul_parameters(model) * 2)


def keys_by_counting(seq: int, window: int | None, causal: bool, chunked: bool = False) -> float:
    total = 0
    for query in range(seq):
        for key in range(seq):
            seen = key <= query if causal else True
            if window is not None:
                near = key // window == query // window if chunked else abs(query - key) < window
                seen = seen and near
            total += seen
    return total / seq


@pytest.mark.parametrize(("window", "chunked"), [(None, False), (64, False), (64, True), (1000, False)])
def test_mean_keys_agree_with_counting_every_pair(window: int | None, chunked: bool) -> None:
    attention = Attention(8, 8, 64, 64, 1024, window=window, chunked=chunked)
    # The formulas are continuous: they leave out the half key that a query has of itself.
    counted = keys_by_counting(512, window, True, chunked)
    assert 0 < counted - float(mean_keys(attention, 512)) <= 0.5
    if window is not None and not chunked:
        everything = float(mean_keys(attention, 512, causal=False))
        assert everything == min(512, window)


def test_sparse_attention_counts_its_picks_and_the_indexer_all_pairs() -> None:
    seq, picked = 16384, 2048
    attention = Attention(64, 64, 256, 256, 704, top_k_keys=picked, indexer_heads=32, indexer_dim=128)
    keys = float(mean_keys(attention, seq))
    assert keys == pytest.approx(sum(min(i + 0.5, picked) for i in range(seq)) / seq, rel=1e-6)
    flops = float(attention_flops_per_token(attention, seq))
    assert flops == pytest.approx(2 * 64 * 512 * keys + 2 * 32 * 128 * seq / 2)


def test_compressed_attention_sees_its_window_and_the_compressed_past() -> None:
    heavy = Attention(128, 1, 512, 512, 512, window=128, kv_compression=128)
    assert float(mean_keys(heavy, 65536)) == pytest.approx(128 - 128**2 / 131072 + 65536 / 128 / 2)
    sparse = Attention(128, 1, 512, 512, 640, window=128, kv_compression=4, top_k_keys=1024)
    assert float(mean_keys(sparse, 65536)) == pytest.approx(128 - 128**2 / 131072 + 1024)


def test_linear_mixers_cost_the_same_per_token_at_any_length() -> None:
    model = load("nemotron-h-56b")
    mixers = {k.name: k.mixer for k in model.kinds}
    assert isinstance(mixers["mamba"], LinearMixer)
    flops = linear_mixer_flops_per_token(mixers["mamba"])
    # 256 heads, state 256 x 64, chunk 128: two state products and half a chunk of scores and outputs, plus the conv.
    assert flops == pytest.approx(256 * (4 * 256 * 64 + (256 + 64) * 128) + 2 * 20480 * 4)
    delta = next(k.mixer for k in load("qwen3-next-80b-a3b").kinds if isinstance(k.mixer, LinearMixer))
    assert linear_mixer_flops_per_token(delta) > 32 * 6 * 128 * 128


def test_flops_take_arrays_of_sequence_lengths() -> None:
    seqs = np.array([1024, 4096, 131072])
    for name in ("llama-3-8b", "deepseek-v4-pro", "gpt-oss-20b", "nemotron-3-nano-30b-a3b", "glm-5.2"):
        model = load(name)
        together = model_flops_per_token(model, seqs, "model_causal")
        assert together.shape == (3,)
        assert together == pytest.approx([float(model_flops_per_token(model, int(s), "model_causal")) for s in seqs])
        assert np.all(np.diff(together) >= 0)


@pytest.mark.parametrize(
    ("name", "published_b"),
    [  # activated parameters that the model cards and reports state
        ("deepseek-v3", 37.5),
        ("deepseek-v2", 21),
        ("mixtral-8x7b", 12.9),
        ("mixtral-8x22b", 39),
        ("qwen3-235b-a22b", 22),
        ("qwen3-30b-a3b", 3.3),
        ("gpt-oss-120b", 5.7),
        ("gpt-oss-20b", 4.2),
        ("kimi-k2", 32.5),
        ("glm-4.5", 32),
        ("deepseek-v4-pro", 49),
        ("kimi-k3", 104),
        ("minimax-m2.5", 10),
        ("nemotron-3-ultra-550b-a55b", 55),
    ],
)
def test_activated_parameters_are_near_the_published_count(name: str, published_b: float) -> None:
    assert active_parameters(load(name)) / 1e9 == pytest.approx(published_b, rel=0.12)

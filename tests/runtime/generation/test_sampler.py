"""Temperature, top-k and top-p against transformers' own processors; draws follow the probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from meshwright.errors import InputError
from meshwright.runtime.generation.kv_cache import KVCache
from meshwright.runtime.generation.sampler import Sampling, drawn, likely


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1.0),
)
def test_likely_tokens_are_those_of_transformers(seed: int, temperature: float, top_k: int, top_p: float):
    logits = torch.randn((3, 31), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)  # pyright: ignore[reportArgumentType]
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)  # pyright: ignore[reportArgumentType]
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)  # pyright: ignore[reportArgumentType]
    found = likely(logits, Sampling(temperature, top_k, top_p))
    torch.testing.assert_close(found, expected.softmax(dim=-1))


def test_draws_hit_each_token_as_often_as_its_probability_says():
    probabilities = torch.tensor([[0.1, 0.0, 0.6, 0.3]], dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.bincount(drawn(probabilities.expand(1000, 4), uniform), minlength=4)
    assert counts.tolist() == [100, 0, 600, 300]


def test_masks_show_causal_unpadded_keys_within_the_window():
    cache = KVCache(torch.tensor([0, 2]), capacity=8)
    assert cache.positions(4).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    mask = cache.mask(4, window=2)
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert KVCache(torch.tensor([0, 0]), capacity=8).mask(4, window=None) is None


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_sampling_that_means_nothing_is_refused(values: dict[str, float]):
    with pytest.raises(InputError):
        Sampling(**values)  # pyright: ignore[reportArgumentType]

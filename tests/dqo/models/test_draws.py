import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from dqo.models.draws import Draws, Sampling, _first_above, draw, uniforms


def test_a_stream_is_the_same_for_ever():
    # the numbers of a file that goes on with a later version must be those of its beginning
    assert uniforms(0, ("a", 1), 3).tolist() == [0.8297202693459681, 0.3097969447824028, 0.2939272812382937]


def test_streams_of_other_seeds_and_keys_are_others_and_a_longer_one_begins_the_same():
    found = {uniforms(seed, key, 1)[0] for seed in (0, 1) for key in [(0, 1), (1, 0), ("0", 1), ("01",), (0, 1, 0)]}
    assert len(found) == 10
    assert uniforms(3, ("x",), 100)[:10].tolist() == uniforms(3, ("x",), 10).tolist()


def test_numbers_are_uniform_over_keys():
    numbers = np.array([uniforms(0, ("prompt", k), 4) for k in range(5000)]).flatten()
    counts, _ = np.histogram(numbers, 50, (0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 100  # chi-square, 49 degrees of freedom: p = 2e-5
    assert numbers.min() >= 0 and numbers.max() < 1


@given(
    st.sampled_from([1, 2, 19, 513, 2048, 2049, 3000]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-12, 0.3, 0.5, 0.999999, 1 - 2**-53]),
    st.data(),
)
def test_the_token_is_where_the_cumulative_distribution_passes_the_number(size, seed, uniform, data):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=data.draw(st.sampled_from([0.1, 3.0, 40.0])), size=size).astype(np.float32)
    logits[rng.random(size) < data.draw(st.sampled_from([0.0, 0.5, 0.99]))] = -np.inf
    logits[rng.integers(size)] = 1.0
    token, logprob = (x.item() for x in draw(torch.tensor(logits)[None], torch.tensor([uniform], dtype=torch.float64)))
    probabilities = torch.tensor(logits).double().softmax(-1).numpy()
    cumulative = probabilities.cumsum()
    assert probabilities[token] > 0
    assert cumulative[token] - probabilities[token] <= uniform + 1e-6
    assert uniform <= cumulative[token] + 1e-6
    assert logprob == pytest.approx(np.log(probabilities[token]), abs=1e-4)


def test_a_number_that_rounding_puts_behind_the_last_sum_takes_the_last_token_that_has_a_weight():
    sums = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64)
    assert [_first_above(sums, torch.tensor([[x]], dtype=torch.float64)).item() for x in (0.0, 1.0, 2.0, 5.0)] == [
        0,
        1,
        1,
        1,
    ]


def test_no_token_of_probability_zero_is_drawn_from_a_large_vocabulary():
    logits = torch.full((5, 150_000), -torch.inf)
    logits[:, 77_777:77_779] = 3.0
    token, logprob = draw(logits, torch.tensor([0.0, 0.499999, 0.500001, 0.9, 1 - 2**-53], dtype=torch.float64))
    assert token.tolist() == [77_777, 77_777, 77_778, 77_778, 77_778]
    assert logprob.tolist() == pytest.approx([np.log(0.5)] * 5)


def test_a_flat_distribution_over_a_large_vocabulary_is_drawn_evenly():
    # a running sum of 150,000 float32 numbers would be off by many tokens
    numbers = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    token, _ = draw(torch.zeros(1, 150_000).expand(100, -1), numbers)
    assert (token.double() - numbers * 150_000).abs().max() <= 1


@pytest.mark.parametrize("top_k, top_p", [(0, 0.9), (0, 1e-9), (5, 1.0), (1, 1.0), (500, 1.0), (7, 0.5), (0, 0.999)])
def test_what_top_k_and_top_p_leave_is_what_transformers_leaves(top_k, top_p):
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 3
    logits[0] = 0.0  # ties
    kept = logits.clone()
    kept = TopKLogitsWarper(top_k)(None, kept) if top_k else kept
    kept = TopPLogitsWarper(top_p)(None, kept) if top_p < 1 else kept
    drawn = torch.zeros_like(kept, dtype=torch.bool)
    for seed in range(60):
        draws = Draws(
            Sampling(top_k=top_k, top_p=top_p, max_new_tokens=1, seed=seed), range_keys(64), torch.device("cpu")
        )
        token = draws(None, logits.clone()).argmax(-1)
        drawn[torch.arange(64), token] = True
        expected = kept.log_softmax(-1).gather(1, token[:, None])
        assert torch.allclose(draws.logprobs(), expected, atol=1e-5)
    assert not (drawn & kept.isinf()).any()


def range_keys(count):
    return [(i,) for i in range(count)]

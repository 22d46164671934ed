"""lambda_return against the explicit mixture of n-step returns (defect 8), GAE (T9) and its limits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqo_kernels import lambda_return
from tests.kernels.backends import backends
from tests.kernels.oracle import mixture_return, random_batch

BACKENDS = backends("lambda_return")
lengths = st.lists(st.integers(0, 7), max_size=6)
unit = st.floats(0, 1)


def mixture(rewards, values, cu_seqlens, bootstrap, gamma, lam):
    ends = cu_seqlens.tolist()
    out = []
    for b, (lo, hi) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        rows = rewards[lo:hi].tolist(), values[lo:hi].tolist()
        out += mixture_return(*rows, bootstrap[b].item(), gamma, lam)
    return torch.tensor(out, dtype=torch.float64)


def gae_advantages(rewards, values, end_value, gamma, lam):
    """Schulman's A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}) of one sequence."""
    nexts = np.append(values[1:], end_value)
    errors = rewards + gamma * nexts - values
    return np.array([sum((gamma * lam) ** i * e for i, e in enumerate(errors[t:])) for t in range(len(errors))])


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 999), lengths=lengths, gamma=unit, lam=unit)
@settings(max_examples=150, deadline=None)
def test_the_recursion_is_the_explicit_mixture_of_n_step_returns(backend, seed, lengths, gamma, lam):
    batch = random_batch(seed, lengths)
    args = batch.rewards, batch.values, batch.cu_seqlens
    returns = lambda_return(*args, gamma=gamma, lam=lam, bootstrap=batch.bootstrap, backend=backend)
    expected = mixture(*args, batch.bootstrap, gamma, lam)
    torch.testing.assert_close(returns, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_returns_minus_values_are_the_gae_advantages(backend, lam, gamma):
    batch = random_batch(1, (4, 0, 1, 9))
    args = batch.rewards, batch.values, batch.cu_seqlens
    returns = lambda_return(*args, gamma=gamma, lam=lam, bootstrap=batch.bootstrap, backend=backend)
    for b, row in enumerate(batch.slices):
        reward, value = batch.rewards[row].numpy(), batch.values[row].numpy()
        expected = gae_advantages(reward, value, batch.bootstrap[b].item(), gamma, lam)
        np.testing.assert_allclose((returns - batch.values)[row], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lambda_one_is_the_reverse_cumulative_sum_and_lambda_zero_is_td(backend):
    batch = random_batch(2)
    ones = lambda_return(batch.rewards, batch.values, batch.cu_seqlens, backend=backend)
    zero = lambda_return(
        batch.rewards,
        batch.values,
        batch.cu_seqlens,
        lam=0.0,
        gamma=0.9,
        bootstrap=batch.bootstrap,
        backend=backend,
    )
    for b, row in enumerate(batch.slices):
        torch.testing.assert_close(ones[row], batch.rewards[row].flip(0).cumsum(0).flip(0))
        following = torch.cat([batch.values[row][1:], batch.bootstrap[b : b + 1]])[: row.stop - row.start]
        torch.testing.assert_close(zero[row], batch.rewards[row] + 0.9 * following)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_gradients_reach_rewards_values_and_bootstrap(backend, lam):
    batch = random_batch(3)
    inputs = [x.clone().requires_grad_() for x in (batch.rewards, batch.values, batch.bootstrap)]

    def run(rewards, values, bootstrap):
        return lambda_return(
            rewards, values, batch.cu_seqlens, gamma=0.9, lam=lam, bootstrap=bootstrap, backend=backend
        )

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_bootstrap_the_end_is_a_terminal_state(backend):
    batch = random_batch(4)
    args = batch.rewards, batch.values, batch.cu_seqlens
    zeros = torch.zeros_like(batch.bootstrap)
    without = lambda_return(*args, gamma=0.9, lam=0.5, backend=backend)
    assert torch.equal(without, lambda_return(*args, gamma=0.9, lam=0.5, bootstrap=zeros, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sequences", [0, 1, 3])
def test_no_rows_give_no_returns(backend, sequences):
    empty = torch.zeros(0, requires_grad=True)
    cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32)
    bootstrap = torch.ones(sequences, requires_grad=True)
    returns = lambda_return(empty, empty, cu_seqlens, bootstrap=bootstrap, backend=backend)
    assert returns.shape == (0,)
    returns.sum().backward()
    assert torch.equal(bootstrap.grad, torch.zeros(sequences))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_sequence_gives_its_bootstrap_no_gradient(backend):
    batch = random_batch(5, (2, 0, 3, 0))
    bootstrap = batch.bootstrap.clone().requires_grad_()
    lambda_return(batch.rewards, batch.values, batch.cu_seqlens, bootstrap=bootstrap, backend=backend).sum().backward()
    assert torch.equal(bootstrap.grad, torch.tensor([2.0, 0.0, 3.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_nan_stays_in_its_own_sequence_forward_and_backward(backend, poison):
    batch = random_batch(6, (3, 4, 2))
    inside = batch.slices[1]
    rewards, values = batch.rewards.clone(), batch.values.clone()
    rewards[4] = values[5] = poison
    tensors = [rewards.requires_grad_(), values.requires_grad_(), batch.bootstrap.clone().requires_grad_()]

    def run(bootstrap):
        return lambda_return(*tensors[:2], batch.cu_seqlens, lam=0.5, bootstrap=bootstrap, backend=backend)

    clean = lambda_return(batch.rewards, batch.values, batch.cu_seqlens, lam=0.5, bootstrap=batch.bootstrap)
    returns = run(tensors[2])
    outside = torch.ones(9, dtype=torch.bool)
    outside[inside] = False
    assert torch.equal(returns[outside], clean[outside])
    upstream = torch.where(outside, 1.0, poison).double()
    gradients = torch.autograd.grad(returns, tensors, upstream)
    assert all(g[outside].isfinite().all() for g in gradients[:2])
    assert gradients[2][[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", [p for p in backends("lambda_return", torch.float32) if p.values[0] != "reference"])
@pytest.mark.parametrize("gamma, lam, of_values", [(0.0, 0.5, []), (1.0, 1.0, []), (1.0, 0.0, [4])])
def test_a_nan_that_arrives_passes_no_discount_of_zero(backend, gamma, lam, of_values):
    rewards, values, bootstrap = torch.ones(5), torch.ones(5, requires_grad=True), torch.ones(1, requires_grad=True)
    returns = lambda_return(
        rewards, values, torch.tensor([0, 5]), gamma=gamma, lam=lam, bootstrap=bootstrap, backend=backend
    )
    arriving = torch.tensor([1.0, 1.0, 1.0, torch.nan, 1.0])
    gradients = torch.autograd.grad(returns, [values, bootstrap], arriving)
    assert gradients[0].isnan().nonzero()[:, 0].tolist() == of_values
    assert gradients[1].isnan().item() == (gamma * lam > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(backend, dtype):
    batch = random_batch(7, (50, 30))
    rewards, values = batch.rewards.to(dtype), batch.values.to(dtype)
    returns = lambda_return(rewards, values, batch.cu_seqlens, gamma=0.99, lam=0.95, backend=backend)
    exact = lambda_return(rewards.double(), values.double(), batch.cu_seqlens, gamma=0.99, lam=0.95, backend=backend)
    assert returns.dtype == torch.float32 and exact.dtype == torch.float64
    # A sum of at most 50 terms of size below |G|max loses at most 50 roundings of 2^-24 each.
    torch.testing.assert_close(returns.double(), exact, rtol=0, atol=50 * 2**-24 * exact.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_any_integer_boundaries_are_read_right(backend):
    batch = random_batch(8)
    pair = torch.stack([batch.rewards, batch.values], 1)
    expected = lambda_return(batch.rewards, batch.values, batch.cu_seqlens, lam=0.3)
    strided = lambda_return(pair[:, 0], pair[:, 1], batch.cu_seqlens.int(), lam=0.3, backend=backend)
    torch.testing.assert_close(strided, expected, rtol=0, atol=1e-14)


@pytest.mark.skipif(len(BACKENDS) < 2, reason="one backend only")
def test_a_long_sequence_agrees_between_backends():
    rng = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 20_000, generator=rng, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 1, 19_999, 20_000])
    results = [
        lambda_return(rewards, values, cu_seqlens, gamma=0.999, lam=0.97, backend=p.values[0])
        for p in BACKENDS
        if not p.marks
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-11)

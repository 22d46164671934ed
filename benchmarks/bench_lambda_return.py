"""lambda_return on the CPU: the C++ scan beside the differentiable reference and a Python loop over time.

pytest benchmarks/ --benchmark-only
"""

import pytest
import torch

from dqo_kernels import dispatch, lambda_return

SHAPES = {"32x128": [128] * 32, "32x1024": [1024] * 32, "1x16384": [16384]}


def python_loop(rewards, values, cu_seqlens, *, gamma, lam):
    """What most trainers run: one padded tensor, one torch operation a time step."""
    lengths = cu_seqlens.diff()
    shape = (lengths.numel(), int(lengths.max()))
    r, v = rewards.reshape(shape), values.reshape(shape)
    returns = torch.empty_like(r)
    carry = next_value = r.new_zeros(shape[0])
    for t in range(shape[1] - 1, -1, -1):
        carry = r[:, t] + gamma * ((1 - lam) * next_value + lam * carry)
        next_value = v[:, t]
        returns[:, t] = carry
    return returns.reshape(-1)


IMPLEMENTATIONS = {
    "cpp": lambda *a, **k: lambda_return(*a, backend="cpp", **k),
    "reference": lambda *a, **k: lambda_return(*a, backend="reference", **k),
    "python loop": python_loop,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_lambda_return(benchmark, shape, implementation):
    if implementation == "cpp" and dispatch.unavailable("cpp"):
        pytest.skip(dispatch.unavailable("cpp"))
    lengths = torch.tensor(SHAPES[shape])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rewards, values = torch.randn(2, int(lengths.sum()))
    benchmark.group = f"lambda_return {shape}"
    run = IMPLEMENTATIONS[implementation]
    expected = python_loop(rewards.double(), values.double(), cu_seqlens, gamma=0.99, lam=0.95)
    result = benchmark(run, rewards, values, cu_seqlens, gamma=0.99, lam=0.95)
    assert torch.allclose(result.double(), expected, atol=1e-3)  # a benchmark of a wrong result measures nothing

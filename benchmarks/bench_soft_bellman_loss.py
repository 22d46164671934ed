"""soft_bellman_loss on the CPU, forward and backward: the reference backend beside plain eager torch.

The reference defines the result and bounds its memory; it also computes lse, entropy and exact KL, and is not meant to be fast.
"""

import pytest
import torch

from dqo_kernels import soft_bellman_loss

SHAPES = {"256x4096": (256, 4096), "256x32000": (256, 32000)}


def eager(logits, actions, rewards, values, ref_logits, cu_seqlens):
    """lambda = 1, no importance weights, one pass of log_softmax for each model."""
    picked = actions[:, None]
    log_ratio = logits.log_softmax(-1).gather(-1, picked)[:, 0] - ref_logits.log_softmax(-1).gather(-1, picked)[:, 0]
    kept = (rewards - 0.1 * log_ratio).detach()
    sums = torch.cat([kept.flip(0).cumsum(0).flip(0), kept.new_zeros(1)])  # one sequence
    returns, ahead = sums[:-1], sums[1:]
    policy = 0.5 * (0.1 * log_ratio - (rewards + ahead - values.detach())).square()
    return (policy + 0.5 * (returns - values).square()).mean()


def ours(logits, actions, rewards, values, ref_logits, cu_seqlens):
    return soft_bellman_loss(
        logits, actions, rewards, values, ref_logits=ref_logits, cu_seqlens=cu_seqlens, is_level="none"
    ).loss


IMPLEMENTATIONS = {"reference": ours, "eager": eager}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_soft_bellman_loss(benchmark, shape, implementation):
    n, vocab = SHAPES[shape]
    torch.manual_seed(0)
    logits = torch.randn(n, vocab, requires_grad=True)
    values = torch.randn(n, requires_grad=True)
    ref_logits, rewards = torch.randn(n, vocab), torch.randn(n)
    actions, cu_seqlens = torch.randint(0, vocab, (n,)), torch.tensor([0, n])
    run = IMPLEMENTATIONS[implementation]

    def forward_and_backward():
        loss = run(logits, actions, rewards, values, ref_logits, cu_seqlens)
        return loss, torch.autograd.grad(loss, [logits, values])

    benchmark.group = f"soft_bellman_loss {shape}"
    loss, _ = benchmark(forward_and_backward)
    assert torch.allclose(loss, eager(logits, actions, rewards, values, ref_logits, cu_seqlens), rtol=1e-4)

"""What soft_bellman_loss launches, and how often it reads and writes something of the vocabulary's size."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dqo_kernels import dispatch, soft_bellman_loss

B, T, V = 3, 5, 301
N = B * T
VIEWS = {"detach", "view", "_unsafe_view", "alias", "expand", "slice", "as_strided", "t", "permute", "unsqueeze"}


class Traffic(TorchDispatchMode):
    """Counts our operations, the other operations that are no views, and the operands of at least N*V elements of both."""

    def __init__(self):
        super().__init__()
        self.ours, self.others, self.reads, self.writes, self.large_others = Counter(), Counter(), 0, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        reads, writes = (
            sum(isinstance(x, torch.Tensor) and x.numel() >= N * V for x in tree_leaves(tensors))
            for tensors in ((args, kwargs), out)
        )
        if func.namespace == "dqo_kernels":
            self.ours[name] += 1
            self.reads += reads
            self.writes += writes
        elif name not in VIEWS:
            self.others[name] += 1
            self.large_others[name] += reads + writes
        return out


def traffic(layout, backend, **options):
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(2, B, T + 1, V, generator=rng)
    logits, ref_logits = wide[0, :, :-1], wide[1, :, :-1]  # rows that cannot be flattened without a copy
    rows = {"actions": torch.randint(V, (B, T), generator=rng), "rewards": torch.randn(B, T, generator=rng)}
    values = torch.randn(B, T, generator=rng)
    where = {"mask": torch.ones(B, T, dtype=torch.bool)}
    if layout == "packed":
        logits, ref_logits = (x.reshape(N, V) for x in (logits, ref_logits))
        rows, values = {name: x.flatten() for name, x in rows.items()}, values.flatten()
        where = {"cu_seqlens": torch.arange(B + 1) * T}
    logits, values = logits.detach().requires_grad_(), values.requires_grad_()
    with Traffic() as counted:
        out = soft_bellman_loss(
            logits, values=values, ref_logits=ref_logits, **rows, **where, **options, backend=backend
        )
        torch.autograd.grad(out.loss, [logits, values])
    return counted


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("target", ["detach", "residual"])
def test_one_read_forward_and_one_read_and_write_backward(backend, layout, kl_coef, target):
    if dispatch.unavailable(backend):
        pytest.skip(dispatch.unavailable(backend))
    counted = traffic(layout, backend, kl_coef=kl_coef, target=target)
    launches = {"token_stats": 1, "soft_bellman": 1, "token_stats_backward": 1}
    if target == "residual":
        launches["soft_bellman_backward_residual"] = 1  # the adjoint of the scan
    assert counted.ours == launches
    # Forward: both models' logits once. Backward: the policy's once more, the reference's too where the KL is trained.
    assert counted.reads == 2 + (2 if kl_coef else 1) and counted.writes == 1
    assert not +counted.large_others, f"torch operations on (N, V): {+counted.large_others}"
    # What is left are sums and factors of (N,) rows and scalars, and on the CPU the checks of values.
    assert sum(counted.others.values()) <= 34, counted.others

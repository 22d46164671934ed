"""What soft_bellman_loss launches, and how often it reads and writes something of the vocabulary's size."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dqo_kernels import soft_bellman_loss
from dqo_kernels.core import dispatch

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


def traffic(layout, backend, backward=True, **options):
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
        if backward:
            torch.autograd.grad(out.loss, [logits, values])
    return counted


def skip_without(backend):
    reason = dispatch.unavailable(backend)
    if reason or "cuda" not in dispatch.TABLE["token_stats"]["cpu"] and backend.startswith("cuda"):
        pytest.skip(reason or "the CUDA kernels are emulated where there is no GPU")


@pytest.mark.parametrize("backend", ["cpp", "triton", "cuda"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("target", ["detach", "residual"])
def test_one_read_forward_and_one_read_and_write_backward(backend, layout, kl_coef, target):
    skip_without(backend)
    counted = traffic(layout, backend, kl_coef=kl_coef, target=target)
    launches = {"token_stats": 1, "soft_bellman": 1, "token_stats_backward": 1}
    if target == "residual":
        launches["soft_bellman_backward_residual"] = 1  # the adjoint of the scan
    assert counted.ours == launches
    # Forward: both models' logits once. Backward: the policy's once more, the reference's too where the KL is trained.
    assert counted.reads == 2 + (2 if kl_coef else 1) and counted.writes == 1
    assert not +counted.large_others, f"torch operations on (N, V): {+counted.large_others}"
    # What is left are sums and factors of (N,) rows and scalars, and on the CPU the checks of values and copies of indices.
    assert sum(counted.others.values()) <= 35, counted.others


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_one_pass_reads_once_and_writes_once(layout, kl_coef):
    skip_without(dispatch.ONE_PASS)
    counted = traffic(layout, dispatch.ONE_PASS, backward=False, kl_coef=kl_coef, is_level="suffix")
    assert counted.ours == {"soft_bellman_loss_one_pass": 1}
    assert counted.reads == 2 and counted.writes == 1  # the gradient is there
    assert not +counted.large_others, f"torch operations on (N, V): {+counted.large_others}"


def test_the_one_pass_gradient_is_handed_out_where_it_lies(monkeypatch):
    skip_without(dispatch.ONE_PASS)
    from dqo_kernels import soft_bellman_loss_cuda as one_pass

    written = []
    forward = one_pass._FORWARD.implementation
    keep = lambda *inputs: written.append(forward(*inputs)) or written[-1]  # noqa: E731
    monkeypatch.setattr(one_pass._FORWARD, "implementation", keep)
    logits, zeros = torch.randn(N, V, requires_grad=True), torch.zeros(N)
    inputs = (logits, torch.zeros(N, dtype=torch.long), zeros, zeros)
    options = {"ref_logprobs": zeros, "cu_seqlens": torch.tensor([0, N]), "is_level": "none"}
    loss = soft_bellman_loss(*inputs, **options, backend=dispatch.ONE_PASS).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == written[0][-2].data_ptr()

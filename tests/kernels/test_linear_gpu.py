"""The linear forms on a GPU: cuBLAS around the Triton row kernels, against float64 on the CPU."""

import pytest
import torch

from benchmarks.harness.memory import extra_memory
from dqo_kernels import linear_row_loss, linear_soft_bellman_loss

pytestmark = pytest.mark.gpu
LENGTHS = [37, 1, 0, 64, 26]
N, D, V = sum(LENGTHS), 96, 5003


def batch(dtype, device, low_rank):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=rng)).to(dtype)

    made = {"hidden": normal(N, D), "weight": normal(V, D, scale=0.3), "bias": normal(V)}
    made |= {"lora_a": normal(4, D, scale=0.3), "lora_b": normal(V, 4, scale=0.3)} if low_rank else {}
    made |= {"ref_hidden": normal(N, D), "ref_weight": normal(V, D, scale=0.3)}
    made = {name: x.to(device).requires_grad_("ref" not in name) for name, x in made.items()}
    actions = torch.randint(V, (N,), generator=rng).to(device)
    cu_seqlens = torch.tensor([0, *LENGTHS], device=device).cumsum(0)
    values = torch.randn(N, generator=rng).to(device).requires_grad_()
    return made, actions, cu_seqlens, values


def row_loss(stats, rows, cu_seqlens):
    loss = (rows["values"] * stats.logprobs).sum() + stats.entropy.sum() + stats.lse.sum() + 0.5 * stats.kl.sum()
    return loss, {"logprobs": stats.logprobs.sum(), "kl": stats.kl.sum()}


def run(made, actions, cu_seqlens, values, **options):
    loss, sums = linear_row_loss(
        actions=actions, row_loss=row_loss, cu_seqlens=cu_seqlens, rows={"values": values}, softcap=40.0,
        temperature=0.9, **made, **options,
    )  # fmt: skip
    owners = [*(x for x in made.values() if x.requires_grad), values]
    return [loss.detach(), *sums.values()], torch.autograd.grad(loss, owners)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("rows", [N, 70, 5])
def test_losses_and_gradients_are_those_of_float64(dtype, low_rank, rows):
    given = batch(dtype, "cuda", low_rank)
    got, gradients = run(*given, workspace_bytes=rows * V * 10)
    made, actions, cu_seqlens, values = given

    def exact(x):
        return x.detach().cpu().double().requires_grad_(x.requires_grad)

    on_cpu = {name: exact(x) for name, x in made.items()}, actions.cpu(), cu_seqlens.cpu(), exact(values)
    want, exact_gradients = run(*on_cpu, backend="reference")
    for a, b in zip(got, want, strict=True):
        assert abs(a.item() - b.item()) <= 1e-4 * (N + abs(b.item()))  # sums of N rows
    rounding = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    for a, b in zip(gradients, exact_gradients, strict=True):
        assert (a.cpu().double() - b).norm() <= rounding * b.norm()


def test_nothing_waits_for_the_device_when_lengths_are_given():
    made, actions, cu_seqlens, values = batch(torch.bfloat16, "cuda", False)
    inputs = made["hidden"], made["weight"], actions, torch.zeros_like(values), values
    options = {"ref_hidden": made["ref_hidden"], "ref_weight": made["ref_weight"], "kl_coef": 0.1}
    options |= {"cu_seqlens": cu_seqlens, "seqlens": LENGTHS, "workspace_bytes": 70 * V * 10}
    linear_soft_bellman_loss(*inputs, **options).loss.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_soft_bellman_loss(*inputs, **options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_stays_within_the_workspace_and_the_gradients():
    rows, width, vocab, workspace = 4096, 64, 32000, 64 * 2**20  # (N, V) in bfloat16: 262 MB
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    actions, zeros = torch.randint(vocab, (rows,), device="cuda"), torch.zeros(rows, device="cuda")
    cu_seqlens = torch.arange(0, rows + 1, 128, device="cuda")

    def step():
        return linear_soft_bellman_loss(
            hidden, weight, actions, zeros, zeros, ref_logprobs=zeros, cu_seqlens=cu_seqlens,
            workspace_bytes=workspace,
        ).loss.backward()  # fmt: skip

    step()
    hidden.grad = weight.grad = None
    extra, _ = extra_memory(step, torch.device("cuda"))
    gradients = (rows + vocab) * width * (4 + 2)  # summed in float32, given in bfloat16
    assert extra.peak <= workspace + gradients + 32 * 2**20 < rows * vocab * 2

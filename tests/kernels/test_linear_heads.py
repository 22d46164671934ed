"""Heads as models have them: low-rank updates, tied embeddings, halves; each against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from dqo_kernels import linear_row_loss, linear_soft_bellman_loss, linear_token_stats, token_stats
from dqo_kernels.linear import gemm
from tests.kernels.backends import backends

BACKENDS = backends("linear_token_stats")
N, D, R, V = 12, 6, 2, 29
ROW = 8 * V


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def head(dtype=torch.float64):
    shapes = {"hidden": (N, D), "weight": (V, D), "bias": (V,), "lora_a": (R, D), "lora_b": (V, R)}
    made = {name: normal(i, *shape, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    return made, torch.arange(N) * 5 % V


def weighted(stats):
    fields = torch.stack(stats[:3])
    return (fields * normal(9, *fields.shape, dtype=fields.dtype)).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [None, ROW, 5 * ROW])
@pytest.mark.parametrize("live", [("lora_a", "lora_b"), ("hidden", "lora_a", "lora_b"), ("hidden", "weight", "lora_b")])
def test_a_low_rank_update_is_that_of_the_weight(backend, workspace, live):
    made, actions = head()
    results = []
    for merged in (True, False):
        x = {name: value.clone().requires_grad_(name in live) for name, value in made.items()}
        if merged:
            weight = x["weight"] + 0.7 * x["lora_b"] @ x["lora_a"]
            stats = token_stats(F.linear(x["hidden"], weight, x["bias"]), actions)
        else:
            stats = linear_token_stats(
                actions=actions, lora_scale=0.7, workspace_bytes=workspace, backend=backend, **x
            )  # fmt: skip
        weighted(stats).backward()
        results.append([*stats[:3], *(x[name].grad for name in live)])
        assert all(x[name].grad is None for name in x.keys() - set(live))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_rank_gradients_pass_gradcheck(backend):
    made, actions = head()
    made.pop("bias")

    def run(hidden, lora_a, lora_b):
        stats = linear_token_stats(
            hidden, made["weight"], actions, lora_a=lora_a, lora_b=lora_b, lora_scale=2.0, workspace_bytes=4 * ROW,
            backend=backend,
        )  # fmt: skip
        return torch.stack(stats[:3])

    inputs = [made[name].requires_grad_() for name in ("hidden", "lora_a", "lora_b")]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_loss_takes_a_low_rank_update(backend):
    made, actions = head()
    x = {name: value.requires_grad_(name.startswith("lora")) for name, value in made.items()}
    cu_seqlens, zeros = torch.tensor([0, 5, N]), torch.zeros(N, dtype=torch.float64)
    weight = x["weight"] + x["lora_b"] @ x["lora_a"]
    want = -token_stats(F.linear(x["hidden"], weight, x["bias"]), actions).logprobs.sum()
    expected = torch.autograd.grad(want, [x["lora_a"], x["lora_b"]])
    got, _ = linear_row_loss(
        actions=actions, row_loss=lambda stats, rows, cu: (-stats.logprobs.sum(), {}), cu_seqlens=cu_seqlens, rows={},
        backend=backend, workspace_bytes=5 * ROW, **x,
    )  # fmt: skip
    found = torch.autograd.grad(got, [x["lora_a"], x["lora_b"]])
    for a, b in zip([got, *found], [want, *expected], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    weight = x["weight"] + 0.7 * x["lora_b"] @ x["lora_a"]  # once more: the first one's graph is gone
    options = {"ref_logprobs": zeros - 5.0, "cu_seqlens": cu_seqlens, "bias": x["bias"], "backend": backend}
    rows = actions, zeros, zeros
    merged = linear_soft_bellman_loss(x["hidden"], weight, *rows, **options).loss
    apart = linear_soft_bellman_loss(
        x["hidden"], x["weight"], *rows, lora_a=x["lora_a"], lora_b=x["lora_b"], lora_scale=0.7, **options
    ).loss  # fmt: skip
    torch.testing.assert_close(apart, merged, rtol=1e-10, atol=1e-11)
    for a, b in zip(*(torch.autograd.grad(y, [x["lora_a"], x["lora_b"]]) for y in (apart, merged)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"lora_a": (R, D)}, r"lora_b: expected a tensor, because lora_a is given, got None"),
        ({"lora_b": (V, R)}, r"lora_a: expected a tensor, because lora_b is given, got None"),
        ({"lora_a": (R, D + 1), "lora_b": (V, R)}, rf"lora_a: expected shape \({R}, {D}\) \(rank, D\)"),
        ({"lora_a": (R, D), "lora_b": (V, R + 1)}, rf"lora_b: expected shape \({V}, {R}\) \(V, rank of lora_a\)"),
    ],
)
def test_half_an_update_is_refused(arguments, message):
    made, actions = head()
    given = {name: normal(0, *shape) for name, shape in arguments.items()}
    with pytest.raises(ValueError, match=message):
        linear_token_stats(made["hidden"], made["weight"], actions, **given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_tied_to_the_embedding_gets_both_gradients(backend):
    ids, actions = torch.arange(N) * 3 % V, torch.arange(N) * 5 % V
    cu_seqlens = torch.tensor([0, 4, N])
    results = []
    for fused in (True, False):
        embedding = normal(0, V, D).requires_grad_()
        hidden = torch.tanh(F.embedding(ids, embedding))
        if fused:
            loss, _ = linear_row_loss(
                hidden, embedding, actions, lambda stats, rows, cu: (stats.logprobs.sum() + stats.entropy.sum(), {}),
                cu_seqlens, rows={}, backend=backend, workspace_bytes=5 * ROW,
            )  # fmt: skip
        else:
            stats = token_stats(hidden @ embedding.t(), actions)
            loss = stats.logprobs.sum() + stats.entropy.sum()
        loss.backward()
        results.append((loss, embedding.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", backends("linear_token_stats", torch.bfloat16))
@pytest.mark.parametrize("workspace", [None, 60 * 1024])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_halves_come_closer_to_float64_than_eager_torch_does(backend, workspace, dtypes):
    rows, width, vocab = 64, 48, 1000
    hidden, weight = normal(0, rows, width, dtype=dtypes[0]), normal(1, vocab, width, dtype=dtypes[1]) / 4
    actions = torch.arange(rows) * 7 % vocab
    c = normal(2, rows)

    def errors(loss, x, w):
        found = torch.autograd.grad(loss, [x, w])
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    def live(dtype=None):
        return [x.to(dtype or x.dtype).clone().requires_grad_() for x in (hidden, weight)]

    x, w = live(torch.float64)
    exact = torch.autograd.grad((F.linear(x, w).log_softmax(-1)[torch.arange(rows), actions] * c).sum(), [x, w])
    x, w = live()
    half = torch.bfloat16  # what autocast makes of a float32 head over bfloat16 hidden states
    logits = F.linear(x.to(half), w.to(half)).float()
    eager = errors((logits.log_softmax(-1)[torch.arange(rows), actions] * c.float()).sum(), x, w)
    x, w = live()
    stats = linear_token_stats(x, w, actions, workspace_bytes=workspace, backend=backend)
    ours = errors((stats.logprobs * c.float()).sum(), x, w)
    assert all(a <= b for a, b in zip(ours, eager, strict=True)), (ours, eager)
    assert gemm.gradient_dtype(x, w, torch.float32) == (half if dtypes[1] == half else torch.float32) or (
        not gemm.fast_bfloat16(x.device)
    )
    logprobs = F.linear(hidden.double(), weight.double()).log_softmax(-1)[torch.arange(rows), actions]
    torch.testing.assert_close(stats.logprobs.detach().double(), logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", backends("linear_token_stats", torch.float32))
def test_the_gradient_of_a_float32_bias_is_a_float32_sum(backend):
    rows = 257  # every entry of dz is exactly 1/2; bfloat16 has no 128.5
    hidden, weight = torch.zeros(rows, D, dtype=torch.bfloat16), torch.ones(2, D, dtype=torch.bfloat16)
    bias, actions = torch.zeros(2, requires_grad=True), torch.zeros(rows, dtype=torch.long)
    linear_token_stats(hidden, weight, actions, bias=bias, backend=backend).lse.sum().backward()
    assert torch.equal(bias.grad, torch.full((2,), rows / 2))

"""The native linear forms: how many GEMMs they run, what they hold at once, and that the workspace changes no result."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.memory import extra_memory
from dqo_kernels import linear_row_loss, linear_soft_bellman_loss, linear_token_stats
from dqo_kernels.core import dispatch
from tests.kernels.backends import backends

NATIVE = [param for param in backends("linear_row_loss", torch.float32) if param.values[0] != "reference"]
N, D, V, B = 24, 7, 53, 6
ROW = 4 * V  # bytes of one row of logits


class Gemms(TorchDispatchMode):
    """Counts matrix products of rows, V and D by the rows that they take."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith(("aten::mm", "aten::addmm")):
            left, right = args[-2:]
            sizes = sorted([*left.shape, right.shape[1]])
            rows = (
                next(size for size in (left.shape[0], left.shape[1]) if size not in (V, D)) if sizes != [D, V, V] else 0
            )
            self.rows += rows
        return func(*args, **(kwargs or {}))


def tensors(seed=0, rows=N, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    made = {
        "hidden": torch.randn(rows, D, generator=rng), "weight": torch.randn(V, D, generator=rng),
        "bias": torch.randn(V, generator=rng), "ref_hidden": torch.randn(rows, D, generator=rng),
        "ref_weight": torch.randn(V, D, generator=rng),
    }  # fmt: skip
    made = {name: x.to(dtype) for name, x in made.items()}
    return made, torch.randint(V, (rows,), generator=rng), torch.arange(B + 1) * (rows // B)


def row_loss(kl=0.0, entropy=0.0):
    """A loss that couples the rows of a sequence."""

    def function(stats, rows, cu_seqlens):
        sequence = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
        sums = torch.zeros(len(cu_seqlens) - 1).index_add(0, sequence, stats.logprobs.float())
        loss = (sums[sequence].detach() * stats.logprobs).sum() + sums.square().sum() + (rows["x"] * stats.lse).sum()
        if kl:
            loss = loss + kl * stats.kl.sum()
        if entropy:
            loss = loss + entropy * stats.entropy.sum()
        return loss, {"rows": stats.lse.new_tensor(len(stats.lse))}

    return function


def run(made, actions, cu_seqlens, backend, workspace, *, live=("hidden", "weight", "bias"), ref=False, **options):
    inputs = {name: x.clone().requires_grad_(name in live) for name, x in made.items() if ref or "ref" not in name}
    x = torch.linspace(-1, 1, len(actions)).requires_grad_()
    hidden, weight = inputs.pop("hidden"), inputs.pop("weight")
    loss, _ = linear_row_loss(
        hidden, weight, actions, row_loss(**options), cu_seqlens, rows={"x": x}, workspace_bytes=workspace,
        backend=backend, **inputs,
    )  # fmt: skip
    owners = {"hidden": hidden, "weight": weight, "bias": inputs["bias"], "x": x}
    return loss, {name: owners[name] for name in (*live, "x")}


@pytest.mark.slow
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize(
    "live, ref, options, gemms",
    [
        (("hidden", "weight", "bias"), False, {}, 3),
        (("hidden", "weight"), False, {"entropy": 0.1}, 3),
        (("hidden",), False, {}, 2),  # a frozen head
        (("weight",), False, {}, 2),  # frozen hidden states
        ((), False, {}, 1),
        (("hidden", "weight", "bias"), True, {"kl": 0.1}, 4),
    ],
)
def test_as_many_gemms_as_there_must_be(backend, live, ref, options, gemms):
    made, actions, cu_seqlens = tensors()
    models = 2 if ref else 1
    # No backend has a part in how rows are cut; Triton's interpreter takes seconds for each cut.
    for rows in (N, N // B, 3, 1) if backend != "triton" else (3,):
        with Gemms() as counted:
            loss, owners = run(made, actions, cu_seqlens, backend, models * rows * ROW, live=live, ref=ref, **options)
            torch.autograd.grad(loss, list(owners.values()))
        # What fits the workspace, all of it or one sequence at a time, is projected once. Of a sequence that does not, all but
        # one workspace is projected again.
        again = models * B * (N // B - rows) if live and rows < N // B else 0
        assert counted.rows == gemms * N + again


@pytest.mark.slow
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("ref", [False, True])
def test_the_result_does_not_depend_on_the_workspace(backend, ref):
    made, actions, cu_seqlens = tensors(1)
    options = {"entropy": 0.2, "kl": 0.3 if ref else 0.0}
    want, owners = run(made, actions, cu_seqlens, "reference", None, ref=ref, **options)
    expected = torch.autograd.grad(want, list(owners.values()))
    for workspace in (1, ROW, 3 * ROW + 1, 8 * ROW, 100 * ROW, None) if backend != "triton" else (3 * ROW + 1, None):
        loss, owners = run(made, actions, cu_seqlens, backend, workspace, ref=ref, **options)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
        for got, right in zip(torch.autograd.grad(3.0 * loss, list(owners.values())), expected, strict=True):
            torch.testing.assert_close(got, 3.0 * right, rtol=2e-5, atol=2e-5 * right.abs().max().item())


@pytest.mark.parametrize("backend", backends("linear_row_loss", torch.float32))
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
def test_a_loss_scale_multiplies_the_loss_and_not_the_metrics(backend, scale):
    made, actions, cu_seqlens = tensors(9)
    hidden, weight = made["hidden"].requires_grad_(), made["weight"].requires_grad_()

    def call(**options):
        loss, sums = linear_row_loss(
            hidden, weight, actions, lambda stats, rows, cu: (stats.lse.sum(), {"lse": stats.lse.sum()}), cu_seqlens,
            rows={}, backend=backend, **options,
        )  # fmt: skip
        return loss, sums["lse"], *torch.autograd.grad(loss, [hidden, weight])

    plain, scaled = call(), call(loss_scale=scale)
    for got, want, factor in zip(scaled, plain, (0.25, 1.0, 0.25, 0.25), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, factor * want)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_lengths_on_the_host_change_nothing_and_are_checked(backend):
    made, actions, cu_seqlens = tensors(10)
    seen = []

    def call(**options):
        def row_loss(stats, rows, cu_seqlens):
            seen.append(cu_seqlens.tolist())
            return stats.lse.sum(), {}

        return linear_row_loss(
            made["hidden"], made["weight"], actions, row_loss, cu_seqlens, rows={}, workspace_bytes=9 * ROW,
            backend=backend, **options,
        )[0]  # fmt: skip

    assert torch.equal(call(), call(seqlens=[N // B] * B))
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] and len(seen) > 2
    for wrong, message in (
        ([N // B] * (B - 1), "6 lengths that add up to N = 24"),
        ([3, 5, *[4] * 4], "the differences of cu_seqlens"),
        (cu_seqlens.diff(), "B host integers"),
    ):
        with pytest.raises(ValueError, match=f"seqlens: expected {message}"):
            call(seqlens=wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_get_gradients_of_their_dtype_from_float32_logits(dtype):
    made, actions, cu_seqlens = tensors(2, dtype=dtype)
    made["weight"] = made["weight"].float()  # a head in float32 over half-precision hidden states
    loss, owners = run(made, actions, cu_seqlens, "cpp", None)
    exact, doubles = run({k: x.double() for k, x in made.items()}, actions, cu_seqlens, "reference", None)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-4, check_dtype=False)
    gradients = torch.autograd.grad(loss, list(owners.values()))
    expected = torch.autograd.grad(exact, list(doubles.values()))
    for name, got, right in zip(owners, gradients, expected, strict=True):
        assert got.dtype == owners[name].dtype
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(
            got.double(), right.double(), rtol=2 * eps, atol=1e-5 + eps * right.abs().max().item()
        )


def test_autocast_around_the_call_does_not_round_the_logits():
    made, actions, cu_seqlens = tensors(3)
    want, _ = run(made, actions, cu_seqlens, "cpp", None)
    with torch.autocast("cpu", torch.bfloat16):
        got, owners = run(made, actions, cu_seqlens, "cpp", None)
        torch.autograd.grad(got, list(owners.values()))
    assert torch.equal(got, want)


def test_statistics_can_be_differentiated_again_and_a_loss_only_once():
    made, actions, cu_seqlens = tensors(4)
    hidden, weight = made["hidden"].requires_grad_(), made["weight"].requires_grad_()
    stats = linear_token_stats(hidden, weight, actions, backend="cpp")
    first = torch.autograd.grad(stats.logprobs.sum(), [hidden, weight], retain_graph=True)
    again = torch.autograd.grad(stats.logprobs.sum(), [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    loss, owners = run(made, actions, cu_seqlens, "cpp", None)
    torch.autograd.grad(loss, list(owners.values()), retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_row_loss.*first backward"):
        torch.autograd.grad(loss, list(owners.values()))


def test_a_weight_that_changed_before_the_backward_is_noticed():
    made, actions, cu_seqlens = tensors(5)
    weight = made["weight"].requires_grad_()
    stats = linear_token_stats(made["hidden"], weight, actions, backend="cpp")
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.lse.sum().backward()


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("ref", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_no_workspace_outlives_the_backward_or_the_statistics(backend, ref, backward):
    made, actions, _ = tensors(11)
    weight = made["weight"].requires_grad_()
    reference = {name: made[name] for name in ("ref_hidden", "ref_weight")} if ref else {}
    stats = linear_token_stats(made["hidden"], weight, actions, backend=backend, **reference)
    engine = weakref.ref(stats.lse.grad_fn.engine)
    assert engine().workspaces
    if backward:
        stats.lse.sum().backward()
        assert not engine().workspaces
    del stats
    assert engine() is None


@pytest.mark.parametrize("backend", NATIVE)
def test_statistics_can_be_changed_in_place_unless_the_backward_needs_them(backend):
    made, actions, _ = tensors(12)
    hidden = made["hidden"].requires_grad_()
    stats = linear_token_stats(hidden, made["weight"], actions, backend=backend)
    (want,) = torch.autograd.grad(3.0 * stats.logprobs.sum(), hidden, retain_graph=True)
    (got,) = torch.autograd.grad(stats.logprobs.mul_(3.0).sum(), hidden, retain_graph=True)
    torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.entropy.mul_(3.0).sum().backward()


@pytest.mark.parametrize("backend", NATIVE)
def test_a_factor_that_arrives_in_the_backward_saves_float16_gradients_from_underflow(backend):
    made, actions, cu_seqlens = tensors(13, dtype=torch.float16)
    hidden, weight = made["hidden"].requires_grad_(), made["weight"].requires_grad_()

    def gradients(loss_scale, later):
        loss, _ = linear_row_loss(
            hidden, weight, actions, lambda stats, rows, cu: (stats.logprobs.sum(), {}), cu_seqlens, rows={},
            loss_scale=loss_scale, backend=backend,
        )  # fmt: skip
        return torch.autograd.grad(loss * later, [hidden, weight])

    for got, want in zip(gradients(2.0**-30, 2.0**30), gradients(1.0, 1.0), strict=True):
        assert got.dtype == torch.float16
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["row_loss", "token_stats", "soft_bellman_loss"])
def test_the_logits_of_all_rows_are_never_there_at_once(form, dtype):
    rows, width, vocab, workspace = 512, 16, 4000, 2**20  # (N, V): 8 MB, in bfloat16 4 MB; the workspace: 1 MiB
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, width, dtype=dtype).requires_grad_() for n in (rows, vocab))
    actions, cu_seqlens = torch.randint(vocab, (rows,)), torch.arange(0, rows + 1, 32)
    options = {"workspace_bytes": workspace, "backend": "cpp"}

    def step():
        if form == "token_stats":
            loss = linear_token_stats(hidden, weight, actions, **options).logprobs.sum()
        elif form == "row_loss":
            loss, _ = linear_row_loss(
                hidden,
                weight,
                actions,
                lambda stats, rows, cu: (stats.logprobs.sum(), {}),
                cu_seqlens,
                rows={},
                **options,
            )
        else:
            zeros = torch.zeros(rows)
            loss = linear_soft_bellman_loss(
                hidden, weight, actions, zeros, zeros, ref_logprobs=zeros, cu_seqlens=cu_seqlens, **options
            ).loss
        return torch.autograd.grad(loss, [hidden, weight])

    if dispatch.unavailable("cpp"):
        pytest.skip(dispatch.unavailable("cpp"))
    extra, _ = extra_memory(step, torch.device("cpu"))
    gradients = (rows * width + vocab * width) * 4
    cast = 0 if dtype == torch.float32 else 3 * vocab * width * 4  # a larger head is cast in blocks of gemm.BLOCK_BYTES
    assert extra.peak <= workspace + gradients + cast + 60 * rows * 4 < rows * vocab * dtype.itemsize


@pytest.mark.slow
@pytest.mark.parametrize("backend", NATIVE)
def test_the_reduced_loss_projects_once_whatever_fits(backend):
    made, actions, cu_seqlens = tensors(6)
    hidden, weight = made["hidden"].requires_grad_(), made["weight"].requires_grad_()
    values, zeros = torch.zeros(N, requires_grad=True), torch.zeros(N)
    cases = ("mean", N // B, 0), ("sum", 1, N - B), ("none", N, 0), ("none", 9, N - 9)
    for reduction, workspace, again in cases if backend != "triton" else cases[::3]:
        with Gemms() as counted:
            out = linear_soft_bellman_loss(
                hidden, weight, actions, zeros, values, ref_logprobs=zeros, cu_seqlens=cu_seqlens,
                reduction=reduction, workspace_bytes=workspace * ROW, backend=backend,
            )  # fmt: skip
            torch.autograd.grad(out.loss.sum(), [hidden, weight, values])
        assert counted.rows == 3 * N + again, (reduction, workspace)


@pytest.mark.parametrize("backend", NATIVE)
def test_a_loss_that_couples_the_batch_keeps_the_workspace_that_it_has(backend):
    made, actions, cu_seqlens = tensors(8)
    hidden, weight = made["hidden"].requires_grad_(), made["weight"].requires_grad_()
    for rows in (N, 10, 1):
        with Gemms() as counted:
            loss, _ = linear_row_loss(
                hidden, weight, actions, lambda stats, rows, cu: (stats.logprobs.mean() ** 2 * len(cu), {}), cu_seqlens,
                rows={}, coupling="batch", workspace_bytes=rows * ROW, backend=backend,
            )  # fmt: skip
            torch.autograd.grad(loss, [hidden, weight])
        assert counted.rows == 3 * N + (N - rows)


@pytest.mark.parametrize("backend", NATIVE)
def test_rows_that_no_loss_looks_at_have_no_gradient(backend):
    made, actions, cu_seqlens = tensors(7)
    hidden = made["hidden"].requires_grad_()

    def row_loss(stats, rows, cu_seqlens):  # of the second run, nothing
        loss = stats.logprobs.sum() if rows["first"][0] else torch.zeros(())
        return loss, {}

    first = torch.arange(N) < N // 2
    for workspace in (N // 2 * ROW, ROW):
        torch.full((N, D), torch.nan)  # what an uninitialised gradient would be made of
        loss, _ = linear_row_loss(
            hidden, made["weight"], actions, row_loss, cu_seqlens, rows={"first": first},
            workspace_bytes=workspace, backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert gradient[: N // 2].any(1).all() and not gradient[N // 2 :].any()

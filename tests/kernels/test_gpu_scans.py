"""The scans in Triton and CUDA themselves against float64 loops, on a GPU or as gpu_backends.py says."""

import numpy as np
import pytest
import torch

from dqo_kernels.core.bellman_options import BellmanOptions
from tests.kernels.gpu_backends import BACKENDS, DEVICE, launchers, on_device
from tests.kernels.oracle import bellman_rows, numeric_gradient

BLOCK = 512 if DEVICE == "cuda" else 64  # rows of a tile of Triton's, fewer in its interpreter; CUDA's have 32
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for inf - inf and NaN in the interpreter


@pytest.fixture(params=BACKENDS, autouse=True)
def kernels(request):
    """The modules under test."""
    global LAMBDA_RETURN, SOFT_BELLMAN
    LAMBDA_RETURN, SOFT_BELLMAN = (launchers(op, request.param) for op in ("lambda_return", "soft_bellman"))


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


LENGTHS = [0, 1, 2, BLOCK - 1, 0, BLOCK, BLOCK + 1, 2 * BLOCK + 3, 0]


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def loop_return(rewards, values, bootstrap, cu_seqlens, gamma, lam):
    returns = [None] * rewards.shape[0]
    for b, (lo, hi) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        ahead, value = bootstrap[b], bootstrap[b]
        for t in reversed(range(lo, hi)):
            ahead = rewards[t] + gamma * ((1 - lam) * value + lam * ahead)
            returns[t], value = ahead, values[t]
    return torch.stack(returns)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.9), (0.9, 0.0), (0.0, 0.5)])
def test_lambda_return_and_its_gradient(gamma, lam):
    rng = torch.Generator().manual_seed(0)
    cu_seqlens = boundaries(LENGTHS)
    n = int(cu_seqlens[-1])
    rewards, values, upstream = torch.randn(3, n, generator=rng).unbind()
    bootstrap = torch.randn(len(LENGTHS), generator=rng)
    live = [x.double().requires_grad_() for x in (rewards, values, bootstrap)]
    want = loop_return(*live, cu_seqlens, gamma, lam)
    got = LAMBDA_RETURN.fwd(*on_device(rewards, values, bootstrap, cu_seqlens), gamma, lam).cpu()
    scale = want.detach().abs().max().item()
    torch.testing.assert_close(got.double(), want.detach(), rtol=0, atol=2e-6 * scale)
    exact = torch.autograd.grad(want, live, upstream.double())
    grads = LAMBDA_RETURN.bwd(*on_device(upstream, cu_seqlens), gamma, lam)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=2e-6 * (1 + b.abs().max().item()))


@pytest.mark.slow
def test_a_sequence_of_more_rows_than_a_block_has_threads():
    rng = torch.Generator().manual_seed(1)
    cu_seqlens = boundaries([2100])
    rewards, values = torch.randn(2, 2100, generator=rng).unbind()
    want = loop_return(rewards.double(), values.double(), torch.ones(1).double(), cu_seqlens, 0.999, 0.99)
    got = LAMBDA_RETURN.fwd(*on_device(rewards, values, torch.ones(1), cu_seqlens), 0.999, 0.99).cpu()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * want.abs().max().item())


@pytest.mark.parametrize("lam, reached", [(0.0, 1), (0.5, BLOCK + 3)])
def test_nan_stays_in_its_sequence_and_passes_no_gain_of_zero(lam, reached):
    cu_seqlens = boundaries([3, BLOCK + 3, 2])
    n = int(cu_seqlens[-1])
    rewards, values = torch.ones(n), torch.ones(n)
    rewards[2 + BLOCK + 3] = torch.nan  # the last row of the middle sequence
    returns = LAMBDA_RETURN.fwd(*on_device(rewards, values, torch.zeros(3), cu_seqlens), 1.0, lam).cpu()
    assert returns[3 : n - 2].isnan().sum() == reached and not returns[[0, 1, 2, -2, -1]].isnan().any()


def test_scans_of_no_sequences_and_no_rows():
    empty = torch.empty(0)
    for count in (0, 2):
        cu_seqlens, bootstrap = torch.zeros(count + 1, dtype=torch.long), torch.ones(count)
        args = on_device(empty, empty, bootstrap, cu_seqlens)
        assert LAMBDA_RETURN.fwd(*args, 1.0, 0.5).shape == (0,)
        assert torch.equal(LAMBDA_RETURN.bwd(*on_device(empty, cu_seqlens), 1.0, 0.5)[2].cpu(), 0 * bootstrap)
        options = BellmanOptions(**OPTIONS | {"policy_target": "td", "target": "residual"})
        grads = SOFT_BELLMAN.bwd_residual(*on_device(empty, empty, cu_seqlens, None), options)
        assert torch.equal(grads[2].cpu(), 0 * bootstrap)


def bellman_case(seed, lengths):
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    names = ("logprobs", "ref_logprobs", "rewards", "values", "behavior_logprobs", "target_values")
    rows = {name: rng.standard_normal(n).astype(np.float32).astype(np.float64) for name in names}
    return rows, rng.standard_normal(len(lengths)).astype(np.float32).astype(np.float64), np.cumsum([0, *lengths])


def run_bellman(rows, bootstrap, cu_seqlens, mask, options, behavior=True, target_values=True):
    t = {name: torch.from_numpy(x).float() for name, x in rows.items()}
    args = on_device(
        t["logprobs"], t["ref_logprobs"], t["rewards"], t["values"], torch.from_numpy(cu_seqlens), mask,
        t["behavior_logprobs"] if behavior else None,
        None if bootstrap is None else torch.from_numpy(bootstrap).float(),
        t["target_values"] if target_values else None,
    )  # fmt: skip
    return [x.cpu() for x in SOFT_BELLMAN.fwd(*args, BellmanOptions(**options))]


def hidden_rows(rows, cu_seqlens, holes):
    """The same rows with `holes` masked ones before, between and after those of every sequence, all NaN."""
    mask, bounds = [], [0]
    for length in np.diff(cu_seqlens):
        mask += [False] * holes
        for _ in range(length):
            mask += [True] + [False] * holes
        bounds.append(len(mask))
    mask = np.array(mask, dtype=bool)
    spread = {name: np.full(len(mask), np.nan) for name in rows}
    for name, x in rows.items():
        spread[name][mask] = x
    return spread, np.array(bounds), torch.from_numpy(mask)


OPTIONS = {
    "beta": 0.3, "gamma": 0.97, "lam": 0.8, "policy_target": "return", "target": "detach", "is_level": "trajectory",
    "is_cap": 1.0, "is_floor": -2.0,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "is_level, policy_target, lam, target",
    [(level, "return", 0.8, "detach") for level in ("none", "token", "suffix", "trajectory", "prefix")]
    # without behaviour log-probabilities, so without levels
    + [("suffix", "td", 0.0, "residual")]
    + [(level, "one_step", 1.0, "detach") for level in ("none", "trajectory")],
)
def test_soft_bellman_rows(is_level, policy_target, lam, target):
    lengths = [3, 0, BLOCK + 2, 1]
    rows, bootstrap, cu_seqlens = bellman_case(1, lengths)
    options = OPTIONS | {"policy_target": policy_target, "lam": lam, "target": target, "is_level": is_level}
    plain = target == "residual"
    live = {"logprobs": rows["logprobs"], "values": rows["values"], "bootstrap": bootstrap}
    extra = {} if plain else {"target_values": rows["target_values"], "behavior_logprobs": rows["behavior_logprobs"]}
    fixed = {"ref_logprobs": rows["ref_logprobs"], "rewards": rows["rewards"], "cu_seqlens": cu_seqlens}
    want = bellman_rows(live, live, **fixed, **extra, **options)
    got = run_bellman(rows, bootstrap, cu_seqlens, None, options, not plain, not plain)
    delta = rows["logprobs"] - rows["ref_logprobs"]
    error = options["beta"] * delta - want[3]
    policy_grad = want[4] * error * (1.0 if plain else options["beta"])
    value_grad = 0 * error if plain else want[4] * (rows["values"] - want[2])
    for a, b in zip(got, [*want, policy_grad, value_grad], strict=True):
        torch.testing.assert_close(a.double(), torch.from_numpy(b), rtol=1e-5, atol=1e-5)

    spread, bounds, mask = hidden_rows(rows, cu_seqlens, 1)
    holes = run_bellman(spread, bootstrap, bounds, mask, options, not plain, not plain)
    for a, b in zip(holes, got, strict=True):
        torch.testing.assert_close(a[mask], b, rtol=1e-5, atol=1e-5)
        assert (a[~mask] == 0).all()


def test_policy_gradient_is_that_of_the_rows():
    rows, bootstrap, cu_seqlens = bellman_case(2, [3, 4])
    fixed = {"ref_logprobs": rows["ref_logprobs"], "rewards": rows["rewards"], "cu_seqlens": cu_seqlens}
    frozen = {"logprobs": rows["logprobs"], "values": rows["values"], "bootstrap": bootstrap}
    got = run_bellman(rows, bootstrap, cu_seqlens, None, OPTIONS, False, False)
    for index, name, field in ((0, "logprobs", 5), (1, "values", 6)):
        total = lambda x, n=name, i=index: bellman_rows({**frozen, n: x}, frozen, **fixed, **OPTIONS)[i].sum()  # noqa: E731
        expected = torch.from_numpy(numeric_gradient(total, rows[name].copy()))
        torch.testing.assert_close(got[field].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy_target", ["return", "td", "one_step"])
@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_residual_gradient_and_its_masked_rows(policy_target, lam):
    lengths = [3, 0, 4, 1]
    rows, bootstrap, cu_seqlens = bellman_case(3, lengths)
    options = OPTIONS | {"policy_target": policy_target, "lam": lam, "target": "residual"}
    fixed = {"ref_logprobs": rows["ref_logprobs"], "rewards": rows["rewards"], "cu_seqlens": cu_seqlens}
    frozen = {"logprobs": rows["logprobs"], "values": rows["values"], "bootstrap": bootstrap}
    cotangent = np.random.default_rng(4).standard_normal(8).astype(np.float32)

    def backward(cotangent, policy_grad, cu, mask):
        tensors = on_device(torch.from_numpy(cotangent), policy_grad, torch.from_numpy(cu), mask)
        return [x.cpu() for x in SOFT_BELLMAN.bwd_residual(*tensors, BellmanOptions(**options))]

    policy_grad = run_bellman(rows, bootstrap, cu_seqlens, None, options, False, False)[5]
    got = backward(cotangent, policy_grad, cu_seqlens, None)
    for name, grad in zip(("logprobs", "values", "bootstrap"), got, strict=True):
        total = lambda x, n=name: (cotangent * bellman_rows({**frozen, n: x}, frozen, **fixed, **options)[0]).sum()  # noqa: E731
        expected = torch.from_numpy(numeric_gradient(total, frozen[name].copy()))
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)

    holes = BLOCK // 4 + 1  # so that a sequence spans tiles, some of nothing but masked rows
    spread, bounds, mask = hidden_rows(rows | {"cotangent": cotangent}, cu_seqlens, holes)
    hidden = run_bellman(spread, bootstrap, bounds, mask, options, False, False)[5]
    masked = backward(spread["cotangent"].astype(np.float32), hidden, bounds, mask)
    for a, b in zip(masked, got, strict=True):
        torch.testing.assert_close(a[mask] if a.shape == mask.shape else a, b, rtol=1e-5, atol=1e-6)
    assert all((x[~mask] == 0).all() for x in masked[:2])


def test_adjoint_carries_over_tiles():
    # <y, J d> = <J^T y, d> with J the residual's derivative, by a direction d and float64 differences.
    rows, bootstrap, cu_seqlens = bellman_case(5, [2 * BLOCK + 3, BLOCK])
    options = OPTIONS | {"target": "residual", "lam": 0.9, "is_level": "none"}
    fixed = {"ref_logprobs": rows["ref_logprobs"], "rewards": rows["rewards"], "cu_seqlens": cu_seqlens}
    start = {"logprobs": rows["logprobs"], "values": rows["values"], "bootstrap": bootstrap}
    rng = np.random.default_rng(6)
    direction = {name: rng.standard_normal(len(x)) for name, x in start.items()}
    cotangent = rng.standard_normal(len(rows["rewards"])).astype(np.float32)

    def loss(step):
        moved = {name: x + step * direction[name] for name, x in start.items()}
        return (cotangent * bellman_rows(moved, moved, **fixed, **options)[0]).sum()

    policy_grad = run_bellman(rows, bootstrap, cu_seqlens, None, options, False, False)[5]
    tensors = on_device(torch.from_numpy(cotangent), policy_grad, torch.from_numpy(cu_seqlens), None)
    grads = SOFT_BELLMAN.bwd_residual(*tensors, BellmanOptions(**options))
    inner = sum((g.cpu().double().numpy() * d).sum() for g, d in zip(grads, direction.values(), strict=True))
    assert inner == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("poison", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("is_level", ["trajectory", "suffix", "prefix", "token"])
@pytest.mark.parametrize("is_cap", [1.0, None])
def test_weights_of_infinite_and_nan_ratios(poison, is_level, is_cap):
    rows, bootstrap, cu_seqlens = bellman_case(7, [2, 5, 2])
    rows["logprobs"][4] = poison
    options = OPTIONS | {"is_level": is_level, "is_cap": is_cap, "is_floor": None}
    weights = run_bellman(rows, None, cu_seqlens, None, options)[4]
    rho = rows["logprobs"][2:7] - rows["behavior_logprobs"][2:7]
    x = {"token": rho, "trajectory": np.full(5, rho.sum()), "suffix": rho[::-1].cumsum()[::-1],
         "prefix": np.concatenate([[0.0], rho.cumsum()[:-1]])}[is_level]  # fmt: skip
    want = np.exp(np.minimum(x, np.inf if is_cap is None else is_cap))
    torch.testing.assert_close(weights[2:7].double(), torch.from_numpy(want), rtol=1e-5, atol=0, equal_nan=True)
    assert not weights[[0, 1, 7, 8]].isnan().any()


def test_sequences_have_the_same_bits_alone_and_in_a_batch():
    rows, bootstrap, cu_seqlens = bellman_case(8, [3, BLOCK + 5, 2])
    together = run_bellman(rows, bootstrap, cu_seqlens, None, OPTIONS)
    inside = slice(3, 3 + BLOCK + 5)
    alone = run_bellman(
        {name: x[inside] for name, x in rows.items()}, bootstrap[1:2], np.array([0, BLOCK + 5]), None, OPTIONS
    )
    assert all(same_bits(a[inside], b) for a, b in zip(together, alone, strict=True))

"""soft_bellman against explicit loops, its gradients against finite differences with frozen targets (T3)."""

import itertools

import numpy as np
import pytest
import torch

from dqo_kernels import soft_bellman
from tests.combinations import pairwise
from tests.kernels.backends import backends
from tests.kernels.oracle import bellman_rows, numeric_gradient, random_batch

BACKENDS = backends("soft_bellman")
CAPS = [
    {"is_cap": 1.0},
    {"is_cap": None},
    {"is_cap": 0.2, "is_floor": -0.3},
    {"is_cap": None, "is_floor": 0.1},
]
GRID = list(
    itertools.product(
        ("return", "td", "one_step"),
        ("detach", "residual"),
        ("trajectory", "suffix", "prefix", "token", "none"),
        (0.0, 0.3, 0.95, 1.0),
    )
)


def options_of(index):
    policy_target, target, is_level, lam = GRID[index]
    options = {
        "policy_target": policy_target,
        "target": target,
        "is_level": is_level,
        "lam": lam,
        "gamma": 0.9,
        "beta": 0.4,
    }
    # The shift by a quarter of the index lets every cap meet every level and every lambda.
    return {**options, **CAPS[(index + index // 4) % 4]}


def live_arrays(batch):
    return {
        "logprobs": batch.logprobs.numpy(),
        "values": batch.values.numpy(),
        "bootstrap": batch.bootstrap.numpy(),
    }


def constants(batch, use_behavior, use_target_values):
    arrays = {
        "ref_logprobs": batch.ref_logprobs, "rewards": batch.rewards,
        "behavior_logprobs": batch.behavior_logprobs if use_behavior else None,
        "target_values": batch.target_values if use_target_values else None,
    }  # fmt: skip
    return arrays


def run(tensors, batch, extra, options, backend=None):
    return soft_bellman(
        tensors["logprobs"], extra["ref_logprobs"], extra["rewards"], tensors["values"], batch.cu_seqlens,
        bootstrap=tensors["bootstrap"], behavior_logprobs=extra["behavior_logprobs"],
        target_values=extra["target_values"], reduction="none", backend=backend, **options,
    )  # fmt: skip


EACH_CASE = pytest.mark.parametrize("index", range(len(GRID)), ids=["-".join(map(str, case)) for case in GRID])


@pytest.mark.parametrize("backend", BACKENDS)
@EACH_CASE
def test_terms_and_gradients_equal_the_explicit_loops(backend, index):
    compare_with_loops(index, options_of(index), backend)


@EACH_CASE
def test_a_discount_of_each_row_equals_the_explicit_loops(index):
    rows = len(random_batch(index).actions)
    discounts = np.random.default_rng(index).choice([1.0, 0.9, 0.5, 0.0], size=rows, p=[0.6, 0.2, 0.15, 0.05])
    compare_with_loops(index, options_of(index) | {"gamma": 0.3, "discounts": discounts}, None)


def test_equal_discounts_are_gamma_and_other_backends_refuse_them():
    batch, options = random_batch(3), {"lam": 0.7, "is_level": "token", "beta": 0.4}
    extra = constants(batch, use_behavior=True, use_target_values=False)
    tensors = {name: torch.tensor(x) for name, x in live_arrays(batch).items()}
    discounts = torch.full_like(batch.rewards, 0.9)
    for got, want in zip(
        run(tensors, batch, extra, options | {"discounts": discounts}),
        run(tensors, batch, extra, options | {"gamma": 0.9}),
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="backend.*discounts"):
        run(tensors, batch, extra, options | {"discounts": discounts}, "cpp")
    with pytest.raises(ValueError, match="discounts"):
        run(tensors, batch, extra, options | {"discounts": discounts[1:]})


def compare_with_loops(index, options, backend):
    batch = random_batch(index)
    slow_copy = index % 2 == 0 and options["target"] == "detach"
    extra = constants(batch, use_behavior=index % 3 > 0, use_target_values=slow_copy)
    frozen = live_arrays(batch)
    fixed = {name: None if x is None else x.numpy() for name, x in extra.items()}
    fixed |= options | {"cu_seqlens": batch.cu_seqlens.tolist()}
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in frozen.items()}

    given = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    terms = run(tensors, batch, extra, given, backend)
    for name, got, want in zip(terms._fields, terms, bellman_rows(frozen, frozen, **fixed), strict=True):
        np.testing.assert_allclose(got.detach(), want, rtol=1e-12, atol=1e-13, err_msg=name)
    assert not any(x.requires_grad for x in terms[2:])
    assert terms.value_loss.requires_grad == (options["target"] == "detach")

    upstream = np.random.default_rng(index).normal(size=(2, len(batch.actions)))
    if options["target"] == "residual":
        upstream[1] = 0.0  # its value loss is a metric
    losses = torch.stack(terms[:2])
    gradients = torch.autograd.grad((losses * torch.tensor(upstream)).sum(), list(tensors.values()), allow_unused=True)
    for (name, array), got in zip(frozen.items(), gradients, strict=True):

        def loss(moved, name=name):
            rows = bellman_rows({**frozen, name: moved}, frozen, **fixed)
            return (np.stack(rows[:2]) * upstream).sum()

        got = np.zeros_like(array) if got is None else got.numpy()
        # Central differences of a quadratic are exact up to rounding: about 1e-16 * |loss| / 1e-4.
        want = numeric_gradient(loss, array, step=1e-4)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * (1 + np.abs(want).max()), err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy_target", ["return", "td", "one_step"])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_the_residual_form_passes_gradcheck(backend, policy_target, lam):
    batch = random_batch(1)
    extra = constants(batch, use_behavior=True, use_target_values=False)
    # Importance weights are constants, which gradcheck would move: see the finite differences above.
    options = {
        "policy_target": policy_target,
        "lam": lam,
        "target": "residual",
        "is_level": "none",
        "gamma": 0.9,
    }
    inputs = [torch.tensor(x, requires_grad=True) for x in live_arrays(batch).values()]

    def policy_loss(*inputs):
        tensors = dict(zip(("logprobs", "values", "bootstrap"), inputs, strict=True))
        return run(tensors, batch, extra, options, backend).policy_loss

    assert torch.autograd.gradcheck(policy_loss, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", ["detach", "residual"])
@pytest.mark.parametrize("policy_target", ["return", "td", "one_step"])
def test_soft_values_stand_in_for_the_value_model(backend, target, policy_target):
    batch, beta = random_batch(2), 0.4
    logprobs = batch.logprobs.clone().requires_grad_()
    lse, ref_lse = torch.randn(2, len(batch.actions), dtype=torch.float64).unbind()
    lse, values = lse.requires_grad_(), (beta * (lse - ref_lse)).detach().requires_grad_()
    args = logprobs, batch.ref_logprobs, batch.rewards
    options = {"beta": beta, "lam": 0.7, "target": target, "policy_target": policy_target, "backend": backend}
    soft = soft_bellman(*args, None, batch.cu_seqlens, lse=lse, ref_lse=ref_lse, **options)
    table = soft_bellman(*args, values, batch.cu_seqlens, **options)
    for a, b in zip(soft, table, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    sums = [sum(x for x in terms[:2] if x.requires_grad) for terms in (soft, table)]
    grad_lse, grad_soft = torch.autograd.grad(sums[0], (lse, logprobs))
    grad_values, grad_table = torch.autograd.grad(sums[1], (values, logprobs))
    torch.testing.assert_close(grad_lse, beta * grad_values, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad_soft, grad_table, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_are_the_sum_and_the_mean_of_the_rows(backend):
    batch = random_batch(3)
    args = batch.logprobs, batch.ref_logprobs, batch.rewards, batch.values, batch.cu_seqlens
    rows, total, mean = (soft_bellman(*args, reduction=r, backend=backend) for r in ("none", "sum", "mean"))
    for field in ("policy_loss", "value_loss"):
        torch.testing.assert_close(getattr(total, field), getattr(rows, field).sum())
        torch.testing.assert_close(getattr(mean, field), getattr(rows, field).mean())
    assert all(torch.equal(a, b) for a, b in zip(rows[2:], mean[2:], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_zero_rows_give_a_loss_of_zero(backend, reduction):
    empty = torch.zeros(0, requires_grad=True)
    for boundaries in ([0], [0, 0], [0, 0, 0]):
        terms = soft_bellman(empty, empty, empty, empty, torch.tensor(boundaries), reduction=reduction, backend=backend)
        assert terms.policy_loss.item() == 0.0 and terms.value_loss.item() == 0.0
        (terms.policy_loss + terms.value_loss).backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "total, is_level, target",
    pairwise([-1e3, 0.0, 1e3], ["trajectory", "suffix", "prefix", "token"], ["detach", "residual"]),
)
def test_huge_log_ratios_never_overflow(backend, total, is_level, target):
    # Defect 11: exp before the cap is inf, and inf * 0 in its backward NaN. w stays in [0, e] instead. T8.
    rows = 8
    logprobs = torch.full((rows,), total / rows, requires_grad=True)
    values = torch.zeros(rows, requires_grad=True)
    zeros, cu_seqlens = torch.zeros(rows), torch.tensor([0, rows])
    terms = soft_bellman(logprobs, zeros, zeros, values, cu_seqlens, is_level=is_level, target=target, backend=backend)
    assert (terms.weights >= 0).all() and (terms.weights <= torch.e + 1e-6).all()
    if total > 0 and is_level != "prefix":
        torch.testing.assert_close(terms.weights, torch.full((rows,), torch.e))
    if total < 0 and is_level == "trajectory":
        assert torch.equal(terms.weights, torch.zeros(rows))
    if total == 0:
        assert torch.equal(terms.weights, torch.ones(rows))
    loss = terms.policy_loss + terms.value_loss
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all() and (values.grad is None or values.grad.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "poisoned, target, is_level",
    pairwise(
        ["logprobs", "ref_logprobs", "rewards", "values", "behavior_logprobs"],
        ["detach", "residual"],
        ["trajectory", "suffix", "prefix"],
    ),
)
def test_a_nan_poisons_its_own_sequence_alone(backend, poisoned, target, is_level):
    batch = random_batch(4, (3, 4, 2))
    names = ("logprobs", "ref_logprobs", "rewards", "values", "behavior_logprobs")
    outside = torch.tensor([True] * 3 + [False] * 4 + [True] * 2)

    def gradients(poison):
        tensors = {name: getattr(batch, name).clone() for name in names}
        if poison:
            tensors[poisoned][4] = torch.nan
        live = [tensors["logprobs"].requires_grad_(), tensors["values"].requires_grad_()]
        terms = soft_bellman(
            *(tensors[name] for name in names[:4]), batch.cu_seqlens, behavior_logprobs=tensors[names[4]],
            lam=0.5, target=target, is_level=is_level, backend=backend,
        )  # fmt: skip
        loss = terms.policy_loss + (terms.value_loss if target == "detach" else 0.0)
        return terms, loss, torch.autograd.grad(loss, live)

    (_, clean_loss, clean), (terms, loss, got) = gradients(False), gradients(True)
    assert clean_loss.isfinite() and loss.isnan()
    for a, b in zip(got, clean, strict=True):
        torch.testing.assert_close(a[outside], b[outside], rtol=0, atol=0)
    assert not any(x[outside].isnan().any() for x in terms[2:])


@pytest.mark.parametrize("backend", [p for p in backends("soft_bellman", torch.float32) if p.values[0] != "reference"])
@pytest.mark.parametrize("count, at", [(6, 1), (70, 30)])  # within a tile of a scan, and from one to the next
@pytest.mark.parametrize(
    "gamma, lam, policy_target, of_logprobs, of_values",
    [  # the rows from `at` on that its error has a part in
        (0.0, 0.5, "return", [0], [0]),
        (1.0, 0.0, "return", [0, 1], [0, 2]),
        (1.0, 0.0, "one_step", [0], [0, 1]),
        (1.0, 1.0, "td", range(40), [0]),
    ],
)
def test_a_nan_that_arrives_passes_no_discount_of_zero(
    backend, count, at, gamma, lam, policy_target, of_logprobs, of_values
):
    rng = torch.Generator().manual_seed(0)
    live = [x.requires_grad_() for x in torch.randn(2, count, generator=rng).unbind()]
    zeros, cu_seqlens = torch.zeros(count), torch.tensor([0, count])
    options = {"gamma": gamma, "lam": lam, "policy_target": policy_target, "target": "residual", "reduction": "none"}
    terms = soft_bellman(live[0], zeros, zeros, live[1], cu_seqlens, is_level="none", backend=backend, **options)
    arriving = torch.ones(count)
    arriving[at] = torch.nan
    for grad, rows in zip(torch.autograd.grad(terms.policy_loss, live, arriving), (of_logprobs, of_values)):
        assert grad.isnan().nonzero()[:, 0].tolist() == [at + row for row in rows if at + row < count]


@pytest.mark.parametrize("backend", backends("soft_bellman", torch.float32))
def test_a_cap_and_a_floor_of_zero_are_no_absent_ones(backend):
    batch = random_batch(7)
    rows = [x.float() for x in (batch.logprobs, batch.ref_logprobs, batch.rewards, batch.values)]
    for cap, floor in ((0.0, None), (None, 0.0)):
        options = {"is_level": "token", "is_cap": cap, "is_floor": floor, "backend": backend}
        weights = soft_bellman(*rows, batch.cu_seqlens, **options).weights
        torch.testing.assert_close(weights, (rows[0] - rows[1]).clamp(floor, cap).exp())


@pytest.mark.parametrize("backend", BACKENDS)
def test_constants_receive_no_gradient(backend):
    batch = random_batch(5)
    names = ("ref_logprobs", "rewards", "behavior_logprobs", "target_values")
    fixed = {name: getattr(batch, name).clone().requires_grad_() for name in names}
    logprobs = batch.logprobs.clone().requires_grad_()
    for target, options in (("detach", {"target_values": fixed["target_values"]}), ("residual", {})):
        terms = soft_bellman(
            logprobs, fixed["ref_logprobs"], fixed["rewards"], batch.values, batch.cu_seqlens,
            behavior_logprobs=fixed["behavior_logprobs"], target=target, backend=backend, **options,
        )  # fmt: skip
        terms.policy_loss.backward()
    assert all(x.grad is None for x in fixed.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_values_are_read_and_the_rest_computed_in_float32(backend):
    batch = random_batch(6, (20, 30))
    rows = [x.float() for x in (batch.logprobs, batch.ref_logprobs, batch.rewards, batch.values)]
    rows[3] = rows[3].bfloat16()
    got = soft_bellman(*rows, batch.cu_seqlens, lam=0.9, backend=backend)
    exact = soft_bellman(*(x.double() for x in rows), batch.cu_seqlens, lam=0.9, backend=backend)
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.float32
        # 30 additions of terms below the largest, each rounded to 2^-24; the squares double it.
        torch.testing.assert_close(a.double(), b, rtol=100 * 2**-24, atol=100 * 2**-24)

"""soft_bellman and lambda_return in C++ against the reference, over every combination of options, masks and absent arguments."""

import itertools

import pytest
import torch

from dqo_kernels import lambda_return, soft_bellman_loss
from dqo_kernels.core import dispatch
from dqo_kernels.core.bellman_options import IS_LEVELS, POLICY_TARGETS, BellmanOptions
from dqo_kernels.soft_bellman import bellman_rows
from tests.kernels.oracle import random_batch

pytest.importorskip("dqo_kernels._cpu", reason=dispatch.unavailable("cpp"))
from dqo_kernels import soft_bellman_cpp

LENGTHS = (3, 1, 0, 9, 2)
MASK = torch.tensor(
    [0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0], dtype=torch.bool
)  # the last sequence has no row that counts
CAPS = [(1.0, None), (None, None), (0.2, -0.3), (None, 0.1)]
NAMES = ("logprobs", "ref_logprobs", "rewards", "values", "behavior_logprobs", "target_values")


def tensors(seed, dtype=torch.float64, mask=None):
    batch = random_batch(seed, LENGTHS)
    found = {name: getattr(batch, name).to(dtype) for name in (*NAMES, "bootstrap")}
    if mask is not None:  # what is under the mask must not matter
        for name in NAMES:
            found[name][~mask] = torch.nan
    return found, batch.cu_seqlens


def run(given, cu_seqlens, backend, mask=None, **options):
    """Terms, and the gradients that random upstream rows send into logprobs, values and bootstrap."""
    live = {name: given[name].clone().requires_grad_() for name in ("logprobs", "values", "bootstrap") if name in given}
    all_of = {"behavior_logprobs": None, "target_values": None, "bootstrap": None, **given, **live}
    required = [all_of.pop(name) for name in NAMES[:4]]
    all_of |= {"lse": None, "ref_lse": None, "options": BellmanOptions(beta=0.4, gamma=0.9, **options)}
    terms = bellman_rows(*required, cu_seqlens, mask, **all_of, backend=backend)
    upstream = torch.randn(2, len(required[0]), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if options["target"] == "residual":
        assert not terms.value_loss.requires_grad
    loss = (torch.stack(terms[:2]) * upstream.to(terms[0].dtype)).sum()
    gradients = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
    return list(terms), [torch.zeros_like(x) if g is None else g for x, g in zip(live.values(), gradients, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("target", ["detach", "residual"])
@pytest.mark.parametrize("policy_target", POLICY_TARGETS)
def test_every_combination_equals_the_reference(policy_target, target, masked):
    mask = MASK if masked else None
    optional = ("behavior_logprobs", "bootstrap", *(["target_values"] if target == "detach" else []))
    presence = itertools.product((False, True), repeat=len(optional))
    for index, (present, is_level, (cap, floor)) in enumerate(itertools.product(presence, IS_LEVELS, CAPS)):
        given, cu_seqlens = tensors(index, mask=mask)
        for name, keep in zip(optional, present, strict=True):
            if not keep:
                del given[name]
        if target == "residual":
            del given["target_values"]
        options = {
            "policy_target": policy_target,
            "target": target,
            "is_level": is_level,
            "is_cap": cap,
            "is_floor": floor,
        }
        options["lam"] = (0.0, 0.3, 1.0)[index % 3]
        want, got = (run(given, cu_seqlens, backend, mask, **options) for backend in ("reference", "cpp"))
        for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-12, atol=1e-12, msg=lambda m, o=options, p=present: f"{o} {p}: {m}"
            )
        if masked:
            rows = [*got[0], *got[1][:2]]
            assert not any(x[~mask].any() for x in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", ["detach", "residual"])
@pytest.mark.parametrize("is_level", IS_LEVELS)
def test_a_nan_leaves_every_other_sequence_bit_for_bit(dtype, target, is_level):
    options = {
        "policy_target": "td",
        "lam": 0.7,
        "target": target,
        "is_level": is_level,
        "is_cap": 1.0,
        "is_floor": None,
    }
    clean, cu_seqlens = tensors(1, dtype)
    if target == "residual":
        del clean["target_values"]
    want = run(clean, cu_seqlens, "cpp", **options)
    others = torch.ones(len(MASK), dtype=torch.bool)
    others[4:13] = False
    for name in clean:
        given = {key: x.clone() for key, x in clean.items()}
        given[name][3 if name == "bootstrap" else 7] = torch.nan
        got = run(given, cu_seqlens, "cpp", **options)
        unread = is_level == "none" and name == "behavior_logprobs"
        assert got[0][0].isnan().any() or got[0][1].isnan().any() or unread
        for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
            rows = others if len(a) == len(others) else torch.tensor([True, True, True, False, True])
            assert torch.equal(a[rows], b[rows]), name


@pytest.mark.parametrize("policy_target", POLICY_TARGETS)
def test_an_infinite_value_stays_out_of_targets_that_do_not_hold_it(policy_target):
    given, cu_seqlens = tensors(1)
    given["values"][8] = torch.inf
    del given["target_values"]
    options = {
        "policy_target": policy_target,
        "lam": 0.3,
        "target": "detach",
        "is_level": "none",
        "is_cap": None,
        "is_floor": None,
    }
    want, got = (run(given, cu_seqlens, backend, **options)[0] for backend in ("reference", "cpp"))
    assert got[3].isinf().any()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_residual_form_trains_no_value_loss():
    given, cu_seqlens = tensors(2)
    rows = [given[name] for name in NAMES[:4]]
    options = BellmanOptions(0.4, 0.9, 0.5, "td", "residual", "none", None, None)
    value_loss, *_, value_grad = soft_bellman_cpp.fwd(*rows, cu_seqlens, None, None, None, None, options)[1:]
    assert value_loss.all() and not value_grad.any()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("shape", [(1, 6), (6, 1)])
def test_a_mask_may_be_a_strided_view(backend, shape):
    # With one sequence, or sequences of one row, flattening such a mask copies nothing.
    rng = torch.Generator().manual_seed(3)
    logits, ref_logits = torch.randn(2, *shape, 5, generator=rng).unbind()
    rows, actions = torch.randn(*shape, generator=rng), torch.ones(shape, dtype=torch.long)
    mask = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool).view(shape)
    wide = ~mask.repeat_interleave(2, 1)
    wide[:, ::2] = mask
    terms = [
        soft_bellman_loss(logits, actions, rows, rows, ref_logits=ref_logits, mask=m, reduction="none", backend=backend)
        for m in (mask, wide[:, ::2])
    ]
    assert all(torch.equal(a, b) for a, b in zip(*terms, strict=True) if a is not None)


def test_the_number_of_threads_changes_no_bit():
    lengths = torch.randint(
        0, 300, (300,), generator=torch.Generator().manual_seed(2)
    ).tolist()  # enough work for eight
    batch = random_batch(3, lengths, vocab=2)
    given = {name: getattr(batch, name).float() for name in (*NAMES[:5], "bootstrap")}
    options = {
        "policy_target": "return",
        "lam": 0.9,
        "target": "residual",
        "is_level": "prefix",
        "is_cap": 1.0,
        "is_floor": None,
    }
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(sum(run(given, batch.cu_seqlens, "cpp", **options), []))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_lambda_return_and_its_gradients_equal_the_reference(gamma, lam, bootstrapped):
    batch = random_batch(4, (*LENGTHS, 400))
    upstream = torch.randn(len(batch.rewards), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    results = []
    for backend in ("reference", "cpp"):
        live = [x.clone().requires_grad_() for x in (batch.rewards, batch.values, batch.bootstrap)][: 2 + bootstrapped]
        bootstrap = live[2] if bootstrapped else None
        returns = lambda_return(*live[:2], batch.cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap, backend=backend)
        results.append([returns, *torch.autograd.grad((returns * upstream).sum(), live)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

"""The linear forms against the logits forms: linear_token_stats and linear_soft_bellman_loss never hold (N,
V), and must not be told apart from `token_stats(F.linear(...))` by any value, gradient or workspace."""

import pytest
import torch
import torch.nn.functional as F

from dqo_kernels import linear_soft_bellman_loss, linear_token_stats, soft_bellman_loss, token_stats
from dqo_kernels.linear.gemm import gradient_dtype
from tests.combinations import pairwise
from tests.kernels.backends import backends
from tests.kernels.oracle import random_batch

BACKENDS = backends("linear_token_stats")
ROWS, WIDTH, REF_WIDTH, VOCAB = 9, 5, 4, 11
ROW_BYTES = VOCAB * 8
WORKSPACES = [None, 1, ROW_BYTES, 2 * ROW_BYTES + 1, 8 * ROW_BYTES, 9 * ROW_BYTES]
FIELDS = ("logprobs", "lse", "entropy", "kl")
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def make(seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    policy = {"hidden": normal(ROWS, WIDTH), "weight": normal(VOCAB, WIDTH), "bias": normal(VOCAB)}
    ref = {
        "ref_hidden": normal(ROWS, REF_WIDTH),
        "ref_weight": normal(VOCAB, REF_WIDTH),
        "ref_bias": normal(VOCAB),
    }
    return policy, ref, torch.randint(VOCAB, (ROWS,), generator=rng)


def leaves(tensors, frozen=()):
    return {name: x.clone().requires_grad_(name not in frozen) for name, x in tensors.items()}


def weighted(stats):
    """A scalar that gives every field of every row its own upstream gradient."""
    fields = torch.stack([x for x in (getattr(stats, name) for name in FIELDS) if x is not None])
    rng = torch.Generator().manual_seed(9)
    return (fields * torch.randn(fields.shape, generator=rng, dtype=torch.float64)).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "workspace, with_bias, with_ref, options",
    pairwise(WORKSPACES, [True, False], [True, False], [{}, {"softcap": 3.0, "temperature": 0.7}]),
)
def test_statistics_and_gradients_equal_those_of_the_logits(backend, workspace, with_bias, with_ref, options):
    policy, ref, actions = make()
    if not with_bias:
        del policy["bias"], ref["ref_bias"]
    ref = ref if with_ref else {}
    a, b = leaves(policy), leaves(policy)
    ref_logits = F.linear(ref["ref_hidden"], ref["ref_weight"], ref.get("ref_bias")) if with_ref else None
    want = token_stats(F.linear(a["hidden"], a["weight"], a.get("bias")), actions, ref_logits, **options)
    got = linear_token_stats(
        b["hidden"],
        b["weight"],
        actions,
        bias=b.get("bias"),
        workspace_bytes=workspace,
        backend=backend,
        **ref,
        **options,
    )
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y, **CLOSE)
    weighted(want).backward()
    weighted(got).backward()
    for name in policy:
        torch.testing.assert_close(b[name].grad, a[name].grad, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_every_row_has_its_own_temperature_in_every_workspace(backend, workspace):
    policy, ref, actions = make(10)
    temperature = torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64)
    a, b = leaves(policy), leaves(policy)
    ref_logits = F.linear(ref["ref_hidden"], ref["ref_weight"], ref["ref_bias"])
    logits = F.linear(a["hidden"], a["weight"], a["bias"])
    want = token_stats(logits, actions, ref_logits, temperature=temperature)
    got = linear_token_stats(
        **b, actions=actions, temperature=temperature, workspace_bytes=workspace, backend=backend, **ref
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)
    weighted(want).backward()
    weighted(got).backward()
    for name in policy:
        torch.testing.assert_close(b[name].grad, a[name].grad, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reference_in_float64_makes_everything_float64(backend):
    policy, ref, actions = make(11)
    policy = {name: x.float() for name, x in policy.items()}
    stats = linear_token_stats(**policy, actions=actions, backend=backend, **ref)
    want = linear_token_stats(
        **{name: x.double() for name, x in policy.items()}, actions=actions, backend=backend, **ref
    )
    for x, y in zip(stats, want, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [None, ROW_BYTES])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("bias",)])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(backend, workspace, frozen):
    policy, ref, actions = make(1)
    whole, part = leaves(policy), leaves(policy, frozen)
    for tensors in (whole, part):
        weighted(
            linear_token_stats(**tensors, actions=actions, workspace_bytes=workspace, backend=backend, **ref)
        ).backward()
    for name in policy:
        assert part[name].grad is None if name in frozen else torch.equal(part[name].grad, whole[name].grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [None, 2 * ROW_BYTES])
def test_the_reference_models_tensors_are_constants(backend, workspace):
    policy, ref, actions = make(2)
    live, constants = leaves(policy), leaves(ref)
    stats = linear_token_stats(**live, actions=actions, workspace_bytes=workspace, backend=backend, **constants)
    weighted(stats).backward()
    assert all(x.grad is None for x in constants.values())
    assert not stats.ref_logprobs.requires_grad and not stats.ref_lse.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [None, 2 * ROW_BYTES])
def test_autograd_passes_gradcheck(backend, workspace):
    policy, ref, actions = make(3)
    temperature = torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64)

    def run(hidden, weight, bias):
        stats = linear_token_stats(
            hidden, weight, actions, bias=bias, workspace_bytes=workspace, temperature=temperature,
            softcap=4.0,
            backend=backend, **ref,
        )  # fmt: skip
        return torch.stack([getattr(stats, name) for name in FIELDS])

    assert torch.autograd.gradcheck(run, list(leaves(policy).values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [None, 3 * VOCAB * 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_float32(backend, dtype, workspace):
    policy, ref, actions = make(4, dtype)
    exact = {name: x.double() for name, x in {**policy, **ref}.items()}
    live, truth = leaves(policy), leaves({name: exact[name] for name in policy})
    got = linear_token_stats(**live, actions=actions, workspace_bytes=workspace, backend=backend, **ref)
    want = linear_token_stats(**truth, actions=actions, **{name: exact[name] for name in ref})
    # Each logit is a dot product of WIDTH + 1 terms below 10 in float32, and every statistic averages logits.
    rounding = 2 * (WIDTH + 1) * 2**-24 * 10
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=2e-6 + rounding)
    weighted(got).backward()
    weighted(want).backward()
    for name in policy:
        assert live[name].grad.dtype == dtype
        found, exact = live[name].grad.double(), truth[name].grad
        if (
            gradient_dtype(policy["hidden"], policy["weight"], torch.float32) != torch.float32
            and backend != "reference"
        ):
            # The gradient of the logits is rounded to dtype (half an eps), and so is the result.
            assert (found - exact).norm() <= torch.finfo(dtype).eps * exact.norm()
            continue
        # Stored once in dtype, after sums over rows or vocabulary in float32.
        size = exact.abs().max().item()
        torch.testing.assert_close(found, exact, rtol=torch.finfo(dtype).eps / 2, atol=size * 100 * 2**-24)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [None, ROW_BYTES])
def test_autocast_does_not_lower_the_precision(backend, workspace):
    # A training loop calls its loss inside autocast; bf16 logits would cost 1e-2 nats a token (defect 18).
    policy, ref, actions = make(8, torch.float32)
    results = []
    for enabled in (False, True):
        live = leaves(policy)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            stats = linear_token_stats(**live, actions=actions, workspace_bytes=workspace, backend=backend, **ref)
        # Outside, as PyTorch asks: inside, its own matmul gradients would be lowered.
        weighted(stats).backward()
        results.append([*stats, *(x.grad for x in live.values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [None, ROW_BYTES])
def test_a_poisoned_row_reaches_no_other_hidden_state(backend, workspace):
    policy, ref, actions = make(5)
    clean = leaves(policy)
    want = linear_token_stats(**clean, actions=actions, **ref, workspace_bytes=workspace, backend=backend)
    weighted(want).backward()
    policy["hidden"][3, 1] = torch.nan
    dirty = leaves(policy)
    got = linear_token_stats(**dirty, actions=actions, **ref, workspace_bytes=workspace, backend=backend)
    weighted(got).backward()
    others = torch.arange(ROWS) != 3
    assert got.logprobs[3].isnan()
    torch.testing.assert_close(got.logprobs[others], want.logprobs[others], **CLOSE)
    torch.testing.assert_close(dirty["hidden"].grad[others], clean["hidden"].grad[others], **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_empty_statistics_and_zero_gradients(backend):
    hidden, weight = torch.zeros(0, WIDTH, requires_grad=True), torch.ones(VOCAB, WIDTH, requires_grad=True)
    stats = linear_token_stats(hidden, weight, torch.zeros(0, dtype=torch.long), backend=backend)
    assert all(x.shape == (0,) for x in stats[:3])
    stats.logprobs.sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize(
    "workspace, target, soft_values, reduction",
    pairwise(WORKSPACES, ["detach", "residual"], [False, True], ["mean", "sum", "none"]),
)
def test_the_loss_from_hidden_states_equals_the_loss_from_logits(workspace, target, soft_values, reduction):
    policy, ref, _ = make(6)
    batch = random_batch(6, (3, 1, 0, 5), VOCAB)
    options = {
        "behavior_logprobs": batch.behavior_logprobs, "bootstrap": batch.bootstrap,
        "cu_seqlens": batch.cu_seqlens, "beta": 0.3,
        "lam": 0.8, "gamma": 0.9, "target": target, "is_cap": 0.5, "policy_scale": 2.0, "value_coef": 0.5,
        "kl_coef": 0.3, "temperature": 0.8,
        "softcap": 4.0, "reduction": reduction,
    }  # fmt: skip
    ref_logits = F.linear(ref["ref_hidden"], ref["ref_weight"], ref["ref_bias"])
    upstream = torch.linspace(-1, 2, ROWS, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7)
    results = []
    for form in ("logits", "hidden"):
        live = leaves({**policy, "values": batch.values})
        values = None if soft_values else live["values"]
        if form == "logits":
            logits = F.linear(live["hidden"], live["weight"], live["bias"])
            out = soft_bellman_loss(logits, batch.actions, batch.rewards, values, ref_logits=ref_logits, **options)
        else:
            out = linear_soft_bellman_loss(
                live["hidden"], live["weight"], batch.actions, batch.rewards, values, bias=live["bias"],
                workspace_bytes=workspace, **ref, **options,
            )  # fmt: skip
        (out.loss * upstream).sum().backward()
        assert not any(x.requires_grad for x in out[1:])
        results.append([x.detach() for x in out] + [x.grad for x in live.values() if x.grad is not None])
    assert len(results[0]) == len(results[1]) == len(out) + (3 if soft_values else 4)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_the_loss_from_hidden_states_takes_reference_log_probabilities():
    policy, ref, _ = make(7)
    batch = random_batch(7, (4, 5), VOCAB)
    stats = linear_token_stats(policy["hidden"], policy["weight"], batch.actions, **ref)
    args = policy["hidden"], policy["weight"], batch.actions, batch.rewards
    given = linear_soft_bellman_loss(
        *args, cu_seqlens=batch.cu_seqlens, ref_logprobs=stats.ref_logprobs, ref_lse=stats.ref_lse
    )
    computed = linear_soft_bellman_loss(*args, cu_seqlens=batch.cu_seqlens, **ref)
    torch.testing.assert_close(given.loss, computed.loss, **CLOSE)
    assert given.kl is None and computed.kl is not None

"""linear_row_loss: the sum of a plain-torch loss over runs of whole groups, whatever the workspace holds."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from dqo_kernels import linear_row_loss, linear_soft_bellman_loss, soft_bellman, token_stats
from tests.kernels.backends import backends

BACKENDS = backends("linear_row_loss")
LENGTHS, WIDTH, VOCAB = (3, 1, 0, 2, 4, 2), 5, 7
ROWS = sum(LENGTHS)
CU_SEQLENS = torch.tensor([0, *itertools.accumulate(LENGTHS)])
PAIRS = torch.tensor([0, 2, 4, 6])
ROW_BYTES = VOCAB * 8
WORKSPACES = [None, 1, 2 * ROW_BYTES, 4 * ROW_BYTES, 7 * ROW_BYTES, ROWS * ROW_BYTES]
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def make(seed=0):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    live = {
        "hidden": normal(ROWS, WIDTH),
        "weight": normal(VOCAB, WIDTH),
        "bias": normal(VOCAB),
        "values": normal(ROWS),
    }
    ref = {"ref_hidden": normal(ROWS, WIDTH), "ref_weight": normal(VOCAB, WIDTH), "ref_bias": normal(VOCAB)}
    return live, ref, normal(ROWS), torch.randint(VOCAB, (ROWS,), generator=rng)


def sequence_sums(x, cu_seqlens):
    ends = cu_seqlens.tolist()
    return torch.stack([x[lo:hi].sum() for lo, hi in zip(ends[:-1], ends[1:], strict=True)])


def bellman(stats, rows, cu_seqlens):
    terms = soft_bellman(stats.logprobs, stats.ref_logprobs, rows["rewards"], rows["values"], cu_seqlens, lam=0.8)
    loss = terms.policy_loss + terms.value_loss + 0.1 * stats.kl.sum() - 0.2 * stats.entropy.sum()
    return loss, {"weights": terms.weights.sum(), "count": torch.tensor(len(terms.weights))}


def preference(stats, rows, cu_seqlens):
    """Direct preference optimisation: couples the two sequences of a pair."""
    score = sequence_sums(stats.logprobs - stats.ref_logprobs, cu_seqlens)
    margin = score[0::2] - score[1::2]
    return -F.logsigmoid(margin).sum(), {"margin": margin.sum(), "pairs": torch.tensor(len(margin))}


def whitened(stats, rows, cu_seqlens):
    """Couples the whole batch by its mean and its spread."""
    score = sequence_sums(stats.logprobs * rows["values"], cu_seqlens)
    return ((score - score.mean()) / score.std()).pow(3).sum(), {"mean": score.mean()}


LOSSES = {
    "rows of a sequence": (bellman, {}),
    "pairs": (preference, {"cu_groups": PAIRS}),
    "one batch": (whitened, {"coupling": "batch"}),
    "one batch of pairs": (preference, {"coupling": "batch", "cu_groups": PAIRS}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("row_loss, grouping", LOSSES.values(), ids=LOSSES.keys())
def test_loss_metrics_and_gradients_equal_those_of_the_whole_logits(backend, row_loss, grouping, workspace):
    tensors, ref, rewards, actions = make()
    options = {"temperature": 0.8, "softcap": 5.0}
    a, b = ({name: x.clone().requires_grad_() for name, x in tensors.items()} for _ in range(2))
    ref_logits = F.linear(ref["ref_hidden"], ref["ref_weight"], ref["ref_bias"])
    stats = token_stats(F.linear(a["hidden"], a["weight"], a["bias"]), actions, ref_logits, **options)
    want, want_metrics = row_loss(stats, {"rewards": rewards, "values": a["values"]}, CU_SEQLENS)
    got, metrics = linear_row_loss(
        b["hidden"], b["weight"], actions, row_loss, CU_SEQLENS, rows={"rewards": rewards,
        "values": b["values"]},
        bias=b["bias"], workspace_bytes=workspace, backend=backend, **ref, **options, **grouping,
    )  # fmt: skip
    torch.testing.assert_close(got, want, **CLOSE)
    assert metrics.keys() == want_metrics.keys()
    for name, value in metrics.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, want_metrics[name].detach(), check_dtype=False, **CLOSE)
    (3.0 * want).backward()
    (3.0 * got).backward()
    for name in tensors:
        if a[name].grad is None:
            assert b[name].grad is None or not b[name].grad.any()
        else:
            torch.testing.assert_close(b[name].grad, a[name].grad, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("cu_groups", [None, PAIRS, torch.tensor([0, 1, 1, 6])], ids=["alone", "pairs", "lists"])
def test_the_loss_sees_every_row_once_in_whole_groups(backend, workspace, cu_groups):
    tensors, _, _, actions = make(1)
    seen_rows, seen_sequences = [], []

    def spy(stats, rows, cu_seqlens):
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == len(stats.logprobs) == len(rows["index"])
        seen_rows.extend(rows["index"].tolist())
        seen_sequences.append(len(cu_seqlens) - 1)
        return stats.logprobs.sum(), {}

    linear_row_loss(
        tensors["hidden"], tensors["weight"], actions, spy, CU_SEQLENS, rows={"index": torch.arange(ROWS)},
        cu_groups=cu_groups, workspace_bytes=workspace, backend=backend,
    )  # fmt: skip
    assert seen_rows == list(range(ROWS)) and sum(seen_sequences) == len(LENGTHS)
    boundaries = range(len(LENGTHS) + 1) if cu_groups is None else cu_groups.tolist()
    assert set(itertools.accumulate(seen_sequences)) <= set(boundaries)
    if workspace is None:
        assert len(seen_sequences) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_coupled_loss_is_given_everything_at_once(backend):
    tensors, _, _, actions = make(2)
    calls = []

    def spy(stats, rows, cu_seqlens):
        calls.append(len(stats.logprobs))
        return stats.logprobs.sum(), {}

    linear_row_loss(
        tensors["hidden"], tensors["weight"], actions, spy, CU_SEQLENS, rows={}, coupling="batch",
        workspace_bytes=ROW_BYTES, backend=backend,
    )  # fmt: skip
    assert set(calls) == {ROWS}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_closes_over_a_parameter_is_still_a_loss(backend):
    tensors, _, _, actions = make(4)
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(by):
        return linear_row_loss(
            tensors["hidden"], tensors["weight"], actions, lambda stats, rows, cu: (by * stats.lse.sum(), {}),
            CU_SEQLENS, rows={}, backend=backend,
        )[0]  # fmt: skip

    assert torch.equal(loss(factor), loss(2.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sequences", [0, 1, 3])
@pytest.mark.parametrize("coupling", ["group", "batch"])
def test_zero_rows_give_a_loss_of_zero_that_can_be_differentiated(backend, sequences, coupling):
    hidden, weight = torch.zeros(0, WIDTH, requires_grad=True), torch.ones(VOCAB, WIDTH, requires_grad=True)
    loss, _ = linear_row_loss(
        hidden, weight, torch.zeros(0, dtype=torch.long), lambda stats, rows, cu: (stats.logprobs.sum(), {}),
        torch.zeros(sequences + 1, dtype=torch.long), rows={}, coupling=coupling, backend=backend,
    )  # fmt: skip
    assert loss.item() == 0.0
    loss.backward()
    assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_it_carries_the_same_loss_as_linear_soft_bellman_loss(backend, workspace):
    tensors, ref, rewards, actions = make(3)

    def row_loss(stats, rows, cu_seqlens):
        terms = soft_bellman(stats.logprobs, stats.ref_logprobs, rows["rewards"], rows["values"], cu_seqlens)
        return terms.policy_loss + terms.value_loss, {}

    args = tensors["hidden"], tensors["weight"], actions
    loss, _ = linear_row_loss(
        *args, row_loss, CU_SEQLENS, rows={"rewards": rewards, "values": tensors["values"]},
        bias=tensors["bias"],
        workspace_bytes=workspace, backend=backend, **ref,
    )  # fmt: skip
    out = linear_soft_bellman_loss(
        *args, rewards, tensors["values"], bias=tensors["bias"], cu_seqlens=CU_SEQLENS, reduction="sum", **ref
    )
    torch.testing.assert_close(loss, out.loss, **CLOSE)


RETURNED = {
    "a loss alone": (lambda loss: loss, "to return .loss_sum, metric_sums.*got Tensor"),
    "three values": (lambda loss: (loss, {}, {}), "to return .*got 3 values"),
    "no dict": (lambda loss: (loss, None), "got metric_sums of type NoneType"),
    "a number": (lambda loss: (1.0, {}), "got loss_sum of type float"),
    "rows": (lambda loss: (loss[None], {}), r"got loss_sum of shape \(1,\)"),
    "a metric that is a number": (lambda loss: (loss, {"kl": 0.5}), r"got metric_sums\['kl'\] of type float"),
    "a constant": (
        lambda loss: (loss.detach(), {}),
        "a loss_sum that depends on stats or rows, got one without a gradient",
    ),
}


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("returned, message", RETURNED.values(), ids=list(RETURNED))
def test_what_the_function_returned_is_compared_with_what_is_expected(returned, message, backend):
    hidden, weight = torch.ones(4, 3, requires_grad=True), torch.randn(5, 3)
    actions, boundaries = torch.zeros(4, dtype=torch.long), torch.tensor([0, 4])

    def function(stats, rows, cu_seqlens):
        return returned(stats.logprobs.sum())

    with pytest.raises(ValueError, match=f"row_loss: expected .*{message}"):
        linear_row_loss(hidden, weight, actions, function, boundaries, rows={}, backend=backend)


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_loss_of_constant_zeros_trains_nothing(backend):
    hidden, weight = torch.ones(4, 3, requires_grad=True), torch.randn(5, 3)
    actions, boundaries = torch.zeros(4, dtype=torch.long), torch.tensor([0, 4])
    loss, _ = linear_row_loss(
        hidden, weight, actions, lambda *_: (torch.zeros(()), {}), boundaries, rows={}, backend=backend
    )
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_a_loss_without_a_gradient_is_fine_where_none_is_wanted():
    def function(stats, rows, cu_seqlens):
        return stats.logprobs.sum().detach(), {}

    with torch.no_grad():
        hidden, weight = torch.ones(4, 3, requires_grad=True), torch.randn(5, 3)
        actions, boundaries = torch.zeros(4, dtype=torch.long), torch.tensor([0, 4])
        assert linear_row_loss(hidden, weight, actions, function, boundaries, rows={})[0].isfinite()

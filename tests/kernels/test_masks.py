"""T11: masks, padding, packing, causality and accumulation, for the logits form and the linear form alike.

Defects 2 (prompt rows), 3 (off by one), 4 (bootstrapping through EOS), 12 (ratios of padded tokens), 20
(accumulation), 24 (leaks across packed sequences), 26 (pad id equal to EOS id).
"""

import pytest
import torch

from dqo_kernels import linear_soft_bellman_loss, soft_bellman_loss
from tests.kernels.oracle import padded, random_batch

LENGTHS, VOCAB = (3, 1, 0, 5), 6
PER_TOKEN = ("rewards", "values", "behavior_logprobs", "target_values")
OUTPUTS = ("logprobs", "ref_logprobs", "lse", "entropy", "kl", "returns", "advantages", "weights")
OPTIONS = {"beta": 0.3, "gamma": 0.95, "lam": 0.8, "is_cap": 0.7, "kl_coef": 0.2}
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def logits_form(features, actions, rewards, values, *, ref, **options):
    return soft_bellman_loss(features, actions, rewards, values, ref_logits=ref, **options)


def linear_form(features, actions, rewards, values, *, ref, **options):
    """An identity head: the hidden states are the logits."""
    head = torch.eye(features.shape[-1], dtype=features.dtype)
    return linear_soft_bellman_loss(
        features,
        head,
        actions,
        rewards,
        values,
        ref_hidden=ref,
        ref_weight=head,
        workspace_bytes=200,
        **options,
    )


FORMS = pytest.mark.parametrize("form", [logits_form, linear_form], ids=["logits", "linear"])


def right(width):
    return torch.arange(width) < torch.tensor(LENGTHS)[:, None]


MASKS = {
    "right padding": right(5),
    "left padding": right(5).flip(1),
    "one more column": right(6),
    "fifty more columns": right(55),
    "prompt and padding": torch.nn.functional.pad(right(5), (4, 3)),
    "holes": torch.tensor([[1, 0, 1, 0, 0, 1, 0, 0], [0] * 6 + [1, 0], [0] * 8, [1, 1, 0, 0, 1, 0, 1, 1]]).bool(),
}
ANY_MASK = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def packed_run(form, batch, **options):
    features, values = batch.logits.clone().requires_grad_(), batch.values.clone().requires_grad_()
    out = form(
        features, batch.actions, batch.rewards, values, ref=batch.ref_logits, cu_seqlens=batch.cu_seqlens,
        behavior_logprobs=batch.behavior_logprobs, target_values=batch.target_values,
        bootstrap=batch.bootstrap, **{**OPTIONS, **options},
    )  # fmt: skip
    return out, features, values


def padded_run(form, batch, mask, fill, **options):
    features = padded(batch.logits, mask, fill).requires_grad_()
    given = {name: getattr(batch, name) for name in PER_TOKEN}
    rows = {name: None if x is None else padded(x, mask, fill) for name, x in given.items()}
    values = rows["values"].requires_grad_()
    out = form(
        features, padded(batch.actions, mask, -100), rows["rewards"], values, mask=mask,
        ref=padded(batch.ref_logits, mask, fill), behavior_logprobs=rows["behavior_logprobs"],
        target_values=rows["target_values"], bootstrap=batch.bootstrap, **{**OPTIONS, **options},
    )  # fmt: skip
    return out, features, values


@FORMS
@ANY_MASK
@pytest.mark.parametrize("fill", [0.0, 1e6, float("nan"), float("inf")])
def test_padding_prompts_and_holes_change_neither_loss_nor_gradient(form, mask, fill):
    batch = random_batch(1, LENGTHS, VOCAB)
    want, features, values = packed_run(form, batch)
    got, wide_features, wide_values = padded_run(form, batch, mask, fill)
    want.loss.backward()
    got.loss.backward()
    for name in ("loss", "policy_loss", "value_loss", "kl_loss"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), **CLOSE)
    for name in OUTPUTS:
        field = getattr(got, name)
        torch.testing.assert_close(field[mask], getattr(want, name), **CLOSE)
        assert field.shape == mask.shape and not field[~mask].any()
    torch.testing.assert_close(wide_features.grad[mask], features.grad, **CLOSE)
    torch.testing.assert_close(wide_values.grad[mask], values.grad, **CLOSE)
    # Exactly zero where nothing is an action, the row that predicts the first pad included.
    assert not wide_features.grad[~mask].any() and not wide_values.grad[~mask].any()


@FORMS
@ANY_MASK
@pytest.mark.parametrize("target", ["detach", "residual"])
def test_unreduced_losses_are_zero_under_the_mask_and_take_any_upstream(form, mask, target):
    batch = random_batch(2, LENGTHS, VOCAB)
    if target == "residual":
        batch.target_values = None  # it has no place there
    want, packed_features, packed_values = packed_run(form, batch, reduction="none", target=target)
    got, features, values = padded_run(form, batch, mask, torch.nan, reduction="none", target=target)
    assert got.loss.shape == mask.shape and not got.loss[~mask].any()
    torch.testing.assert_close(got.loss[mask], want.loss, **CLOSE)
    upstream = torch.randn(len(batch.actions), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.autograd.grad(want.loss, (packed_features, packed_values), upstream)
    gradients = torch.autograd.grad(got.loss, (features, values), padded(upstream, mask, torch.nan))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a[mask], b, **CLOSE)
        assert not a[~mask].any()


@FORMS
def test_soft_values_see_through_the_mask_too(form):
    batch, mask = random_batch(3, LENGTHS, VOCAB), MASKS["holes"]
    want = form(
        batch.logits,
        batch.actions,
        batch.rewards,
        None,
        ref=batch.ref_logits,
        cu_seqlens=batch.cu_seqlens,
        lam=0.5,
    )
    got = form(
        padded(batch.logits, mask, torch.nan), padded(batch.actions, mask, -1),
        padded(batch.rewards, mask, torch.nan), None, ref=padded(batch.ref_logits, mask, torch.nan),
        mask=mask, lam=0.5,
    )  # fmt: skip
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)
    torch.testing.assert_close(got.returns[mask], want.returns, **CLOSE)


@FORMS
def test_a_temperature_for_each_row_is_read_under_the_mask(form):
    batch, mask = random_batch(4, LENGTHS, VOCAB), MASKS["holes"]
    temperature = torch.linspace(0.5, 2.0, 9, dtype=torch.float64)
    want, _, _ = packed_run(form, batch, temperature=temperature)
    got, _, _ = padded_run(form, batch, mask, torch.nan, temperature=padded(temperature, mask, torch.nan))
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)


@FORMS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_any_action_has_loss_zero_and_gradient_zero(form, reduction):
    batch, mask = random_batch(5, (0, 0), VOCAB), torch.zeros(2, 3, dtype=torch.bool)
    for out, features, values in (
        packed_run(form, batch, reduction=reduction),
        padded_run(form, batch, mask, torch.nan, reduction=reduction),
    ):
        loss = out.loss.sum()
        assert loss.item() == 0.0
        loss.backward()
        assert not features.grad.any() and not values.grad.any()


@FORMS
def test_packed_sequences_equal_the_same_sequences_alone(form):
    batch = random_batch(6, LENGTHS, VOCAB)
    want, features, values = packed_run(form, batch, reduction="sum")
    want.loss.backward()
    total = 0.0
    for b, row in enumerate(batch.slices):
        alone = [getattr(batch, name)[row] for name in ("logits", "ref_logits", "actions", *PER_TOKEN)]
        z, v = alone[0].clone().requires_grad_(), alone[4].clone().requires_grad_()
        out = form(
            z, alone[2], alone[3], v, ref=alone[1], behavior_logprobs=alone[5], target_values=alone[6],
            bootstrap=batch.bootstrap[b : b + 1], cu_seqlens=torch.tensor([0, len(v)]), reduction="sum",
            **OPTIONS,
        )  # fmt: skip
        out.loss.backward()
        total += out.loss.item()
        torch.testing.assert_close(z.grad, features.grad[row], **CLOSE)
        torch.testing.assert_close(v.grad, values.grad[row], **CLOSE)
        for name in OUTPUTS:
            torch.testing.assert_close(getattr(out, name), getattr(want, name)[row], **CLOSE)
    assert want.loss.item() == pytest.approx(total, rel=1e-12)


@FORMS
@pytest.mark.parametrize("is_level", ["trajectory", "suffix", "prefix", "token", "none"])
def test_what_happens_in_one_sequence_leaves_every_bit_of_the_others(form, is_level):
    batch = random_batch(7, (3, 4, 2), VOCAB)
    before, features, _ = packed_run(form, batch, is_level=is_level, reduction="none")
    before.loss.sum().backward()
    middle = batch.slices[1]
    other = random_batch(70, (3, 4, 2), VOCAB)
    for name in ("logits", "ref_logits", *PER_TOKEN):
        getattr(batch, name)[middle] = getattr(other, name)[middle]
    batch.bootstrap[1] += 5.0
    after, moved, _ = packed_run(form, batch, is_level=is_level, reduction="none")
    after.loss.sum().backward()
    others = torch.tensor([True] * 3 + [False] * 4 + [True] * 2)
    for name in ("loss", *OUTPUTS):
        assert torch.equal(getattr(after, name)[others], getattr(before, name)[others]), name
    torch.testing.assert_close(moved.grad[others], features.grad[others], rtol=0, atol=1e-15)
    assert not torch.allclose(after.returns[middle], before.returns[middle])


@FORMS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_nan_logit_poisons_the_loss_and_no_other_sequence(form, reduction):
    batch = random_batch(11, (3, 4, 2), VOCAB)
    clean, *leaves = packed_run(form, batch, reduction=reduction)
    want = torch.autograd.grad(clean.loss.sum(), leaves)
    batch.logits[4, 1] = torch.nan
    dirty, *leaves = packed_run(form, batch, reduction=reduction)
    assert dirty.loss.sum().isnan() and dirty.logprobs[4].isnan()
    others = torch.tensor([True] * 3 + [False] * 4 + [True] * 2)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(dirty, name)[others], getattr(clean, name)[others], **CLOSE)
    for a, b in zip(torch.autograd.grad(dirty.loss.sum(), leaves), want, strict=True):
        torch.testing.assert_close(a[others], b[others], **CLOSE)


@FORMS
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_micro_batches_equal_one_large_batch(form, parts):
    lengths = (3, 1, 6, 2)
    batch = random_batch(8, lengths, VOCAB)
    want, features, _ = packed_run(form, batch)
    want.loss.backward()
    total, gradient = 0.0, torch.zeros_like(batch.logits)
    size = len(lengths) // parts
    for first in range(0, len(lengths), size):
        lo, hi = batch.cu_seqlens[first].item(), batch.cu_seqlens[first + size].item()
        z = batch.logits[lo:hi].clone().requires_grad_()
        out = form(
            z, batch.actions[lo:hi], batch.rewards[lo:hi], batch.values[lo:hi], ref=batch.ref_logits[lo:hi],
            behavior_logprobs=batch.behavior_logprobs[lo:hi], target_values=batch.target_values[lo:hi],
            bootstrap=batch.bootstrap[first : first + size], reduction="sum",
            cu_seqlens=batch.cu_seqlens[first : first + size + 1] - lo, **OPTIONS,
        )  # fmt: skip
        (out.loss / sum(lengths)).backward()  # once, by the global count of rows
        total += out.loss.item() / sum(lengths)
        gradient[lo:hi] = z.grad
    assert want.loss.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(gradient, features.grad, **CLOSE)


@FORMS
def test_the_future_reaches_returns_and_the_past_does_not(form):
    # Causality (defect 13): row t is the state before action t. Nothing at t may move a return, an advantage
    # or a suffix weight of a later row, nor a statistic of any other row.
    batch, t = random_batch(9, (6,), VOCAB), 2
    for is_level, still in (("suffix", slice(3, 6)), ("prefix", slice(0, 3)), ("none", slice(0, 6))):
        before, _, _ = packed_run(form, batch, is_level=is_level, is_cap=None)
        changed = random_batch(9, (6,), VOCAB)
        changed.logits[t] = 0.5 * changed.logits[t] + 1.0
        changed.rewards[t] += 1.0
        after, _, _ = packed_run(form, changed, is_level=is_level, is_cap=None)
        for name in ("returns", "advantages"):
            assert torch.equal(getattr(after, name)[3:], getattr(before, name)[3:])
        assert not torch.isclose(after.returns[:3], before.returns[:3]).any()
        assert torch.equal(after.weights[still], before.weights[still])
        for name in ("logprobs", "lse", "entropy", "kl"):
            moved = getattr(after, name) != getattr(before, name)
            assert moved.nonzero().flatten().tolist() == [t]


@FORMS
def test_the_end_token_keeps_its_gradient_when_it_is_also_the_pad_token(form):
    # Masks come from lengths; ids that equal the pad id count where the mask says so.
    batch, pad = random_batch(10, (3, 2), VOCAB), 0
    batch.actions[[2, 4]] = pad
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    features = padded(batch.logits, mask).requires_grad_()
    out = form(
        features, padded(batch.actions, mask, pad), padded(batch.rewards, mask), padded(batch.values, mask),
        ref=padded(batch.ref_logits, mask), mask=mask,
    )  # fmt: skip
    out.loss.backward()
    assert features.grad[0, 2].abs().max() > 1e-4 and features.grad[1, 1].abs().max() > 1e-4
    assert not features.grad[~mask].any()

"""T4: the limits in which DQO is another known method, in value and in gradient."""

import pytest
import torch

from dqo_kernels import soft_bellman, soft_bellman_loss
from tests.kernels.oracle import random_batch, taken

BETA = 0.3
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def run(batch, logits, values=None, **options):
    return soft_bellman_loss(
        logits, batch.actions, batch.rewards, values,
        **{"ref_logits": batch.ref_logits, "cu_seqlens": batch.cu_seqlens, "beta": BETA,
           "is_level": "none", **options},
    )  # fmt: skip


def live(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def to_go(x):
    return x.flip(0).cumsum(0).flip(0)


def test_lambda_one_returns_are_the_reverse_cumulative_sum_of_regularized_rewards():
    batch = random_batch(0, (3, 1, 0, 5))
    out = run(batch, batch.logits, batch.values)
    k = batch.rewards - BETA * (batch.logprobs - batch.ref_logprobs)
    for row in batch.slices:
        torch.testing.assert_close(out.returns[row], to_go(k[row]), **CLOSE)


def test_lambda_one_residuals_hold_the_whole_rest_of_the_response():
    # Defect 7: V_t + beta delta_t - R_t + beta sum_{i>t} delta_i and not the one-step residual.
    batch = random_batch(1, (5,))
    out = run(batch, batch.logits, batch.values, reduction="none")
    delta = batch.logprobs - batch.ref_logprobs
    error = batch.values + BETA * to_go(delta) - to_go(batch.rewards)
    torch.testing.assert_close(out.policy_loss, 0.5 * error.square(), **CLOSE)
    torch.testing.assert_close(out.value_loss, 0.5 * error.square(), **CLOSE)
    one_step = run(batch, batch.logits, batch.values, policy_target="one_step", reduction="none")
    assert (one_step.policy_loss - out.policy_loss).abs().max() > 0.01


def test_lambda_zero_is_temporal_difference_learning():
    batch, gamma = random_batch(2, (4,)), 0.9
    values = batch.values.clone().requires_grad_()
    out = run(batch, batch.logits, values, lam=0.0, gamma=gamma, policy_scale=0.0, reduction="sum")
    k = batch.rewards - BETA * (batch.logprobs - batch.ref_logprobs)
    following = torch.cat([batch.values[1:], torch.zeros(1, dtype=torch.float64)])
    td_error = k + gamma * following - batch.values
    torch.testing.assert_close(out.loss.detach(), 0.5 * td_error.square().sum(), **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(out.loss, values)[0], -td_error, **CLOSE)


def test_the_three_policy_targets_are_two_one_and_td_steps_at_lambda_zero_and_one_at_lambda_one():
    batch = random_batch(3, (4,))
    k = batch.rewards - BETA * (batch.logprobs - batch.ref_logprobs)
    zero = torch.zeros(1, dtype=torch.float64)
    v1, k1 = torch.cat([batch.values[1:], zero]), torch.cat([k[1:], zero])
    v2 = torch.cat([v1[1:], zero])
    expected = {
        "one_step": batch.rewards + v1 - batch.values,
        "td": batch.rewards + v1 - batch.values,
        "return": batch.rewards + k1 + v2 - batch.values,
    }
    for policy_target, advantages in expected.items():
        out = run(batch, batch.logits, batch.values, lam=0.0, policy_target=policy_target)
        torch.testing.assert_close(out.advantages, advantages, **CLOSE)
    ahead = [run(batch, batch.logits, batch.values, policy_target=p).advantages for p in ("return", "td")]
    torch.testing.assert_close(*ahead, **CLOSE)


@pytest.mark.parametrize("policy_scale", [1.0, 1 / BETA])
def test_responses_of_one_action_are_dro_v(policy_scale):
    # arXiv 2405.19107: 1/2 (r - V - tau S)^2; grad_V = V - r + tau S; grad_theta = -tau [(r-V) grad log pi -
    # tau/2 grad S^2], the policy's multiplied by 1/tau in practice.
    batch = random_batch(4, (1,) * 6)
    logits, values = live(batch.logits, batch.values)
    out = run(batch, logits, values, policy_scale=policy_scale, reduction="sum")
    ratio = batch.logprobs - batch.ref_logprobs
    loss = 0.5 * (batch.rewards - batch.values - BETA * ratio).square().sum()
    torch.testing.assert_close(out.policy_loss, loss, **CLOSE)
    torch.testing.assert_close(out.value_loss, loss, **CLOSE)
    grad_logits, grad_values = torch.autograd.grad(out.loss, (logits, values))
    torch.testing.assert_close(grad_values, batch.values - batch.rewards + BETA * ratio, **CLOSE)
    (theta,) = live(batch.logits)
    logp = taken(theta, batch.actions)
    surrogate = (batch.rewards - batch.values) * logp - BETA / 2 * (logp - batch.ref_logprobs).square()
    (expected,) = torch.autograd.grad(-policy_scale * BETA * surrogate.sum(), theta)
    torch.testing.assert_close(grad_logits, expected, **CLOSE)


def test_lambda_one_without_weights_and_with_the_divergence_is_oreo():
    # arXiv 2412.16145 eqs 8-9: means of squares without 1/2, plus alpha KL: twice ours at kl_coef = alpha/2.
    batch, alpha = random_batch(5, (6,)), 0.2
    logits, values = live(batch.logits, batch.values)
    out = run(batch, logits, values, kl_coef=alpha / 2)
    got = torch.autograd.grad(2 * out.loss, (logits, values))

    theta, phi = live(batch.logits, batch.values)
    logp, ref_logp = theta.log_softmax(-1), batch.ref_logits.log_softmax(-1)
    delta = taken(theta, batch.actions) - batch.ref_logprobs
    rest = to_go(batch.rewards)
    later = (to_go(delta) - delta).detach()
    value_loss = (phi - rest + BETA * to_go(delta).detach()).square().mean()
    policy_loss = (phi.detach() - rest + BETA * delta + BETA * later).square().mean()
    divergence = (logp.exp() * (logp - ref_logp)).sum(-1).mean()
    oreo = value_loss + policy_loss + alpha * divergence
    torch.testing.assert_close(2 * out.loss, oreo, **CLOSE)
    for a, b in zip(got, torch.autograd.grad(oreo, (theta, phi)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_the_first_residual_of_soft_values_is_tbrm():
    # arXiv 2505.15311 eq 4: (V(s_1) + beta sum delta - R)^2 V from the logits, gradient at both ends.
    batch = random_batch(6, (3, 4))
    first = batch.cu_seqlens[:-1]
    (logits,) = live(batch.logits)
    rows = run(batch, logits, target="residual", reduction="none").loss
    (got,) = torch.autograd.grad(2 * rows[first].sum(), logits)

    (theta,) = live(batch.logits)
    delta = taken(theta, batch.actions) - batch.ref_logprobs
    soft = BETA * (theta.logsumexp(-1) - batch.ref_logits.logsumexp(-1))
    squares = [(soft[s.start] + BETA * delta[s].sum() - batch.rewards[s].sum()).square() for s in batch.slices]
    torch.testing.assert_close(2 * rows[first], torch.stack(squares), **CLOSE)
    torch.testing.assert_close(got, torch.autograd.grad(sum(squares), theta)[0], **CLOSE)


def test_all_residuals_at_lambda_one_are_path_consistency_learning():
    # Without stop-gradients delta_i receives beta times the sum of residuals up to its own, V_t its own.
    batch = random_batch(7, (5,))
    logprobs, values = live(batch.logprobs, batch.values)
    terms = soft_bellman(
        logprobs, batch.ref_logprobs, batch.rewards, values, batch.cu_seqlens, beta=BETA, target="residual",
        is_level="none",
    )  # fmt: skip
    error = batch.values + BETA * to_go(batch.logprobs - batch.ref_logprobs) - to_go(batch.rewards)
    torch.testing.assert_close(terms.policy_loss.detach(), 0.5 * error.square().sum(), **CLOSE)
    grad_logprobs, grad_values = torch.autograd.grad(terms.policy_loss, (logprobs, values))
    torch.testing.assert_close(grad_logprobs, BETA * error.cumsum(0), **CLOSE)
    torch.testing.assert_close(grad_values, error, **CLOSE)


def test_the_difference_of_two_one_action_residuals_is_rebel():
    # arXiv 2404.16767: (S - S' - eta (r - r'))^2 with eta = 1/beta; the value of the shared prompt cancels.
    batch = random_batch(8, (1, 1))
    values = batch.values[:1].expand(2)
    (logits,) = live(batch.logits)
    out = run(batch, logits, values, value_coef=0.0, reduction="none")
    error = BETA * (out.logprobs - out.ref_logprobs) - out.advantages
    # Each row's loss is e^2/2, so its gradient over e is the gradient of e.
    grads = [torch.autograd.grad(out.loss[i], logits, retain_graph=True)[0] / error[i] for i in (0, 1)]
    got = 2 / BETA**2 * (error[0] - error[1]) * (grads[0] - grads[1])

    (theta,) = live(batch.logits)
    score = taken(theta, batch.actions) - batch.ref_logprobs
    rebel = (score[0] - score[1] - (batch.rewards[0] - batch.rewards[1]) / BETA).square()
    torch.testing.assert_close(((error[0] - error[1]) / BETA).square(), rebel.detach(), **CLOSE)
    torch.testing.assert_close(got, torch.autograd.grad(rebel, theta)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("outcome", [1.0, -2.0])
def test_before_training_both_losses_are_half_the_squared_outcome(outcome):
    # pi = ref and V = 0: delta = 0, w = 1, G_t = the remaining reward. Defect 19: beta does not matter.
    batch = random_batch(9, (3, 5))
    rewards = torch.zeros(8, dtype=torch.float64)
    rewards[[2, 7]] = outcome
    for beta in (0.01, 1.0):
        out = soft_bellman_loss(
            batch.logits, batch.actions, rewards, torch.zeros(8, dtype=torch.float64), beta=beta,
            ref_logits=batch.logits.clone(), cu_seqlens=batch.cu_seqlens,
        )  # fmt: skip
        assert out.policy_loss == out.value_loss == 0.5 * outcome**2
        assert torch.equal(out.weights, torch.ones(8, dtype=torch.float64)) and not out.kl.any()
        assert torch.equal(out.returns, torch.full((8,), outcome, dtype=torch.float64))

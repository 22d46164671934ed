"""What other implementations got wrong, and the test that would catch each here.

 1 outcome spread over the tokens        below: the outcome is paid once
 2 prompt not masked                     test_masks: padding, prompts and holes
 3 mask or reward off by one             test_masks; below: the outcome on the last token reaches the first
 4 bootstrapping through EOS             test_masks; below: values after the end
 5 reference missing in the residual     below: nothing to learn
 6 log-ratio used as the reward          below: the loss reads the rewards
 7 one-step policy target                test_limits: lambda one residuals
 8 tail weight of the mixture missing    test_lambda_return: explicit mixture
 9 gradient through targets or weights   test_soft_bellman(_loss): loops; below: each loss trains its own
10 value loss trains the policy          below: each loss trains its own
11 overflow of the weights               test_soft_bellman: huge log ratios; below: no floor unless asked
12 ratio over the wrong tokens           test_masks; below: weights are products over the response
13 values that see the response          test_masks: the future reaches returns
14 options that change nothing           below: every option
15 variants that crash                   test_soft_bellman(_loss): the whole table of options
17 double temperature                    test_token_stats; below: soft values at a temperature
18 bf16 logsumexp                        test_token_stats, test_soft_bellman_loss: low precision
19 ratio not 1 before training           test_limits: before training
20 means of micro-batch means            test_masks: accumulated micro-batches
21 KL estimator as a loss               test_soft_bellman_loss: the divergence is trained exactly
22 stale values                          test_soft_bellman_loss: two identical calls
23 potential at the end                  test_tabular_optimum: a potential at the end
24 leaks across packed sequences         test_masks: packed sequences, every bit of the others
25 cut responses taken for ended ones    test_tabular_optimum; below: a cut response
26 pad id equal to EOS id                test_masks: the end token keeps its gradient
27 soft values without the reference     below: nothing to learn
28 optimum never verified                test_tabular_optimum: T1, T2
(16 is about tokenising data; it has no place in these functions.)
"""

import inspect

import pytest
import torch

from dqo_kernels import lambda_return, soft_bellman, soft_bellman_loss
from tests.kernels.oracle import random_batch

DOUBLE = torch.float64
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def run(batch, **options):
    arguments = {
        "logits": batch.logits, "actions": batch.actions, "rewards": batch.rewards, "values": batch.values,
        "ref_logits": batch.ref_logits, "cu_seqlens": batch.cu_seqlens,
    }  # fmt: skip
    return soft_bellman_loss(**{**arguments, **options})


@pytest.mark.parametrize("length", [1, 2, 50])
def test_the_outcome_is_paid_once_at_the_last_token_whatever_the_length(length):
    # Defects 1 and 3: G_t = R on every row at lambda = 1 and pi = ref; spread out it would shrink as (T-t)/T.
    rewards = torch.zeros(length, dtype=DOUBLE)
    rewards[-1] = 1.0
    zeros, cu_seqlens = torch.zeros(length, dtype=DOUBLE), torch.tensor([0, length])
    assert torch.equal(lambda_return(rewards, zeros, cu_seqlens), torch.ones(length, dtype=DOUBLE))
    terms = soft_bellman(zeros, zeros, rewards, zeros, cu_seqlens)
    assert torch.equal(terms.returns, torch.ones(length, dtype=DOUBLE))


def test_the_last_rows_target_is_its_reward_less_its_own_divergence():
    batch = random_batch(1, (4,))
    out = run(batch, lam=0.5, beta=0.3)
    last = batch.rewards[-1] - 0.3 * (batch.logprobs - batch.ref_logprobs)[-1]
    torch.testing.assert_close(out.returns[-1], last, **CLOSE)


@pytest.mark.parametrize("columns", [1, 7, 50])
def test_values_and_rewards_after_the_end_are_never_read(columns):
    # Defect 4, for ended responses: V of a pad is not the value of a state.
    batch = random_batch(2, (3,))
    mask = (torch.arange(3 + columns) < 3)[None]

    def pad(x, fill):
        return torch.cat([x, torch.full((columns, *x.shape[1:]), fill, dtype=x.dtype)])[None]

    wide = soft_bellman_loss(
        pad(batch.logits, 1e6), pad(batch.actions, 0), pad(batch.rewards, 1e6), pad(batch.values, 1e6),
        ref_logits=pad(batch.ref_logits, -1e6), mask=mask, lam=0.5,
    )  # fmt: skip
    assert torch.equal(wide.loss, run(batch, lam=0.5).loss)


@pytest.mark.parametrize("target", ["detach", "residual"])
@pytest.mark.parametrize("policy_target", ["return", "td", "one_step"])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("soft_values", [False, True])
def test_without_rewards_a_policy_equal_to_its_reference_has_nothing_to_learn(soft_values, lam, policy_target, target):
    # Defects 5, 6 and 27: no reference in the residual, or values of raw logits (30 nats up here): a loss.
    batch = random_batch(3)
    logits = (batch.logits + 30.0).requires_grad_()
    values = None if soft_values else torch.zeros(9, dtype=DOUBLE, requires_grad=True)
    out = run(
        batch, logits=logits, ref_logits=logits.detach().clone(),
        rewards=torch.zeros(9, dtype=DOUBLE), values=values, lam=lam, policy_target=policy_target,
        target=target, kl_coef=0.5,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss == 0.0 and not out.returns.any() and not out.advantages.any()
    # The gradient of the KL at its minimum: p (log p - log ref - KL) = p * 0.
    assert not logits.grad.any() and (values is None or values.grad is None or not values.grad.any())


@pytest.mark.parametrize("target", ["detach", "residual"])
def test_the_loss_reads_the_rewards_of_the_data(target):
    batch = random_batch(4)
    before = run(batch, target=target, reduction="none")
    for row in range(9):
        rewards = batch.rewards.clone()
        rewards[row] += 1.0
        assert run(batch, rewards=rewards, target=target, reduction="none").loss[row] != before.loss[row]


def test_each_loss_trains_its_own_parameters_and_nothing_behind_a_stop():
    # Defects 9 and 10: the policy loss has no gradient in the values, nor the value loss in the policy.
    batch = random_batch(5)
    logits, values = batch.logits.clone().requires_grad_(), batch.values.clone().requires_grad_()
    only_policy = run(batch, logits=logits, values=values, value_coef=0.0).loss
    only_value = run(batch, logits=logits, values=values, policy_scale=0.0).loss
    (policy_to_values,) = torch.autograd.grad(only_policy, values, retain_graph=True, allow_unused=True)
    (value_to_policy,) = torch.autograd.grad(only_value, logits, retain_graph=True, allow_unused=True)
    assert policy_to_values is None or not policy_to_values.any()
    assert value_to_policy is None or not value_to_policy.any()
    terms = soft_bellman(batch.logprobs.requires_grad_(), batch.ref_logprobs, batch.rewards, values, batch.cu_seqlens)
    grads = torch.autograd.grad(terms.policy_loss, values, allow_unused=True)
    assert grads[0] is None or not grads[0].any()


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_constant_factor_on_the_weights_scales_loss_and_gradient_and_nothing_else(factor):
    # A behaviour off by log(factor) on one token of each response multiplies its weights by factor.
    batch = random_batch(6, (3, 1, 4))
    shift = torch.zeros(8, dtype=DOUBLE)
    shift[batch.cu_seqlens[:-1]] = torch.tensor(factor, dtype=DOUBLE).log()
    results = []
    for behavior in (batch.behavior_logprobs, batch.behavior_logprobs - shift):
        logits, values = batch.logits.clone().requires_grad_(), batch.values.clone().requires_grad_()
        out = run(batch, logits=logits, values=values, behavior_logprobs=behavior, is_cap=None, reduction="sum")
        out.loss.backward()
        results.append((out, logits.grad, values.grad))
    (a, *grads), (b, *scaled) = results
    for x, y in zip((a.loss, a.weights, *grads), (b.loss, b.weights, *scaled), strict=True):
        torch.testing.assert_close(factor * x, y, **CLOSE)
    assert torch.equal(a.returns, b.returns) and torch.equal(a.advantages, b.advantages)


def test_weights_have_no_floor_unless_one_is_asked_for():
    batch = random_batch(7, (8,))
    behavior = batch.logprobs + 5.0  # each token e^5 less likely now
    assert run(batch, behavior_logprobs=behavior).weights[0].item() == pytest.approx(torch.tensor(-40.0).exp().item())
    torch.testing.assert_close(
        run(batch, behavior_logprobs=behavior, is_floor=-1.0).weights,
        torch.full((8,), -1.0, dtype=DOUBLE).exp(),
    )


def test_weights_are_products_of_ratios_over_the_response_and_one_for_the_behaviour_itself():
    batch = random_batch(8)
    ratios = (batch.logprobs - batch.behavior_logprobs).exp()
    levels = {
        "trajectory": lambda x: x.prod().expand(len(x)),
        "suffix": lambda x: x.flip(0).cumprod(0).flip(0),
        "prefix": lambda x: torch.cat([torch.ones(1, dtype=DOUBLE), x.cumprod(0)])[: len(x)],
        "token": lambda x: x,
        "none": torch.ones_like,
    }
    for level, product in levels.items():
        options = {"is_level": level, "is_cap": None}
        got = run(batch, behavior_logprobs=batch.behavior_logprobs, **options).weights
        torch.testing.assert_close(got, torch.cat([product(ratios[row]) for row in batch.slices]), **CLOSE)
        capped = run(batch, behavior_logprobs=batch.behavior_logprobs, is_level=level).weights
        torch.testing.assert_close(capped, got.clamp(max=torch.e), **CLOSE)
        own = run(batch, behavior_logprobs=batch.logprobs, **options).weights
        torch.testing.assert_close(own, torch.ones(9, dtype=DOUBLE), **CLOSE)
        default = run(batch, **options).weights
        torch.testing.assert_close(
            default, run(batch, behavior_logprobs=batch.ref_logprobs, **options).weights, **CLOSE
        )


def test_every_option_changes_some_output():
    # Defect 14. `backend` chooses who computes, and must change nothing.
    batch = random_batch(9)
    base = {
        "ref_logits": batch.ref_logits, "cu_seqlens": batch.cu_seqlens,
        "behavior_logprobs": batch.behavior_logprobs,
        "lam": 0.5, "is_level": "token", "is_cap": 0.5,
    }  # fmt: skip
    changes = {
        "beta": 0.7, "gamma": 0.5, "lam": 0.9, "policy_target": "td", "target": "residual",
        "is_level": "suffix", "is_cap": -0.5, "is_floor": 0.4,
        "policy_scale": 2.0, "value_coef": 2.0, "kl_coef": 0.5, "temperature": 2.0, "softcap": 1.0,
        "reduction": "sum",
        "bootstrap": batch.bootstrap, "target_values": batch.target_values,
        "behavior_logprobs": batch.ref_logprobs,
        "ref_logits": batch.ref_logits.flip(1), "cu_seqlens": torch.tensor([0, 4, 9]),
    }  # fmt: skip
    other_tests = {"logits", "actions", "rewards", "values", "ref_logprobs", "ref_lse", "mask", "backend", "group"}
    assert set(inspect.signature(soft_bellman_loss).parameters) == set(changes) | other_tests

    def outcome(**options):
        logits = batch.logits.clone().requires_grad_()
        out = run(batch, logits=logits, **options)
        return out.loss.detach(), torch.autograd.grad(out.loss, logits)[0]

    loss, gradient = outcome(**base)
    for name, value in changes.items():
        other, moved = outcome(**{**base, name: value})
        assert other != loss or not torch.equal(moved, gradient), name


def test_soft_values_at_a_temperature_are_those_of_the_tempered_softmax():
    # Defect 17: with Q = beta*z/T, exp((Q - V)/beta) is softmax(z/T) to rounding; beta and T enter once each.
    batch, beta, temperature = random_batch(10, (1,) * 9), 0.3, 1.7
    q = beta * batch.logits / temperature
    v = beta * torch.logsumexp(q / beta, 1)
    torch.testing.assert_close(((q - v[:, None]) / beta).exp(), (batch.logits / temperature).softmax(1), **CLOSE)
    out = run(batch, values=None, beta=beta, temperature=temperature, reduction="none")
    anchored = v - beta * torch.logsumexp(batch.ref_logits / temperature, 1)
    torch.testing.assert_close(out.advantages, batch.rewards - anchored, **CLOSE)
    torch.testing.assert_close(out.lse, v / beta, **CLOSE)
    # The sampler's log-probabilities at the same temperature give weights of one.
    sampler = (batch.logits / temperature).log_softmax(1).gather(1, batch.actions[:, None])[:, 0]
    weights = run(batch, temperature=temperature, behavior_logprobs=sampler).weights
    torch.testing.assert_close(weights, torch.ones(9, dtype=DOUBLE), **CLOSE)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_a_cut_response_differs_from_an_ended_one_by_its_bootstrap_alone(lam):
    # Defect 25: b = V(s_{T+1}) gives G_T = k_T + gamma V(s_{T+1}); the other sequences do not move.
    batch, beta, gamma = random_batch(11, (3, 2, 4)), 0.3, 0.9
    options = {"beta": beta, "gamma": gamma, "lam": lam}
    bootstrap = torch.tensor([0.0, 2.0, 0.0], dtype=DOUBLE)
    ended, cut = run(batch, **options), run(batch, bootstrap=bootstrap, **options)
    k = batch.rewards - beta * (batch.logprobs - batch.ref_logprobs)
    torch.testing.assert_close(cut.returns[4], k[4] + gamma * 2.0, **CLOSE)
    torch.testing.assert_close(cut.advantages[4], ended.advantages[4] + gamma * 2.0, **CLOSE)
    torch.testing.assert_close(cut.returns[3], ended.returns[3] + gamma * lam * gamma * 2.0, **CLOSE)
    others = torch.tensor([0, 1, 2, 5, 6, 7, 8])
    assert torch.equal(cut.returns[others], ended.returns[others])
    assert torch.equal(cut.weights, ended.weights)

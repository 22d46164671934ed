"""The exact optimum of a small tree against DQO's losses: T1, T2 (defect 28), T5, T6, T7 (defect 23), T10."""

import functools
import itertools

import pytest
import torch

from dqo_kernels import soft_bellman, soft_bellman_loss
from tests.combinations import pairwise
from tests.tabular import TERMINAL, fit, random_tree

POLICY_TARGETS = ("return", "td", "one_step")
LAMBDAS = (0.0, 0.3, 0.95, 1.0)
IS_LEVELS = ("trajectory", "suffix", "prefix", "token", "none")
FLOAT = torch.float64


@functools.cache
def solved(seed=0):
    tree = random_tree(seed)
    return tree, tree.optimum()


def loss_of(tree, logits, values=None, **options):
    """soft_bellman_loss on the rows of all trajectories, from tables."""
    rows = tree.states
    return soft_bellman_loss(
        logits[rows], tree.actions, tree.rewards, None if values is None else values[rows],
        **{"ref_logits": tree.ref_logits[rows], "cu_seqlens": tree.cu_seqlens, "beta": tree.beta, **options},
    )  # fmt: skip


def test_the_tree_is_one_and_its_optimum_is_optimal():
    tree, optimum = solved()
    assert len(set(tree.seqlens.tolist())) > 1  # or no test below would see an early end
    torch.testing.assert_close(tree.trajectory_probs(tree.behavior_logits).sum(), torch.ones((), dtype=FLOAT))
    torch.testing.assert_close(tree.policy_values(optimum.log_policy), optimum.v, rtol=0, atol=1e-14)
    # V*(s_1) = beta log E_ref exp(R / beta)
    returns = torch.zeros(len(tree.seqlens), dtype=FLOAT).index_add(0, tree.sequences, tree.rewards)
    free = tree.beta * torch.log((tree.trajectory_probs(tree.ref_logits) * (returns / tree.beta).exp()).sum())
    torch.testing.assert_close(free, optimum.v[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("soft_values", [False, True], ids=["value_table", "soft_values"])
@pytest.mark.parametrize("policy_target", POLICY_TARGETS)
@pytest.mark.parametrize("lam", LAMBDAS)
def test_training_arrives_at_the_optimal_policy_and_values(policy_target, lam, soft_values):
    tree, optimum = solved()

    def row_loss(logits, values):
        return soft_bellman_loss(
            logits, tree.actions, tree.rewards, values, ref_logits=tree.ref_logits[tree.states],
            cu_seqlens=tree.cu_seqlens, beta=tree.beta, lam=lam, policy_target=policy_target, is_level="none",
            reduction="none",
        ).loss  # fmt: skip

    log_policy, values = fit(tree, row_loss, soft_values=soft_values)
    assert (log_policy - optimum.log_policy).abs().max() < 1e-10
    assert (values - optimum.v).abs().max() < 1e-10


def turns_of(tree, gamma):
    """(S,) whether a state is the model's, and its discount: two actions are a turn, then the environment moves, then the
    model."""
    depth = torch.zeros(len(tree.children), dtype=torch.long)
    for s, row in enumerate(tree.children.tolist()):
        depth[[child for child in row if child != TERMINAL]] = depth[s] + 1
    return depth != 2, torch.where((depth == 1) | (depth == 3), gamma, 1.0)


def optimum_of_turns(tree, of_model, discounts):
    """The backward recursion where a part of the states is the environment's, which moves at random as the data show it."""
    moves, log_ref = tree.behavior_logits.softmax(-1), tree.ref_logits.log_softmax(-1)
    values, log_policy = torch.zeros(len(of_model), dtype=FLOAT), log_ref.clone()
    for s in reversed(range(len(values))):
        ahead = torch.where(tree.terminal[s], 0.0, values[tree.children[s].clamp(min=0)])
        if of_model[s]:
            q = tree.step_rewards[s] + tree.beta * log_ref[s] + discounts[s] * ahead
            values[s] = tree.beta * torch.logsumexp(q / tree.beta, 0)
            log_policy[s] = (q - values[s]) / tree.beta
        else:
            values[s] = (moves[s] * ahead).sum()
    return log_policy, values


@pytest.mark.parametrize(
    "lam, gamma",
    [(0.95, 0.6), *(pytest.param(lam, gamma, marks=pytest.mark.slow) for lam in (0.0, 1.0) for gamma in (0.6, 1.0))],
)
def test_with_an_environment_between_turns_training_arrives_at_the_optimum_of_the_turns(lam, gamma):
    tree = random_tree(1)
    of_model, discounts = turns_of(tree, gamma)
    assert not of_model.all()
    log_policy, values = optimum_of_turns(tree, of_model, discounts)
    own = of_model[tree.states]  # the rows that are actions; the environment's are left out, as in batches
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), own.long().cumsum(0)[tree.cu_seqlens[1:] - 1]])
    states, actions = tree.states[own], tree.actions[own]
    ref_logprobs = tree.ref_logits.log_softmax(-1)[states, actions]

    def row_loss(logits, values):
        terms = soft_bellman(
            logits.log_softmax(-1)[own].gather(-1, actions[:, None])[:, 0], ref_logprobs, tree.rewards[own], values[own],
            cu_seqlens, discounts=discounts[states], beta=tree.beta, lam=lam, is_level="none", reduction="none",
        )  # fmt: skip
        return torch.zeros(len(own), dtype=FLOAT).masked_scatter(own, terms.policy_loss + terms.value_loss)

    found, its_values = fit(tree, row_loss)
    assert (found - log_policy)[of_model].abs().max() < 1e-9
    assert (its_values - values)[of_model].abs().max() < 1e-9


@pytest.mark.slow
def test_plain_adam_arrives_there_too():
    tree, optimum = solved()
    logits, values = (
        tree.ref_logits.clone().requires_grad_(),
        torch.zeros(len(optimum.v), dtype=FLOAT, requires_grad=True),
    )
    # Equal weights on all trajectories are a behaviour with full support as good as any, and kinder to Adam.
    optimizer = torch.optim.Adam([logits, values], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    for _ in range(3000):
        optimizer.zero_grad()
        loss_of(tree, logits, values, is_level="none").loss.backward()
        optimizer.step()
        schedule.step()
    assert (logits.detach().log_softmax(-1) - optimum.log_policy).abs().max() < 1e-5
    assert (values.detach() - optimum.v).abs().max() < 1e-6


# What is computed depends on policy_target, target and soft_values together: each meets every level, lambda and length.
FORMS = list(itertools.product(POLICY_TARGETS, ["detach", "residual"], [False, True]))


@pytest.mark.parametrize("form, is_level, lam, length", pairwise(FORMS, IS_LEVELS, LAMBDAS, [4, 2]))
def test_the_optimum_has_neither_loss_nor_gradient_on_any_path(form, is_level, lam, length):
    policy_target, target, soft_values = form
    # T2: (B) and (C) hold on every path, on-policy or off; a response cut short goes on with b = V*(s_{T+1}).
    whole, optimum = solved()
    tree, ends = whole.cut(length)
    bootstrap = torch.where(ends == TERMINAL, 0.0, optimum.v[ends.clamp(min=0)])
    # Logits of pi* whose logsumexp carries V*: beta (lse - ref_lse) = V*.
    logits = optimum.log_policy + (optimum.v / tree.beta + tree.ref_logits.logsumexp(-1))[:, None]
    logits, values = logits.requires_grad_(), optimum.v.clone().requires_grad_()
    out = loss_of(
        tree, logits, None if soft_values else values, bootstrap=bootstrap, lam=lam,
        policy_target=policy_target,
        target=target, is_level=is_level, behavior_logprobs=tree.behavior_logprobs, reduction="none",
    )  # fmt: skip
    assert out.policy_loss.max() < 1e-26 and out.value_loss.max() < 1e-26
    torch.testing.assert_close(out.returns, optimum.v[tree.states], rtol=0, atol=1e-13)
    out.loss.sum().backward()
    assert logits.grad.abs().max() < 1e-11
    assert values.grad is None or values.grad.abs().max() < 1e-11


@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_a_cut_response_needs_its_bootstrap(lam):
    # Defect 25: called terminal, a cut response disagrees with the optimum.
    whole, optimum = solved()
    tree, _ = whole.cut(2)
    assert loss_of(tree, optimum.log_policy, optimum.v, lam=lam, is_level="none").loss > 1e-2


@pytest.mark.parametrize("baseline", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_on_policy_the_expected_policy_gradient_is_that_of_the_regularized_return(seed, baseline):
    # T5: E_pi[grad L_pi] = -beta grad J_KL at lambda = 1, whatever the values.
    tree, _ = solved(seed)
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(tree.ref_logits.shape, generator=rng, dtype=FLOAT).requires_grad_()
    values = baseline * torch.randn(len(tree.children), generator=rng, dtype=FLOAT)
    probs = tree.row_probs(logits.detach())
    out = loss_of(tree, logits, values, is_level="none", value_coef=0.0, reduction="none")
    (got,) = torch.autograd.grad((probs * out.loss).sum(), logits)
    (objective,) = torch.autograd.grad(tree.policy_values(logits)[0], logits)
    assert objective.abs().max() > 1e-2
    torch.testing.assert_close(got, -tree.beta * objective, rtol=0, atol=1e-13)


def value_gradient(tree, logits, values, lam, is_level, weigh_by_behavior=True):
    values = values.clone().requires_grad_()
    out = loss_of(
        tree, logits, values, lam=lam, is_level=is_level, is_cap=None,
        behavior_logprobs=tree.behavior_logprobs,
        policy_scale=0.0, reduction="none",
    )  # fmt: skip
    return torch.autograd.grad((tree.row_probs(tree.behavior_logits) * out.loss).sum(), values)[0]


@pytest.mark.parametrize(
    "is_level, unbiased", [("trajectory", True), ("suffix", True), ("none", False), ("prefix", False)]
)
def test_values_learned_off_policy_are_those_of_the_policy_under_the_right_weights(is_level, unbiased):
    # T6: at lambda = 1 the loss is quadratic in V and separate by state, so two gradients give its minimiser.
    tree, _ = solved()
    logits = torch.randn(tree.ref_logits.shape, generator=torch.Generator().manual_seed(3), dtype=FLOAT)
    zeros = torch.zeros(len(tree.children), dtype=FLOAT)
    at_zero = value_gradient(tree, logits, zeros, 1.0, is_level)
    curvature = value_gradient(tree, logits, zeros + 1, 1.0, is_level) - at_zero
    minimiser, truth = -at_zero / curvature, tree.policy_values(logits)
    if unbiased:
        torch.testing.assert_close(minimiser, truth, rtol=0, atol=1e-12)
    else:
        assert (minimiser - truth).abs().max() > 0.1


@pytest.mark.parametrize("is_level", ["trajectory", "suffix"])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_policys_values_are_stationary_at_every_lambda_under_the_right_weights(is_level, lam):
    tree, _ = solved()
    logits = torch.randn(tree.ref_logits.shape, generator=torch.Generator().manual_seed(4), dtype=FLOAT)
    truth = tree.policy_values(logits)
    assert value_gradient(tree, logits, truth, lam, is_level).abs().max() < 1e-13
    assert value_gradient(tree, logits, truth, lam, "none").abs().max() > 1e-3


@pytest.mark.parametrize(
    "change, policy_target, lam, target",
    pairwise(["shaping", "terminal bonus"], POLICY_TARGETS, LAMBDAS, ["detach", "residual"]),
)
def test_shaping_and_a_constant_reward_move_the_values_and_not_the_policy(change, policy_target, lam, target):
    # T7: r + Phi(s') - Phi(s) with Phi(terminal) = 0 moves V to V - Phi, a bonus c at the end to V + c: for
    # any policy and values, and so for the optimum, every loss, weight and gradient stays what it was.
    tree, optimum = solved()
    rng = torch.Generator().manual_seed(5)
    logits = torch.randn(tree.ref_logits.shape, generator=rng, dtype=FLOAT)
    values, potential = torch.randn(2, len(tree.children), generator=rng, dtype=FLOAT).unbind()
    other, moved = (tree.shaped(potential), -potential) if change == "shaping" else (tree.with_terminal_bonus(1.5), 1.5)
    torch.testing.assert_close(other.optimum().log_policy, optimum.log_policy, rtol=0, atol=1e-13)
    torch.testing.assert_close(other.optimum().v, optimum.v + moved, rtol=0, atol=1e-13)
    results = []
    for mdp, table in ((tree, values), (other, values + moved)):
        live, table = logits.clone().requires_grad_(), table.clone().requires_grad_()
        out = loss_of(mdp, live, table, policy_target=policy_target, lam=lam, target=target, reduction="none")
        gradients = torch.autograd.grad(out.loss.sum(), (live, table))
        results.append((out.policy_loss, out.value_loss, out.advantages, out.weights, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_potential_at_the_end_would_change_the_policy():
    # Defect 23. A potential of terminal states is a reward for reaching them.
    tree, optimum = solved()
    potential = torch.randn(len(tree.children), generator=torch.Generator().manual_seed(6), dtype=FLOAT)
    wrong = tree.shaped(potential, terminal_potential=1.0)
    out = loss_of(wrong, optimum.log_policy, optimum.v - potential, is_level="none")
    assert out.loss > 1e-2
    assert loss_of(tree.shaped(potential), optimum.log_policy, optimum.v - potential, is_level="none").loss < 1e-26


def test_the_direct_residual_leaves_the_two_armed_bandit_where_the_iterated_one_is_stuck():
    # T10 (arXiv 2505.15311, appendix F): rewards (1, 0), beta 0.1, a class of two Q functions with logits
    # Q/beta of (0, 0), the reference, and (10, 0), the truth.
    arms, rewards = torch.tensor([0, 1]), torch.tensor([1.0, 0.0], dtype=FLOAT)
    candidates = torch.tensor([[0.0, 0.0], [10.0, 0.0]], dtype=FLOAT)
    cu_seqlens, reference = torch.tensor([0, 1, 2]), torch.zeros(2, 2, dtype=FLOAT)
    options = {
        "ref_logits": reference,
        "cu_seqlens": cu_seqlens,
        "beta": 0.1,
        "is_level": "none",
        "reduction": "sum",
    }

    def direct(logits):
        return soft_bellman_loss(logits.expand(2, 2), arms, rewards, target="residual", **options).loss.item()

    def iterated(logits, previous):
        frozen = 0.1 * (previous.logsumexp(-1) - reference[0].logsumexp(-1))
        out = soft_bellman_loss(
            logits.expand(2, 2),
            arms,
            rewards,
            frozen.expand(2),
            value_coef=0.0,
            policy_target="one_step",
            **options,
        )
        return out.loss.item()

    # The truth has no residual: 10 beta - 1 = 0 and 0 - 0 = 0. The reference is off by 1 on the first arm.
    assert [direct(z) for z in candidates] == pytest.approx([0.5, 0.0], abs=1e-14)
    current = candidates[0]
    for _ in range(10):
        current = min(candidates, key=lambda z: iterated(z, current))
    assert torch.equal(current, candidates[0])


def test_the_bandit_is_learned_by_gradient_steps_on_the_direct_residual():
    arms, rewards = torch.tensor([0, 1]), torch.tensor([1.0, 0.0], dtype=FLOAT)
    logits = torch.zeros(2, dtype=FLOAT, requires_grad=True)
    for _ in range(100):
        loss = soft_bellman_loss(
            logits.expand(2, 2), arms, rewards, ref_logits=torch.zeros(2, 2, dtype=FLOAT), beta=0.1,
            cu_seqlens=torch.tensor([0, 1, 2]), target="residual", is_level="none", reduction="sum",
        ).loss  # fmt: skip
        # d loss / d logit_a = beta e_a: a step of 1/(2 beta^2) halves each residual.
        logits = (logits - torch.autograd.grad(loss, logits)[0] / (2 * 0.1**2)).detach().requires_grad_()
    torch.testing.assert_close(logits.detach(), torch.tensor([10.0, 0.0], dtype=FLOAT), rtol=0, atol=1e-10)


def test_soft_bellman_alone_agrees_that_the_optimum_has_no_loss():
    tree, optimum = solved(1)
    logprobs = optimum.log_policy[tree.states, tree.actions]
    ref_logprobs = tree.ref_logits.log_softmax(-1)[tree.states, tree.actions]
    terms = soft_bellman(
        logprobs, ref_logprobs, tree.rewards, optimum.v[tree.states], tree.cu_seqlens, beta=tree.beta, lam=0.5
    )
    assert terms.policy_loss < 1e-26 and terms.value_loss < 1e-26

"""The implied value is the optimal one where the policy is optimal; the equations that hold for any policy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqo.credit.implied import CRITIC, ITSELF, OTHER_PROMPTS, OTHERS, Start, implied_values, soft_return, starts
from tests.tabular import TERMINAL, random_tree


def discounted_optimum(tree, gamma):
    """V (S,) and log pi (S, A) of the tree's optimum under a discount."""
    log_ref = tree.ref_logits.log_softmax(-1)
    v, q = torch.zeros(len(log_ref), dtype=torch.float64), torch.zeros_like(log_ref)
    for s in reversed(range(len(v))):
        after = torch.where(tree.terminal[s], 0.0, v[tree.children[s].clamp(min=0)])
        q[s] = tree.step_rewards[s] + tree.beta * log_ref[s] + gamma * after
        v[s] = tree.beta * torch.logsumexp(q[s] / tree.beta, 0)
    return v, (q - v[:, None]) / tree.beta


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_along_every_path_of_the_optimal_policy_it_is_the_optimal_value_and_nothing_remains(gamma):
    tree = random_tree(3)
    v, log_policy = discounted_optimum(tree, gamma)
    if gamma == 1:
        torch.testing.assert_close(v, tree.optimum().v)
    delta = (log_policy - tree.ref_logits.log_softmax(-1))[tree.states, tree.actions]
    splits = tree.cu_seqlens[1:-1].tolist()
    paths = [np.split(x.numpy(), splits) for x in (tree.states, tree.beta * delta, tree.rewards)]
    ends = tree.children[tree.states, tree.actions].numpy()[tree.cu_seqlens[1:].numpy() - 1]
    assert (ends == TERMINAL).all() and len(splits) > 20
    soft = [soft_return(advantages, rewards, gamma) for _, advantages, rewards in zip(*paths)]
    np.testing.assert_allclose(soft, v[0].item(), atol=1e-12)
    for start, states, advantages, rewards in zip(starts([0] * len(soft), soft), *paths):
        found = implied_values(advantages, rewards, start.value, gamma)
        np.testing.assert_allclose(found.values[:-1], v[states].numpy(), atol=1e-11)
        assert abs(found.remainder) < 1e-11 and found.remainder == found.values[-1]


def test_by_hand():
    # (1 + 0.5 - 0) / 0.5 = 3; (3 - 1 - 0.25) / 0.5 = 3.5
    assert implied_values([0.5, -1.0], [0.0, 0.25], 1.0, 0.5).values.tolist() == [1.0, 3.0, 3.5]
    assert soft_return([0.5, -1.0], [0.0, 0.25], 0.5) == -0.5 + 0.5 * 1.25
    assert implied_values([], [], 2.0).remainder == 2.0 and soft_return([], []) == 0
    assert soft_return([0.5, -1.0], [0.0, 0.25], 0.0) == -0.5
    for wrong in (([1.0], [1.0, 2.0]), ([1.0], [1.0], 1.0, 0.0), ([[1.0]], [[1.0]])):
        with pytest.raises(ValueError, match="must be"):
            implied_values(*wrong[:2], 0.0, *wrong[3:])


numbers = st.floats(-3, 3)
responses = st.lists(st.tuples(numbers, numbers, st.floats(0.5, 1.0)), min_size=1, max_size=12)


@settings(deadline=None)
@given(responses, numbers, st.lists(numbers, min_size=13, max_size=13))
def test_what_holds_for_any_policy(response, start, potentials):
    advantages, rewards, gamma = map(np.array, zip(*response))
    values, remainder = implied_values(advantages, rewards, start, gamma)
    # every soft Bellman residual is 0
    residuals = values[:-1] + advantages - rewards - gamma * values[1:]
    np.testing.assert_allclose(residuals, 0, atol=1e-9 * (1 + np.abs(values).max()))
    # the remainder, discounted, is what the beginning is above the soft return
    np.testing.assert_allclose(np.prod(gamma) * remainder, start - soft_return(advantages, rewards, gamma), atol=1e-9)
    # a potential in the rewards moves every value by itself, and no remainder where it ends at 0
    phi = np.array([*potentials[: len(response)], 0.0])
    shaped = implied_values(advantages, rewards + gamma * phi[1:] - phi[:-1], start - phi[0], gamma)
    np.testing.assert_allclose(shaped.values, values - phi, atol=1e-9 * (1 + np.abs(values).max()))


def test_a_response_begins_at_the_mean_of_the_others():
    found = starts(["a", "a", "b", "a"], [1.0, 2.0, 5.0, 6.0])
    assert found[0] == Start(4.0, OTHERS, 2) and found[1] == Start(3.5, OTHERS, 2)
    assert found[2] == Start(3.0, OTHER_PROMPTS, 3)
    assert starts(["a", "b"], [1.0, 2.0], critic=[0.5, 0.7]) == [Start(0.5, CRITIC, 0), Start(0.7, CRITIC, 0)]
    assert starts(["a"], [1.5]) == [Start(1.5, ITSELF, 1)]


def test_a_response_that_was_cut_tells_the_others_nothing():
    found = starts([0, 0, 0, 1], [1.0, np.nan, 3.0, np.nan])
    assert [start.value for start in found] == [3.0, 2.0, 1.0, 2.0]
    assert [start.origin for start in found] == [OTHERS, OTHERS, OTHERS, OTHER_PROMPTS]
    assert starts([0], [np.nan]) == [Start(0.0, ITSELF, 0)]

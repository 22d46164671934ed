import math

import numpy as np
import pytest
import torch

from dqo.zpg.estimate import direction, ends, gradient, preferences, value_difference
from tests.tabular import random_tree

CENTRAL = pytest.mark.parametrize("central", [True, False])


def test_one_estimate_by_hand():
    shares = preferences(np.array([0.0, 1.0, 1.0, 0.25]), np.array([1.0, 1.0, 0.0, 0.75]), 0, np.random.default_rng(0))
    assert shares.tolist() == [1.0, 0.5, 0.0, 1.0]
    assert value_difference(shares, 1.0) == pytest.approx((1 + 0 - 1 + 1) / 4)
    assert value_difference(np.array([0.6, 0.75, 1.0]), 1.0) == pytest.approx(
        (math.log(1.5) + 2 * 1.0) / 3
    )  # log 3 is above 1
    v, theta = np.array([0.6, -0.8]), np.array([1.0, 2.0])
    first, second = ends(theta, v, 0.5, central=False)
    assert first.tolist() == [1.0, 2.0] and second.tolist() == pytest.approx([1.3, 1.6])
    assert gradient(v, 0.25, 0.5, central=False).tolist() == pytest.approx(
        [2 / 0.5 * 0.25 * 0.6, -2 / 0.5 * 0.25 * 0.8]
    )
    first, second = ends(theta, v, 0.5, central=True)
    assert first.tolist() == pytest.approx([0.7, 2.4]) and second.tolist() == pytest.approx([1.3, 1.6])
    assert gradient(v, 0.25, 0.5, central=True).tolist() == pytest.approx([0.3, -0.4])


def test_votes_have_the_probability_of_bradley_and_terry():
    rng = np.random.default_rng(0)
    shares = preferences(np.zeros(4000), np.full(4000, 0.7), 5, rng)
    expected = 1 / (1 + math.exp(-0.7))
    assert set(np.round(shares * 5)) <= set(range(6))
    assert abs(shares.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / 20000)
    assert not np.isnan(preferences(np.array([-3e38]), np.array([3e38]), 3, rng)).any()


def test_directions_are_uniform_on_the_sphere():
    rng = np.random.default_rng(1)
    found = np.stack([direction(3, rng) for _ in range(3000)])
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0)
    assert np.allclose(found.T @ found / 3000, np.eye(3) / 3, atol=0.03)


def means(estimates):
    found = np.stack(estimates)
    return found.mean(0), found.std(0, ddof=1) / math.sqrt(len(found))


@CENTRAL
def test_on_a_quadratic_the_mean_estimate_is_the_gradient(central):
    """V = b x - 1/2 x A x is asked exactly: the mean over directions of d/mu (V(x + mu v) - V(x)) v is b - A x for any mu."""
    rng = np.random.default_rng(2)
    root = rng.standard_normal((4, 4))
    a, b, x = root @ root.T, rng.standard_normal(4), rng.standard_normal(4)

    def value(x):
        return b @ x - 0.5 * x @ a @ x

    estimates = []
    for _ in range(4000):
        v = direction(4, rng).astype(np.float64)
        first, second = ends(x, v, 0.7, central)
        estimates.append(gradient(v, value(second) - value(first), 0.7, central))
    mean, error = means(estimates)
    assert (np.abs(mean - (b - a @ x)) < 4 * error).all()
    assert error.max() < 0.2 * np.linalg.norm(b - a @ x)


class Bandit:
    """The tree's responses, each with the reward 0 or 1, as trajectories of a table of logits."""

    def __init__(self):
        self.tree = random_tree(3, depth=2, num_actions=2)
        self.rewards = (torch.arange(len(self.tree.seqlens)) % 3 == 0).numpy().astype(float)
        self.shape = self.tree.ref_logits.shape

    def probabilities(self, theta):
        return self.tree.trajectory_probs(torch.tensor(theta).view(self.shape).double())

    def value(self, theta):
        return float(self.probabilities(theta).numpy() @ self.rewards)

    def gradient(self, theta):
        leaf = torch.tensor(theta).double().requires_grad_()
        value = self.tree.trajectory_probs(leaf.view(self.shape)) @ torch.tensor(self.rewards)
        return torch.autograd.grad(value, leaf)[0].numpy()

    def estimate(self, theta, mu, pairs, judges, bound, rng, central=True):
        v = direction(len(theta), rng).astype(np.float64)
        uniform = rng.random(pairs)  # the same for both policies
        sides = [
            self.rewards[
                np.minimum(np.searchsorted(self.probabilities(at).cumsum(0).numpy(), uniform), len(self.rewards) - 1)
            ]
            for at in ends(theta, v, mu, central)
        ]
        shares = preferences(*sides, judges, rng)
        return gradient(v, value_difference(shares, bound), mu, central)


@pytest.mark.parametrize("judges, bound", [(0, 1.0), (400, 5.0)])
def test_on_a_tabular_task_the_mean_estimate_is_the_policy_gradient(judges, bound):
    bandit, rng = Bandit(), np.random.default_rng(4)
    theta = bandit.tree.ref_logits.numpy().flatten()
    mean, error = means([bandit.estimate(theta, 0.3, 60, judges, bound, rng) for _ in range(2500)])
    exact = bandit.gradient(theta)
    assert (np.abs(mean - exact) < 4 * error + 0.02 * np.linalg.norm(exact)).all()  # the latter for mu
    assert error.max() < 0.25 * np.abs(exact).max()


def test_it_climbs_a_tabular_task_to_its_optimum():
    bandit, rng = Bandit(), np.random.default_rng(5)
    theta = bandit.tree.ref_logits.numpy().flatten()
    start = bandit.value(theta)
    for _ in range(400):
        theta = theta + 0.5 * bandit.estimate(theta, 0.5, 50, 0, 1.0, rng)
    assert start < 0.8 and bandit.value(theta) > 0.97  # 1 is the most

"""Zeroth-order policy gradient from preferences (arXiv 2409.17401): neither a reward model nor a gradient of the policy.

Alg. 1    v uniform on the unit sphere of R^d,    theta' = theta + mu * v                    d trained parameters
          N pairs of trajectories, tau ~ pi_theta and tau' ~ pi_theta', one question each to M judges
          p_n = the share of judges that prefer tau'_n,    P(tau' is preferred) = sigma( R(tau') - R(tau) )    Bradley-Terry
          D = 1/N sum_n logit( trim( p_n ) ),    trim to [ sigma(-H), sigma(H) ]            estimates V(theta') - V(theta)
          g = d / mu * D * v,    theta <- theta + learning_rate * g

`central` compares theta + mu * v with theta - mu * v, which lie 2 mu apart: its error is of the order of mu^2, not of mu. It is
not in the paper, and neither is a mean over several directions. The trimming is given from memory of the paper; H is the option
logit_bound. Without judges the preference is exact, 1, 0 or 1/2: then the logit is H, -H or 0, and D is H times how much more
often the one side wins. With rewards of 0 and 1 and H = 1 that is the difference of the two accuracies, without a bias.
"""

from __future__ import annotations

import numpy as np


def direction(d: int, rng: np.random.Generator) -> np.ndarray:
    """(d,) float32, uniform on the unit sphere."""
    found = rng.standard_normal(d)
    return (found / np.linalg.norm(found)).astype(np.float32)


def preferences(first: np.ndarray, second: np.ndarray, judges: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) float64: the share of votes for the second response of each pair.

    Args:
        first, second: (N,) rewards. judges: 0 asks the rewards themselves.
    """
    gain = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    if judges == 0:
        return 0.5 + 0.5 * np.sign(gain)
    return rng.binomial(judges, 1.0 / (1.0 + np.exp(-np.clip(gain, -500.0, 500.0)))) / judges


def value_difference(shares: np.ndarray, bound: float) -> float:
    """The estimate of V(second) - V(first): the mean logit of (N,) shares, each kept between -bound and bound."""
    with np.errstate(divide="ignore"):
        logits = np.log(shares) - np.log1p(-shares)
    return float(np.clip(logits, -bound, bound).mean())


def ends(theta: np.ndarray, v: np.ndarray, mu: float, central: bool) -> tuple[np.ndarray, np.ndarray]:
    """The parameters of the two policies that are compared, the first and the second: (d,) each."""
    return (theta - mu * v if central else theta), theta + mu * v


def gradient(v: np.ndarray, difference: float, mu: float, central: bool) -> np.ndarray:
    """(d,): the estimate of the gradient of the value from one direction."""
    return len(v) / (2.0 * mu if central else mu) * difference * v

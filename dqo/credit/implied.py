"""The value that a policy implies along a response, without a value model.

    V(s_{t+1}) = (V(s_t) + beta * delta_t - r_t) / gamma        delta_t = log pi(y_t|s_t) - log ref(y_t|s_t)

This is the soft Bellman equation Q = V + beta * log(pi/ref) = r + gamma * V', solved for V'. It holds on every response where the
policy is optimal (arXiv 2404.12358, 2412.01981). A terminal state is worth 0, so what the last value is away from 0, the
remainder, says how far policy, rewards and beginning are from fitting together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Where the value of the prompt comes from.
OTHERS, CRITIC, OTHER_PROMPTS, ITSELF = "other responses to the prompt", "value model", "other prompts", "itself"


class Implied(NamedTuple):
    values: np.ndarray  # (T + 1,) V of the state before each token, and of the state behind the last
    remainder: float  # the last of them: 0 is expected of a response that ended


class Start(NamedTuple):
    value: float  # V(s_1)
    origin: str  # OTHERS, CRITIC, OTHER_PROMPTS or ITSELF
    responses: int  # responses that it is the mean of; 0 for CRITIC


def implied_values(advantages: ArrayLike, rewards: ArrayLike, start: float, gamma: ArrayLike = 1.0) -> Implied:
    """V along one response of T tokens.

    Args:
        advantages: (T,) beta * delta. rewards: (T,). start: V of the prompt. gamma: the discount, above 0, one number or (T,).

    Raises:
        ValueError: for lengths that differ, or a discount of 0 or less.
    """
    gains, discounts = _checked(advantages, rewards, gamma)
    if not (discounts > 0).all():
        raise ValueError(f"the discount must be above 0, got {np.asarray(gamma).tolist()}")
    values = np.empty(len(gains) + 1)
    values[0] = start
    for t, (gain, discount) in enumerate(zip(gains, discounts)):
        values[t + 1] = (values[t] - gain) / discount
    return Implied(values, float(values[-1]))


def soft_return(advantages: ArrayLike, rewards: ArrayLike, gamma: ArrayLike = 1.0) -> float:
    """The value of the prompt with which one response leaves no remainder: the discounted sum of r_t - beta * delta_t. Under the
    optimal policy it is the same for all responses to a prompt. Arguments as in `implied_values`."""
    gains, discounts = _checked(advantages, rewards, gamma)
    before = np.cumprod(np.concatenate([[1.0], discounts[:-1]])) if len(gains) else discounts
    return float(before @ gains)


def starts(prompts: Sequence[int | str], soft_returns: ArrayLike, critic: ArrayLike | None = None) -> list[Start]:
    """V of the prompt of each of N responses, from responses other than itself, so that a remainder is no tautology.

    Args:
        prompts: (N,) responses to one prompt share it.
        soft_returns: (N,) see `soft_return`; NaN for a response that was cut, which does not tell what follows.
        critic: (N,) the value model's V(s_1), for prompts without another response.

    Returns:
        The mean over the prompt's other responses; without any the value model's; without one the mean over all other prompts'
        responses; without those the response's own.
    """
    told = np.asarray(soft_returns, float)
    known = ~np.isnan(told)
    members = np.unique(np.asarray(prompts), return_inverse=True)[1].reshape(-1)
    sums, counts = (np.bincount(members, weights=x) for x in (np.where(known, told, 0.0), known.astype(float)))
    found = []
    for i, member in enumerate(members):
        own, one = (told[i], 1) if known[i] else (0.0, 0)
        if others := int(counts[member]) - one:
            found.append(Start(float(sums[member] - own) / others, OTHERS, others))
        elif critic is not None:
            found.append(Start(float(np.asarray(critic, float)[i]), CRITIC, 0))
        elif others := int(counts.sum()) - one:
            found.append(Start(float(sums.sum() - own) / others, OTHER_PROMPTS, others))
        else:
            found.append(Start(float(own), ITSELF, one))
    return found


def _checked(advantages: ArrayLike, rewards: ArrayLike, gamma: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(T,) r_t - beta * delta_t, and (T,) discounts."""
    advantages, rewards = np.asarray(advantages, float), np.asarray(rewards, float)
    if advantages.ndim != 1 or advantages.shape != rewards.shape:
        raise ValueError(f"advantages {advantages.shape} and rewards {rewards.shape} must be (T,) of one response")
    return rewards - advantages, np.broadcast_to(np.asarray(gamma, float), advantages.shape)

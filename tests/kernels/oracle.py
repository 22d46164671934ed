"""The mathematics of DQO once more, as slow explicit numpy loops in float64, and small random batches to feed
it.

The loops take a *live* and a *frozen* copy of everything that the policy and the value model produce: a
stop-gradient place reads the frozen copy. Finite differences in the live copy are then what autograd must
return in `detach` mode, which plain gradcheck cannot see (it would move the targets too).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Stats:
    """float64 row statistics of softcap(logits) / temperature."""

    logprobs: np.ndarray
    lse: np.ndarray
    entropy: np.ndarray
    probs: np.ndarray
    scaled: np.ndarray  # the logits after softcap and temperature


def row_stats(logits, actions, temperature=1.0, softcap=None) -> Stats:
    z = np.asarray(logits, dtype=np.float64)
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
    z = z / np.broadcast_to(np.asarray(temperature, dtype=np.float64), z.shape[:1])[:, None]
    top = z.max(-1, keepdims=True, initial=-np.inf)
    lse = np.log(np.exp(z - top).sum(-1)) + top[:, 0]
    logp = z - lse[:, None]
    probs = np.exp(logp)
    entropy = -(probs * np.where(probs > 0, logp, 0.0)).sum(-1)
    return Stats(np.take_along_axis(logp, np.asarray(actions)[:, None], 1)[:, 0], lse, entropy, probs, z)


def exact_kl(policy: Stats, ref: Stats) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        gap = (policy.scaled - policy.lse[:, None]) - (ref.scaled - ref.lse[:, None])
    return (policy.probs * np.where(policy.probs > 0, gap, 0.0)).sum(-1)


def mixture_return(k, values, bootstrap, gamma, lam):
    """G_h of one sequence as the mixture of n-step returns: (1-lam) lam^(n-1) each, lam^(N-1) the last. `gamma` is one number or
    one for each step."""
    steps, returns = len(k), []
    gamma = np.broadcast_to(gamma, steps)
    after = [*values[1:], bootstrap]
    for h in range(steps):
        remaining, total, discounted = steps - h, 0.0, 0.0
        for n in range(1, remaining + 1):
            discounted = discounted + np.prod(gamma[h : h + n - 1]) * k[h + n - 1]
            weight = lam ** (n - 1) * (1.0 if n == remaining else 1.0 - lam)
            total = total + weight * (discounted + np.prod(gamma[h : h + n]) * after[h + n - 1])
        returns.append(total)
    return returns


def log_weights(rho, level):
    """x_t of one sequence, before cap and floor."""
    return {
        "none": np.zeros(len(rho)),
        "token": np.asarray(rho, dtype=np.float64),
        "trajectory": np.full(len(rho), np.sum(rho)),
        "suffix": np.array([np.sum(rho[t:]) for t in range(len(rho))]),
        "prefix": np.array([np.sum(rho[:t]) for t in range(len(rho))]),
    }[level]


def bellman_rows(
    live, frozen, *, ref_logprobs, rewards, cu_seqlens, behavior_logprobs=None, target_values=None,
    beta=0.1, gamma=1.0, lam=1.0, policy_target="return", target="detach",
    is_level="trajectory", is_cap=1.0, is_floor=None, discounts=None,
):  # fmt: skip
    """Rows of (policy_loss, value_loss, returns, advantages, weights).

    live and frozen hold logprobs, values and bootstrap.
    """
    behavior = ref_logprobs if behavior_logprobs is None else behavior_logprobs
    gammas = np.full(len(rewards), gamma) if discounts is None else discounts
    out = [[], [], [], [], []]
    for b, (lo, hi) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        row = slice(lo, hi)
        scan = live if target == "residual" else frozen
        base = scan["values"][row] if target_values is None else target_values[row]
        end, gamma = scan["bootstrap"][b], gammas[row]
        reward, delta = rewards[row], live["logprobs"][row] - ref_logprobs[row]
        k = reward - beta * (scan["logprobs"][row] - ref_logprobs[row])
        returns = np.array(mixture_return(k, base, end, gamma, lam))
        next_value, next_return = np.append(base[1:], end)[: hi - lo], np.append(returns[1:], end)[: hi - lo]
        bridge = {
            "return": next_return,
            "td": (1 - lam) * next_value + lam * next_return,
            "one_step": next_value,
        }[policy_target]
        x = log_weights(frozen["logprobs"][row] - behavior[row], is_level)
        if is_level != "none":
            x = np.minimum(x, np.inf if is_cap is None else is_cap)
            x = np.maximum(x, -np.inf if is_floor is None else is_floor)
        weight = np.exp(x)
        advantage = reward + gamma * bridge - base
        out[0] += list(0.5 * weight * (beta * delta - advantage) ** 2)
        out[1] += list(0.5 * weight * (returns - live["values"][row]) ** 2)
        out[2] += list(returns)
        out[3] += list(advantage)
        out[4] += list(weight)
    return tuple(np.array(field) for field in out)


def packed_loss_rows(live, frozen, *, actions, ref_logits, temperature=1.0, softcap=None, **options):
    """bellman_rows from logits; without "values" in live it takes soft values beta (lse - ref_lse)."""
    ref = row_stats(ref_logits, actions, temperature, softcap)
    beta = options.get("beta", 0.1)

    def resolve(source):
        policy = row_stats(source["logits"], actions, temperature, softcap)
        values = source["values"] if source.get("values") is not None else beta * (policy.lse - ref.lse)
        return {"logprobs": policy.logprobs, "values": values, "bootstrap": source["bootstrap"]}, policy

    (live_rows, policy), (frozen_rows, _) = resolve(live), resolve(frozen)
    rows = bellman_rows(live_rows, frozen_rows, ref_logprobs=ref.logprobs, **options)
    return rows, exact_kl(policy, ref)


def numeric_gradient(function, array, step=1e-6):
    """Central differences of a scalar function of one float64 array."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        shifted = [array.copy(), array.copy()]
        shifted[0][index] += step
        shifted[1][index] -= step
        gradient[index] = (function(shifted[0]) - function(shifted[1])) / (2 * step)
    return gradient


@dataclass
class Batch:
    """B random sequences of packed rows in float64."""

    logits: Tensor
    ref_logits: Tensor
    actions: Tensor
    rewards: Tensor
    values: Tensor
    target_values: Tensor
    bootstrap: Tensor
    behavior_logprobs: Tensor
    cu_seqlens: Tensor

    @property
    def logprobs(self) -> Tensor:
        return taken(self.logits, self.actions)

    @property
    def ref_logprobs(self) -> Tensor:
        return taken(self.ref_logits, self.actions)

    @property
    def slices(self) -> list[slice]:
        ends = self.cu_seqlens.tolist()
        return [slice(lo, hi) for lo, hi in zip(ends[:-1], ends[1:], strict=True)]


def taken(logits: Tensor, actions: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]


def random_batch(seed=0, lengths=(3, 1, 0, 5), vocab=6) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    rows = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    actions = torch.randint(vocab, (rows,), generator=rng)
    return Batch(
        logits=2 * normal(rows, vocab), ref_logits=2 * normal(rows, vocab), actions=actions,
        rewards=normal(rows),
        values=normal(rows), target_values=normal(rows), bootstrap=normal(len(lengths)),
        behavior_logprobs=taken(normal(rows, vocab), actions),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
    )  # fmt: skip


def padded(rows: Tensor, mask: Tensor, fill=0.0) -> Tensor:
    """Packed rows laid out at the true places of mask (B, T), `fill` elsewhere."""
    out = torch.full((*mask.shape, *rows.shape[1:]), fill, dtype=rows.dtype)
    out[mask] = rows
    return out

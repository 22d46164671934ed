"""A token MDP small enough to solve exactly: a tree of states with every trajectory enumerated.

Everything is float64. A policy is a table of logits (S, A) and a value function a table (S,); indexing them
with `tree.states` gives the packed rows that `dqo_kernels` works on:

    tree = random_tree(0)
    optimum = tree.optimum()
    out = soft_bellman_loss(logits[tree.states], tree.actions, tree.rewards, values[tree.states],
                            ref_logits=tree.ref_logits[tree.states], cu_seqlens=tree.cu_seqlens,
                            beta=tree.beta)

With deterministic transitions the optimum of E[sum r - beta KL(pi || ref)] is a backward recursion:

    Q*(s, a) = r(s, a) + beta log ref(a|s) + V*(s')      V*(terminal) = 0
    V*(s)    = beta logsumexp_a(Q*(s, a) / beta)          log pi*(a|s) = (Q*(s, a) - V*(s)) / beta
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

TERMINAL = -1


class Optimum(NamedTuple):
    q: Tensor  # (S, A)
    v: Tensor  # (S,)
    log_policy: Tensor  # (S, A)


@dataclass(frozen=True)
class Tree:
    beta: float
    children: Tensor  # (S, A) index of the next state or TERMINAL; a child's index is above its parent's
    step_rewards: Tensor  # (S, A)
    ref_logits: Tensor  # (S, A)
    behavior_logits: Tensor  # (S, A), full support
    states: Tensor  # (N,) the packed rows of all trajectories
    actions: Tensor  # (N,)
    cu_seqlens: Tensor  # (B + 1,)

    @property
    def rewards(self) -> Tensor:
        return self.step_rewards[self.states, self.actions]

    @property
    def seqlens(self) -> Tensor:
        return self.cu_seqlens.diff()

    @property
    def sequences(self) -> Tensor:
        """(N,) the trajectory each row belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.seqlens)), self.seqlens)

    @property
    def terminal(self) -> Tensor:
        """(S, A) true where the action ends the response."""
        return self.children == TERMINAL

    @property
    def behavior_logprobs(self) -> Tensor:
        """(N,)"""
        return self.behavior_logits.log_softmax(-1)[self.states, self.actions]

    def trajectory_probs(self, logits: Tensor) -> Tensor:
        """(B,) the probability of each trajectory under softmax(logits); they sum to 1."""
        row_logprobs = logits.log_softmax(-1)[self.states, self.actions]
        zeros = torch.zeros(len(self.seqlens), dtype=torch.float64)
        return zeros.index_add(0, self.sequences, row_logprobs).exp()

    def row_probs(self, logits: Tensor) -> Tensor:
        """(N,) the probability of the trajectory of each row: its sums over rows are E[sum_t]."""
        return self.trajectory_probs(logits)[self.sequences]

    def visits(self, logits: Tensor) -> Tensor:
        """(S,) the probability of passing through each state."""
        return torch.zeros(len(self.children), dtype=torch.float64).index_add(0, self.states, self.row_probs(logits))

    def optimum(self) -> Optimum:
        log_ref = self.ref_logits.log_softmax(-1)
        q, v = torch.zeros_like(log_ref), torch.zeros(len(log_ref), dtype=torch.float64)
        for s in reversed(range(len(v))):
            q[s] = self.step_rewards[s] + self.beta * log_ref[s] + self._next(v, s)
            v[s] = self.beta * torch.logsumexp(q[s] / self.beta, 0)
        return Optimum(q, v, (q - v[:, None]) / self.beta)

    def policy_values(self, logits: Tensor) -> Tensor:
        """(S,) V^pi(s) = E_pi[sum r - beta log pi/ref from s on]; differentiable. Entry 0 is J_KL."""
        log_policy, log_ref = logits.log_softmax(-1), self.ref_logits.log_softmax(-1)
        values = [torch.zeros((), dtype=torch.float64)] * len(log_ref)
        for s in reversed(range(len(values))):
            next_values = torch.stack(
                [values[c] if c != TERMINAL else values[0] * 0 for c in self.children[s].tolist()]
            )
            gain = self.step_rewards[s] - self.beta * (log_policy[s] - log_ref[s]) + next_values
            values[s] = (log_policy[s].exp() * gain).sum()
        return torch.stack(values)

    def shaped(self, potential: Tensor, terminal_potential: float = 0.0) -> "Tree":
        """The same tree with r'(s, a) = r(s, a) + potential(s') - potential(s)."""
        after = torch.where(self.terminal, terminal_potential, potential[self.children.clamp(min=0)])
        return replace(self, step_rewards=self.step_rewards + after - potential[:, None])

    def with_terminal_bonus(self, bonus: float) -> "Tree":
        """The same tree with `bonus` added to the reward of every action that ends the response."""
        return replace(self, step_rewards=self.step_rewards + bonus * self.terminal)

    def cut(self, length: int) -> tuple["Tree", Tensor]:
        """Every trajectory cut after `length` actions, and (B,) the state each stands in then (TERMINAL when
        it has ended). Trajectories that share a prefix stay, as duplicates."""
        keep, ends, lengths = [], [], []
        for lo, hi in zip(self.cu_seqlens[:-1].tolist(), self.cu_seqlens[1:].tolist(), strict=True):
            stop = min(hi, lo + length)
            keep += range(lo, stop)
            lengths.append(stop - lo)
            ends.append(self.children[self.states[stop - 1], self.actions[stop - 1]].item())
        cut = replace(self, states=self.states[keep], actions=self.actions[keep], cu_seqlens=_boundaries(lengths))
        return cut, torch.tensor(ends)

    def _next(self, v: Tensor, s: int) -> Tensor:
        return torch.where(self.terminal[s], 0.0, v[self.children[s].clamp(min=0)])


def random_tree(seed: int, *, depth: int = 4, num_actions: int = 3, beta: float = 0.5, early_end: float = 0.25) -> Tree:
    """A tree of at most `depth` actions; each but the first ends the response with chance `early_end`."""
    rng = torch.Generator().manual_seed(seed)
    children, depths = [], [0]
    for s in range(sum(num_actions**level for level in range(depth))):
        if s == len(depths):
            break
        row = []
        for _ in range(num_actions):
            ends = depths[s] + 1 == depth or (depths[s] > 0 and torch.rand((), generator=rng) < early_end)
            row.append(TERMINAL if ends else len(depths))
            if not ends:
                depths.append(depths[s] + 1)
        children.append(row)
    table = torch.tensor(children)

    def normal() -> Tensor:
        return torch.randn(table.shape, generator=rng, dtype=torch.float64)

    states, actions, lengths = _enumerate(children)
    return Tree(
        beta=beta, children=table, step_rewards=normal(), ref_logits=normal(), behavior_logits=0.5 * normal(),
        states=torch.tensor(states), actions=torch.tensor(actions), cu_seqlens=_boundaries(lengths),
    )  # fmt: skip


def _enumerate(children: list[list[int]]) -> tuple[list[int], list[int], list[int]]:
    states, actions, lengths, stack = [], [], [], [[(0, a)] for a in range(len(children[0]))]
    while stack:
        path = stack.pop()
        child = children[path[-1][0]][path[-1][1]]
        if child == TERMINAL:
            states += [s for s, _ in path]
            actions += [a for _, a in path]
            lengths.append(len(path))
        else:
            stack += [[*path, (child, a)] for a in range(len(children[child]))]
    return states, actions, lengths


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def fit(tree: Tree, row_loss, *, soft_values: bool = False, max_steps: int = 450) -> tuple[Tensor, Tensor]:
    """Tables (log_policy (S, A), values (S,)) where gradient steps on a DQO-like loss arrive from (ref, 0).

    `row_loss(logits (N, A), values (N,) or None) -> (N,)` is differentiated under the behaviour distribution,
    full batch. Each state's gradient is scaled by the inverse curvature of its own squares (known here, where
    visits are known): that changes no stationary point, and several hundred steps reach rounding where Adam
    needs thousands for 1e-5.
    """
    behavior = tree.behavior_logits.softmax(-1)
    weights, visits = tree.row_probs(tree.behavior_logits), tree.visits(tree.behavior_logits)
    logits, values = tree.ref_logits.clone(), torch.zeros_like(visits)
    eye = torch.eye(logits.shape[1], dtype=torch.float64)
    for _ in range(max_steps):
        tables = [logits.requires_grad_()] if soft_values else [logits.requires_grad_(), values.requires_grad_()]
        loss = row_loss(logits[tree.states], None if soft_values else values[tree.states])
        gradients = torch.autograd.grad((loss * weights).sum(), tables)
        policy = logits.detach().softmax(-1)
        jacobian = eye - policy[:, None, :]  # of log-softmax
        # p p^T is the curvature of soft values; elsewhere it fills the direction that softmax cannot see.
        curvature = torch.einsum("sac,sa,sad->scd", jacobian, behavior, jacobian) + policy[:, :, None] * policy[:, None]
        step = torch.linalg.solve(tree.beta**2 * visits[:, None, None] * curvature, gradients[0])
        logits = logits.detach() - step
        values = values if soft_values else values.detach() - gradients[1] / visits
        if step.abs().max() < 1e-13:
            break
    if soft_values:
        values = tree.beta * (logits.logsumexp(-1) - tree.ref_logits.logsumexp(-1))
    return logits.log_softmax(-1), values

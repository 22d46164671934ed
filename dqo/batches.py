"""Episodes -> optimizer steps -> micro-batches. The shift by one, states before actions, happens here and nowhere else.

Attention runs on right-padded, length-sorted micro-batches (causal attention never looks right, so no mask is needed);
everything after it runs on the packed response rows only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dqo.episodes import Episode


@dataclass(frozen=True)
class Batch:
    """B episodes, N response rows. Row t is the state before action t."""

    input_ids: Tensor  # (B, L) right-padded
    states: Tensor  # (N,) index of each row's state in the flattened (B * L) positions
    end_states: Tensor  # (B,) the same for s_{T+1}, after the last action
    actions: Tensor  # (N,)
    cu_seqlens: Tensor  # (B+1,)
    columns: dict[str, Tensor]  # (N,) rewards, label, ref_logprobs, ...
    terminated: Tensor  # (B,) bool
    episodes: list[Episode]
    model_inputs: dict = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Real tokens, prompt and response."""
        return sum(e.length for e in self.episodes)


def _column(episodes: list[Episode], name: str) -> Tensor | None:
    pieces = [getattr(e, name) for e in episodes]
    if any(piece is None for piece in pieces):
        return None
    return torch.from_numpy(np.concatenate(pieces))


def collate(episodes: list[Episode], pad_id: int, device: torch.device | str = "cpu", packed: bool = False) -> Batch:
    """Right-pads the token ids and packs the rows of the responses."""
    longest = max(e.length for e in episodes)
    ids = np.full((len(episodes), longest), pad_id, dtype=np.int64)
    states = []
    for i, e in enumerate(episodes):
        ids[i, : e.length] = e.prompt_ids + e.completion_ids
        first = i * longest + len(e.prompt_ids) - 1  # the last prompt token is the state before the first action
        states.append(np.arange(first, first + len(e.completion_ids)))
    counts = np.array([len(e.completion_ids) for e in episodes])
    columns = {name: _column(episodes, name) for name in ("rewards", "ref_logprobs", "ref_lse", "behavior_logprobs")}
    columns["label"] = torch.from_numpy(np.repeat(np.array([e.label for e in episodes], np.float32), counts))
    actions = np.concatenate([e.completion_ids for e in episodes])

    def put(array):
        return torch.as_tensor(array).to(device)

    return Batch(
        input_ids=put(ids),
        states=put(np.concatenate(states)),
        end_states=put(np.array([i * longest + e.length - 1 for i, e in enumerate(episodes)])),
        actions=put(actions),
        cu_seqlens=put(np.concatenate([[0], counts.cumsum()])),
        columns={name: put(column) for name, column in columns.items() if column is not None},
        terminated=put(np.array([e.terminated for e in episodes])),
        episodes=episodes,
    )


def groups_of(episodes: list[Episode], size: int) -> list[list[Episode]]:
    """Episodes that stay together: singles, or pairs."""
    return [episodes[i : i + size] for i in range(0, len(episodes), size)]


def epoch_order(count: int, epoch: int, seed: int) -> list[int]:
    """The permutation of one epoch, from (seed, epoch) alone, so that a cursor is enough to resume."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


def micro_batch_plan(groups, world, max_tokens, packed):
    """TEMPORARY until the other part arrives"""
    ordered = sorted(groups, key=lambda group: max(e.length for e in group))
    ranks = [ordered[r::world] for r in range(world)]
    plans = []
    for mine in ranks:
        batches, current = [], []
        for g in mine:
            longest = max(e.length for e in g)
            if current and (sum(map(len, current)) + len(g)) * longest > max_tokens:
                batches.append([e for x in current for e in x])
                current = []
            current.append(g)
        if current:
            batches.append([e for x in current for e in x])
        plans.append(batches)
    most = max(map(len, plans))
    return [p + [None] * (most - len(p)) for p in plans]


def unit_count(groups: list[list[Episode]], unit: str) -> int:
    """What the loss of one optimizer step is divided by: response tokens, responses, or pairs."""
    if unit == "token":
        return sum(len(e.completion_ids) for group in groups for e in group)
    return len(groups)

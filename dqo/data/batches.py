"""Episodes -> optimizer steps -> micro-batches. The shift by one, states before actions, happens here and nowhere else.

A micro-batch is padded or packed. Padded: right-padded rows of like lengths (causal attention never looks right, so no mask is
needed). Packed: one row of all tokens, whose boundaries attention is told (dqo/models/attention.py). All that follows runs
on the packed response rows only, and the loss depends neither on the layout nor on the split.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from dqo.data.episode import Episode

Group = list[Episode]  # episodes that stay together: one, a pair, or a list
# Columns (N,) of a batch that are not the objective's; those in the second line come from the models, and q.
COLUMNS = {"rewards", "label", "group", "turn_end", "behavior_logprobs", "ref_logprobs", "ref_lse"}
COLUMNS |= {"values", "target_values", "bootstrap", "value_outputs", "value_range", "outcome_loss", "companion_mean"}
COLUMNS |= {"q", "step", "known"}


@dataclass(frozen=True)
class Batch:
    """B episodes, N response rows, one for each action. Row t is the state before action t."""

    input_ids: Tensor  # (B, L) right-padded, or (1, total) packed
    model_inputs: dict  # what a model's forward takes beside input_ids: nothing, or where the packed sequences are
    states: Tensor  # (N,) index of each row's state in the flattened positions of input_ids
    end_states: Tensor  # (B,) the same for s_{T+1}, after the last action
    actions: Tensor  # (N,)
    cu_seqlens: Tensor  # (B+1,)
    columns: dict[str, Tensor]  # (N,) rewards, label, ref_logprobs, ...
    terminated: Tensor  # (B,) bool
    episodes: list[Episode]
    sizes: list[int]  # episodes of each group, one group behind the other

    @property
    def tokens(self) -> int:
        """Real tokens, prompt and response."""
        return sum(e.length for e in self.episodes)

    @property
    def groups(self) -> list[Group]:
        ends = accumulate(self.sizes)
        return [self.episodes[end - size : end] for size, end in zip(self.sizes, ends)]

    @property
    def positions(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.input_ids.numel()


def _column(episodes: list[Episode], name: str) -> Tensor | None:
    pieces = [getattr(e, name) for e in episodes]
    if any(piece is None for piece in pieces):
        return None
    return torch.from_numpy(np.concatenate(pieces))


def packed_inputs(lengths: list[int], device: torch.device | str) -> dict:
    """What tells a model where sequences of these lengths begin: transformers' FlashAttentionKwargs and position ids."""
    boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)
    return {
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None].to(device),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def collate(
    episodes: list[Episode],
    pad_id: int,
    device: torch.device | str = "cpu",
    packed: bool = False,
    sizes: Sequence[int] | None = None,
) -> Batch:
    """Pads the token ids on the right, or packs them into one row, and packs the rows of the responses.

    Args:
        sizes: episodes of each group; None: each is a group.
    """
    sizes = [1] * len(episodes) if sizes is None else list(sizes)
    lengths = [e.length for e in episodes]
    ids = [e.prompt_ids + e.completion_ids for e in episodes]
    if packed:
        ids, offsets = [list(chain(*ids))], np.cumsum([0, *lengths[:-1]])
    else:
        longest = max(lengths)
        ids, offsets = [row + [pad_id] * (longest - len(row)) for row in ids], longest * np.arange(len(episodes))
    states = []
    for e, offset in zip(episodes, offsets):
        # the token before an action is its state: of the first the last prompt token, after the environment its last one
        states.append(offset + len(e.prompt_ids) - 1 + e.actions)
    counts = np.array([e.action_count for e in episodes])
    names = ("rewards", "turn_end", "ref_logprobs", "ref_lse", "behavior_logprobs")
    columns = {name: _column(episodes, name) for name in names}
    columns["label"] = torch.from_numpy(np.repeat(np.array([e.label for e in episodes], np.float32), counts))
    columns["group"] = torch.from_numpy(np.repeat(np.repeat(np.arange(len(sizes)), sizes), counts))
    for name in episodes[0].columns:
        if all(name in e.columns for e in episodes):  # companions, which the reference sees too, have none
            columns[name] = torch.from_numpy(np.concatenate([e.columns[name] for e in episodes]))
    actions = np.concatenate([e.action_ids for e in episodes])

    def put(array):
        return torch.as_tensor(array).to(device)

    return Batch(
        input_ids=put(np.array(ids, dtype=np.int64)),
        model_inputs=packed_inputs(lengths, device) if packed else {},
        states=put(np.concatenate(states)),
        end_states=put(offsets + np.array(lengths) - 1),
        actions=put(actions),
        cu_seqlens=put(np.concatenate([[0], counts.cumsum()])),
        columns={name: put(column) for name, column in columns.items() if column is not None},
        terminated=put(np.array([e.terminated for e in episodes])),
        episodes=episodes,
        sizes=sizes,
    )


@dataclass(frozen=True)
class Batching:
    """How episodes become batches of a model."""

    pad_id: int
    max_tokens: int  # positions of a batch, padding included; a group that alone has more is a batch of its own
    device: torch.device | str = "cpu"
    packed: bool = False  # as the model's attention takes them (dqo.models.attention)

    def collate(self, episodes: list[Episode], sizes: Sequence[int] | None = None) -> Batch:
        return collate(episodes, self.pad_id, self.device, self.packed, sizes)


def groups_of(episodes: list[Episode], size: int) -> list[Group]:
    """Runs of `size` episodes."""
    return [episodes[i : i + size] for i in range(0, len(episodes), size)]


def distinct(groups: Sequence[Group]) -> Sequence[Episode]:
    """The episodes of all groups, each once: pairs may share responses."""
    made = getattr(groups, "distinct", None)  # of groups that are made when they are read
    return list({id(e): e for group in groups for e in group}.values()) if made is None else made()


def epoch_order(count: int, epoch: int, seed: int) -> np.ndarray:
    """The permutation of one epoch, from (seed, epoch) alone, so that a cursor is enough to resume."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def _tokens(group: Group) -> int:
    return sum(e.length for e in group)


def _longest(group: Group) -> int:
    return max(e.length for e in group)


def positions_of(groups: list[Group], packed: bool) -> int:
    """What a micro-batch of these groups computes."""
    if packed:
        return sum(_tokens(group) for group in groups)
    return sum(len(group) for group in groups) * max(_longest(group) for group in groups)


def _filled(groups: list[Group], max_tokens: int, packed: bool) -> list[list[Group]]:
    """Groups in micro-batches of at most `max_tokens` positions; a group that alone has more is a micro-batch of its own."""
    batches: list[list[Group]] = []
    if not packed:  # in order of length, to save padding, the longest first, so that memory runs out at once or never
        held, longest = 0, 0
        for group in sorted(groups, key=_longest, reverse=True):
            if not batches or (held + len(group)) * longest > max_tokens:
                batches.append([])
                held, longest = 0, _longest(group)
            batches[-1].append(group)
            held += len(group)
        return batches
    # The largest first, each into the fullest batch that still holds it (best fit decreasing).
    room: list[tuple[int, int]] = []  # (positions left, index of the batch), sorted
    for group in sorted(groups, key=_tokens, reverse=True):
        tokens = _tokens(group)
        fits = bisect_left(room, (tokens, 0))
        if fits < len(room):
            left, index = room.pop(fits)
        else:
            left, index = max_tokens, len(batches)
            batches.append([])
        batches[index].append(group)
        insort(room, (left - tokens, index))
    return batches


def dealt(groups: list[Group], world: int) -> list[list[Group]]:
    """Each process's part of an optimizer step: the largest groups first, each to the process with the fewest tokens, so that no
    two differ by more than one group's."""
    shares: list[list[Group]] = [[] for _ in range(world)]
    tokens = [0] * world
    for group in sorted(groups, key=_tokens, reverse=True):
        rank = tokens.index(min(tokens))
        shares[rank].append(group)
        tokens[rank] += _tokens(group)
    return shares


def micro_batch_plan(
    groups: list[Group], world: int, max_tokens: int, packed: bool = False
) -> list[list[list[Group] | None]]:
    """The micro-batches of every process, the same number for all, largest first, so that those run together are alike.

    A process with fewer splits its largest; where there is nothing left to split the rest are None: an empty pass.
    """
    plans = [_filled(part, max_tokens, packed) for part in dealt(groups, world)]
    count = max(len(plan) for plan in plans)
    result = []
    for plan in plans:
        while len(plan) < count and any(len(batch) > 1 for batch in plan):
            # the largest with two groups or more
            at = max(range(len(plan)), key=lambda i: (len(plan[i]) > 1) * positions_of(plan[i], packed))
            largest = plan.pop(at)
            half = len(largest) // 2
            plan += [largest[:half], largest[half:]]
        plan.sort(key=lambda batch: positions_of(batch, packed), reverse=True)
        result.append([*plan, *[None] * (count - len(plan))])
    return result


def unit_count(groups: list[Group], unit: str) -> int:
    """What the loss of one optimizer step is divided by: response tokens, responses, or groups."""
    if unit == "token":
        return sum(e.action_count for group in groups for e in group)
    return len(groups) if unit == "group" else sum(map(len, groups))

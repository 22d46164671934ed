"""Which labels a run has asked for: those of an objective that `asks`, counted once each, kept in the checkpoints."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqo.data.batches import Batch, Group
from dqo.objectives.base import Objective
from dqo.processes import Processes, gather_objects

_BYTES = 8  # of a question's name: two of a million questions share one with a chance of 3e-8


class Asked:
    """The questions of a run so far. A question is the responses of a group, whatever their order: equal groups are one.

    Args:
        stored: what `stored` gave, of a run that goes on.
    """

    def __init__(self, objective: Objective, stored: dict[str, Any] | None = None):
        self.objective = objective
        names = base64.b64decode(stored["questions"]) if stored else b""
        self.questions = {names[i : i + _BYTES] for i in range(0, len(names), _BYTES)}
        self.pseudo_labels: int = stored["pseudo_labels"] if stored else 0
        self._new: list[
            tuple[bytes, bool]
        ] = []  # of the step that is being made: unknown questions, and whether each is asked

    def begin(self) -> None:
        """Before a step, or before another try at it."""
        self._new = []

    def put_known(self, batch: Batch) -> None:
        """Adds the column known: 1 on every row of a group whose label was asked in an earlier step."""
        if not self.objective.asks:
            return
        known = torch.tensor([question(group) in self.questions for group in batch.groups])
        actions = torch.tensor([sum(e.action_count for e in group) for group in batch.groups])
        rewards = batch.columns["rewards"]
        batch.columns["known"] = known.to(rewards).repeat_interleave(actions.to(rewards.device))

    def note(self, batch: Batch, asked: Tensor) -> None:
        """`asked`: (groups,) bool of this micro-batch."""
        named = zip(map(question, batch.groups), asked.tolist(), strict=True)
        self._new += [(name, it_is) for name, it_is in named if name not in self.questions]

    def settle(self, processes: Processes) -> dict[str, int]:
        """After a step: the counts of all processes so far, {} of an objective that asks nothing. All of them must call it."""
        if not self.objective.asks:
            return {}
        new = gather_objects(self._new, processes)
        self.questions |= {name for name, asked in new if asked}
        self.pseudo_labels += sum(not asked for _, asked in new)
        return {"queries": len(self.questions), "pseudo_labels": self.pseudo_labels}

    def stored(self) -> dict[str, Any]:
        """For the state of a checkpoint."""
        if not self.objective.asks:
            return {}
        names = base64.b64encode(b"".join(sorted(self.questions))).decode()
        return {"asked": {"questions": names, "pseudo_labels": self.pseudo_labels}}


def question(group: Group) -> bytes:
    """The name of what is asked of these responses to one prompt."""
    digest = hashlib.blake2b(digest_size=_BYTES)
    responses = (
        np.asarray(e.completion_ids, np.int64).tobytes() + (b"" if e.env_mask is None else e.env_mask.tobytes())
        for e in group
    )
    for part in [np.asarray(group[0].prompt_ids, np.int64).tobytes(), *sorted(responses)]:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()

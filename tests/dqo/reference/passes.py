"""A reference pass whose model is counted, for the tests of its numbers and of its limits."""

import numpy as np

from dqo.data.batches import Batching
from dqo.models.policy import policy_stats
from dqo.processes import Processes
from dqo.reference import columns as reference
from dqo.reference.cache import ReferenceId
from tests.dqo.helpers import episodes, policy

IDENTITY = ReferenceId(weights="w", architecture="a", dtype="float32", softcap=None)
ALONE = Processes()
PER_BATCH = 40  # padded tokens; a few responses


class Counting:
    """A reference that counts its forward passes and the responses it is asked for, and may stop before one of them."""

    def __init__(self, model=None, stop_at=None):
        self.model, self.stop_at = model or policy(), stop_at
        self.batches = []

    def __call__(self, batch):
        if len(self.batches) == self.stop_at:
            raise KeyboardInterrupt
        self.batches.append([e.source for e in batch.episodes])
        return policy_stats(self.model, batch)

    @property
    def responses(self):
        return [source for batch in self.batches for source in batch]


def fresh(count=20, seed=0):
    return episodes(count, seed=seed, reference=False)


def add(members, stats_of, cache=None, processes=ALONE, max_tokens=PER_BATCH):
    return reference.add_reference(members, stats_of, Batching(0, max_tokens), processes, cache)


def columns(members):
    return [(e.ref_logprobs, e.ref_lse) for e in members]


def same(left, right):
    return all(np.array_equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other))

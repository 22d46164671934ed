"""The demonstrations' author as a policy: a backend whose pass rates are known exactly."""

import random

from dqo.data.ends import ends_of
from dqo.models.generate import Response
from tests.dqo.helpers import tokenizer


class Demonstrator:
    """`asked` counts its responses. It fails at number `fails_at`, as if it were killed."""

    def __init__(self, task, fails_at=None):
        self.task, self.fails_at, self.asked = task, fails_at, 0
        self.tokenizer = tokenizer()
        self.ends = ends_of(self.tokenizer)
        self.record = {"backend": "demonstrator"}

    def generate(self, requests, sampling, *, description="", quiet=False):
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        for i in order:
            if self.asked == self.fails_at:
                raise KeyboardInterrupt
            self.asked += 1
            text = self.tokenizer.decode(requests[i].prompt_ids)
            ids = self.tokenizer(self._goes_on(text, random.Random(str((sampling.seed, *requests[i].key)))))[
                "input_ids"
            ]
            ids = [*ids, self.ends.trained][: sampling.max_new_tokens]
            yield i, Response(ids, [0.0] * len(ids), ids[-1] == self.ends.trained)

    def _goes_on(self, text, rng):
        first, _, begun = text.partition("=")
        done = begun.count("\n")
        value, rest = (begun[-2] if begun else first[0]), first[1 + 2 * done :]
        return self.task.demonstration(f"{value}{rest}=", rng) if rest else f"#{value}"

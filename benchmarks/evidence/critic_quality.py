"""What a critic knows of responses that it was not fitted to: how much of the outcome, and which step was the wrong one.

Values are V(s_1), ..., V(s_T) of each response, the states before its T tokens. Scores are one number a token. Both are (T,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dqo.credit.quality import Judged, quality_of
from dqo.data.episode import Episode
from dqo.grading.arith import ArithTask
from dqo.stats import auc


def explained_variance(predicted: np.ndarray, observed: np.ndarray) -> float:
    """1 - var(observed - predicted) / var(observed), of (N,) each: 1 is all of it, 0 no more than a constant."""
    return float(1 - np.var(observed - predicted) / np.var(observed))


def quality_of_values(values: Sequence[np.ndarray], episodes: Sequence[Episode]) -> dict[str, float | None]:
    """Explained variance of the outcome and AUC, in the first state, in the middle, and before the last token; what V is there on
    the mean of right and wrong responses; and what the changes of V say of the steps, see `quality_of_scores`."""
    rewards, labels = np.array([e.reward for e in episodes]), np.array([e.label for e in episodes])
    at = {
        "start": np.array([v[0] for v in values]),
        "half": np.array([v[math.ceil(len(v) / 2) - 1] for v in values]),
        "end": np.array([v[-1] for v in values]),
    }
    found: dict[str, float | None] = {}
    for place, there in at.items():
        found[f"explained_variance/{place}"] = explained_variance(there, rewards)
        found[f"auc/{place}"] = auc(there, labels)
    lengths = [len(v) for v in values]
    found["explained_variance/all"] = explained_variance(np.concatenate(list(values)), np.repeat(rewards, lengths))
    found["mean/right"], found["mean/wrong"] = float(at["end"][labels].mean()), float(at["end"][~labels].mean())
    changes = [np.diff(v, append=v[-1:]) for v in values]  # by each token; what the last one changes is not known
    return found | {f"changes/{name}": value for name, value in quality_of_scores(changes, episodes).items()}


def quality_of_scores(scores: Sequence[np.ndarray], episodes: Sequence[Episode]) -> dict[str, float | None]:
    """AUC of the sums, over all responses and within a prompt; the share of responses whose lowest step is the first wrong one,
    and that of a drawn step; each with the bounds of its interval."""
    judged = [Judged(e.prompt_index, e.label, s, e.step_ends, e.first_wrong_step) for s, e in zip(scores, episodes)]
    found: dict[str, float | None] = {}
    for name, interval in quality_of(judged)._asdict().items():
        found |= {name: None, f"{name}/low": None, f"{name}/high": None}
        if interval is not None:
            found |= {name: interval.mean, f"{name}/low": interval.low, f"{name}/high": interval.high}
    return found


def pass_rates(task: ArithTask, prompt: str, completion: str) -> np.ndarray:
    """V of a critic that knows all: the exact chance that a demonstration which goes on from here is right.

    Returns:
        (T,) of the states of a response that ended, whose T - 1 characters are tokens. A line counts from its digit on, one that
        is only begun not at all.
    """
    rates: dict[str, float] = {}
    found = []
    for t in range(len(completion) + 1):
        text = completion[:t]
        line = text.rpartition("\n")[2]
        known = text if len(line) == (2 if line.startswith("#") else len("1+2=3")) else text.removesuffix(line)
        if known not in rates:
            rates[known] = task.pass_rate(prompt, known)
        found.append(rates[known])
    return np.array(found)

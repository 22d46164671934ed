"""What tokens are coloured by: the views of an inspection, their scales, and the numbers of their steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dqo.credit.steps import step_index, step_sums

LEVELS = 5  # of colour, for each sign
_COMMON = 0.98  # the share of tokens within the scale: one outlier would leave all others without colour


@dataclass(frozen=True)
class View:
    """A number of each token. `summed`: a step's number is their sum, else their mean."""

    title: str
    formula: str
    how_to_read: str
    summed: bool
    least: float = 0.0  # the full colour stands for no less than this


VIEWS = {
    "advantage": View(
        "advantage",
        "β·log(π/ref)",
        "What the token is worth beside the others that could stand there, Q − V: blue tokens became more likely than under the "
        "reference, orange ones less. A step's number is the sum of its tokens.",
        True,
    ),
    "soft_value": View(
        "soft value",
        "β·(logsumexp − logsumexp of the reference)",
        "The value before the token that the logits hold. It means something only where a loss ties the logits' level down, as "
        "with value_model none. A step's number is the mean of its tokens.",
        False,
    ),
    "value": View(
        "value model",
        "V",
        "The outcome that the value model expects before the token. A step's number is the mean of its tokens.",
        False,
        least=1.0,
    ),
    "kl": View(
        "KL",
        "KL(π ‖ ref), exact",
        "How far the policy's choice at this place is from the reference's, over all tokens of the vocabulary, in nats. A step's "
        "number is the sum of its tokens.",
        True,
    ),
}


def scale_of(view: View, columns: Iterable[np.ndarray]) -> float:
    """The size that has the full colour: nearly the largest of all tokens that are shown, so that responses compare."""
    sizes = np.abs(np.concatenate([np.zeros(1), *columns]))
    found = float(np.quantile(sizes, _COMMON, method="higher"))
    return max(found, view.least) or 1.0


def levels(values: np.ndarray, scale: float) -> np.ndarray:
    """(T,) int in [-LEVELS, LEVELS]: the colour of each token; 0, none, below half a level."""
    return np.clip(np.rint(np.nan_to_num(values) / scale * LEVELS), -LEVELS, LEVELS).astype(int)


def step_numbers(view: View, values: np.ndarray, step_ends: list[int]) -> np.ndarray:
    """(S,) the number of each step; an empty step has 0."""
    sums = step_sums(values, step_ends)
    if view.summed or not len(sums):
        return sums
    return sums / np.maximum(np.bincount(step_index(step_ends, len(values)), minlength=len(sums)), 1)


def number_text(name: str, number: float) -> str:
    """A number of a view, with three digits; an advantage has its sign, unless it rounds to 0."""
    text = f"{number:+.3f}" if name == "advantage" else f"{number:.3f}"
    return f"{0:.3f}" if float(text) == 0 else text

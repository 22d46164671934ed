"""Warnings of rows that are allowed but probably wrong, or from which a method learns little; `dqo check` gives them too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dqo.credit.steps import wrong_mark
from dqo.data.marks import Marks
from dqo.data.mixed import names_of, sources_of
from dqo.data.rows import Row
from dqo.data.stored import FINISHES, column, paid_by_turns, process_rewards, several
from dqo.data.together import check_contrast, duplicate_count
from dqo.errors import UserError
from dqo.objectives.base import Objective

_UNENDED = 0.1  # share of responses that did not end, from which on it is worth a warning
LARGEST_RATIO = 200.0  # nats, see _magnitude


def row_warnings(rows: Sequence[Row], settings: Any, objective: Objective | None = None) -> list[str]:
    """Warnings, one line each.

    Args:
        settings: has truncation, process_reward, process_coef, reward_scale and reward_shift, as options of training.
        objective: None where the method is not known: then the warnings are those of any method.

    Raises:
        UserError: when all rewards are equal and the objective needs different ones.
    """
    found = [
        *_contrast(rows, objective),
        *_labels(rows),
        *_duplicates(rows),
        *_unended(rows, settings.truncation),
        *_step_rewards(rows, settings.process_reward),
    ]
    if objective is None:
        return found
    if objective.fits_rewards:
        found += _magnitude(rows, settings, getattr(objective, "beta", 1.0))
    if objective.reads_steps:
        found += _marks(rows, settings.process_reward, objective.reads_steps)
    return found + objective.advice(column(rows, "label").tolist(), column(rows, "reward"))


def _contrast(rows: Sequence[Row], objective: Objective | None) -> list[str]:
    if objective is not None:  # some may train on right responses alone
        contrast = check_contrast(rows) if objective.needs_contrast else ""
        return [contrast] * bool(contrast)
    try:
        contrast = check_contrast(rows)
    except UserError as error:
        contrast = str(error)
    if contrast:
        return [contrast]
    if several(column(rows, "prompt"), column(rows, "label"))[1]:
        return []
    return ["no prompt has both a correct and a wrong response: methods that go by labels find no contrast"]


def _labels(rows: Sequence[Row]) -> list[str]:
    label, reward = column(rows, "label"), column(rows, "reward")
    if label.all() or not label.any() or reward[label].mean() >= reward[~label].mean():
        return []
    return [
        f"responses that count as correct have a mean reward of {reward[label].mean():.3g}, and the others "
        f"{reward[~label].mean():.3g}: what goes by labels learns the opposite of what goes by rewards; is label right, or "
        "--reward_threshold?"
    ]


def _duplicates(rows: Sequence[Row]) -> list[str]:
    repeated = duplicate_count(rows)
    return [f"{repeated:,} of {len(rows):,} rows repeat another row's prompt and completion"] * bool(repeated)


def _unended(rows: Sequence[Row], truncation: str) -> list[str]:
    cut = float((column(rows, "finish_reason") == FINISHES.index("length")).mean())
    if cut <= _UNENDED or truncation != "terminal":
        return []
    return [
        f"{cut:.1%} of the responses did not end; --truncation terminal pays them as they are, bootstrap and drop do not"
    ]


def _step_rewards(rows: Sequence[Row], process_reward: str | None) -> list[str]:
    paid = process_rewards(rows)
    if process_reward == "additive" and len(paid) and not paid.any():
        return ["every step reward is 0: --process_reward additive pays nothing for steps"]
    of_steps = paid[~paid_by_turns(rows)]
    if process_reward == "additive" and wrong_mark(of_steps.tolist()) == "zero":
        return [
            "step rewards are from 0 to 1: --process_reward additive pays every step that is not wrong, so that longer "
            "responses earn more. Write labels as 0 for a right step and -1 for a wrong one; pass rates are for potential"
        ]
    values = column(rows, "prompt_value")
    paid = np.concatenate([paid, values[~np.isnan(values)]])
    outside = int((~((paid >= 0) & (paid <= 1))).sum())
    if process_reward == "potential" and outside:
        return [
            f"{outside:,} of {len(paid):,} step rewards are outside of [0, 1]: --process_reward potential takes them for pass "
            "rates of the prefixes; for rewards of steps choose additive"
        ]
    return []


def _marks(rows: Sequence[Row], process_reward: str | None, option: str) -> list[str]:
    """What is odd about the marks of wrong steps, for a method whose `option` goes by them."""
    marks = Marks.of_rows(rows, process_reward)
    wrong, of_turns = marks.wrong_steps(rows), paid_by_turns(rows)
    if not wrong.any():
        return [f"no step is marked as wrong: {option} takes whole correct responses"]
    found = []
    numbers, counts = process_rewards(rows), np.maximum(column(rows, "paid"), 0)
    measured = process_reward == "potential" or not np.isnan(column(rows, "prompt_value")).all()
    if marks.steps == "zero" and (measured or not np.isin(numbers[~of_turns], (0, 1)).all()):
        found.append(
            f"step rewards are pass rates: {option} takes a step for wrong behind which no continuation was right, which may "
            "happen to a right one too"
        )
    row_of = np.repeat(np.arange(len(counts)), counts)
    first = np.full(len(counts), -1)  # wrong step of each row
    places = np.flatnonzero(wrong)[::-1]
    first[row_of[places]] = (places - (counts.cumsum() - counts)[row_of[places]]).astype(int)
    labelled = np.unique(row_of[~of_turns])
    if (first[labelled] == 0).all():
        found.append(
            "the first step of every response is marked as wrong, and nothing stands before it: are labels turned over?"
        )
    _, copy_of = np.unique(column(rows, "same")[labelled], return_inverse=True)
    differ = len(np.unique(np.stack([copy_of, first[labelled]]), axis=1).T) - len(np.unique(copy_of))
    if differ:
        found.append(f"equal responses have different first wrong steps, {differ:,} in all: labels are not certain")
    sources = sources_of(rows)[row_of]
    for i, name in enumerate(names_of(rows)):
        own = wrong_mark(numbers[(sources == i) & ~of_turns].tolist(), measured)
        if own not in ("none", marks.steps):
            found.append(
                f"{name} marks a wrong step by 0, and other data sets by a number below 0: none of its steps counts as wrong. "
                "Write -1 and 0 in the place of 0 and 1"
            )
    return found


def _magnitude(rows: Sequence[Row], settings: Any, beta: float) -> list[str]:
    """At the optimum log(pi/ref) of a response is (R - V)/beta, and until V has learned it is asked to be R/beta. A policy can
    raise it to -log ref at most, one nat a token or less for a response that the reference may write: some hundred nats."""
    rewards = column(rows, "reward")
    if normalised := getattr(settings, "normalize_rewards", False):
        paid = (rewards - rewards.mean()) / max(float(rewards.std()), 1e-12)
    else:
        paid = settings.reward_scale * rewards + settings.reward_shift
    if settings.process_reward == "additive":
        counts = np.maximum(column(rows, "paid"), 0)
        row_of = np.repeat(np.arange(len(counts)), counts)
        paid = paid + settings.process_coef * np.bincount(row_of, process_rewards(rows), len(counts))
    largest = float(np.abs(paid).max())
    if largest / beta <= LARGEST_RATIO:
        return []
    cure = "" if normalised else f"scale the rewards (--reward_scale {settings.reward_scale / largest:.2g}) or "
    return [
        f"a response is paid up to {largest:,.4g}, which with beta {beta:g} asks for log(pi/ref) of {largest / beta:,.4g} nats, "
        f"more than a policy can move; {cure}raise --beta"
    ]

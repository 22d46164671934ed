"""Importance weights of a run: which were chosen, what they leave of the data before the first step, and when they collapse.

They are probabilities of the responses under the policy over those under the policy that wrote them. One that moves away from its
data lowers all of them, and the weighted loss with them: it nears 0 whether or not anything is learnt.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dqo.config.options import Options, TrainConfig
from dqo.data.behavior import Known, ReferenceName, known_behavior, not_of_reference, weight_level, weights_line
from dqo.data.episode import Episode
from dqo.data.joined import parts_of
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.models.identity import model_identity
from dqo.models.named import load_config
from dqo.objectives.base import Objective
from dqo.train.inputs import Given
from dqo.train.metrics import Weights
from dqo.train.resume import stored_derived

logger = logging.getLogger(__name__)

LEAST = 0.05  # of the mean importance weight, and of the effective share
WARNED_AFTER, STOPPED_AFTER = 3, 10  # steps in a row below LEAST
FAR = 0.1  # nats a token on average: two computations of one distribution, in other dtypes and programs, are nearer


@dataclass(frozen=True)
class Weighting:
    """`objective`: with the level that was chosen. `line`: what is said of it; "" where the method has no importance weights."""

    objective: Objective
    line: str = ""
    at_start: Weights | None = (
        None  # of all responses before the first step; None where there are none, or it is not known
    )

    @property
    def said(self) -> str:
        if self.at_start is None:
            return self.line
        share, mean = self.at_start
        return f"{self.line}; at step 0 {share:.1%} of them are effective, mean weight {mean:.3g}"

    def record(self, option: str) -> dict | None:
        """For run.json."""
        if not self.line:
            return None
        found = {"is_level": self.objective.weight_level, "option": option, "said": self.said}
        return found | {"at_start": None if self.at_start is None else self.at_start._asdict()}


def reference_name(options: Options, given: Given) -> ReferenceName:
    """The reference policy, by the names that rows may have for it."""
    config = options.train
    path = config.ref_model_name_or_path or config.model_name_or_path
    if path is None or given.ref_model is not None or (given.model is not None and not config.ref_model_name_or_path):
        return ReferenceName(None, lambda: None)  # an object may be another model than the files of its name
    return ReferenceName(path, lambda: model_identity(path, load_config(path)))


def chosen(options: Options, rows: Sequence[Row], reference: ReferenceName) -> Weighting:
    """The objective as it trains on these rows: with is_level auto by what they tell, or as the run that goes on had it."""
    objective = options.objective
    option = objective.weight_level
    if not hasattr(objective, "is_level"):
        return Weighting(objective)
    behavior = known_behavior(rows, reference)
    level = weight_level(option, behavior)
    then = stored_derived(options.train).get("is_level")
    if option == "auto" and then not in (None, level):
        level, behavior = then, Known(behavior.known, "the run that goes on has chosen so")
    if option == "auto":
        objective = dataclasses.replace(objective, is_level=level)  # type: ignore[call-arg]  # the subclass has it
    return Weighting(objective, weights_line(option, level, behavior))


def at_start(weighting: Weighting, option: str, episodes: Sequence[Episode]) -> Weighting:
    """What the weights leave of the data before the first step; is_level auto takes none where that is next to nothing, as it is
    where another model wrote the responses, or this one at a low temperature. `option`: is_level as it was given."""
    found = weights_at_start(weighting.objective, episodes)
    if found is None or option != "auto" or min(found) >= LEAST:
        return dataclasses.replace(weighting, at_start=found)
    objective = dataclasses.replace(weighting.objective, is_level="none")  # type: ignore[call-arg]
    why = f"at step 0 weights of whole responses would have a mean of {found.mean:.2g} and an effective share of"
    return Weighting(objective, f"importance weights: none (is_level auto), because {why} {found.effective_share:.1%}")


def weights_at_start(objective: Objective, episodes: Sequence[Episode]) -> Weights | None:
    """Of the reference, with which a run begins; None where the objective weighs nothing."""
    total = torch.zeros(3, dtype=torch.float64)
    for begin in range(0, len(episodes), 1024):
        members = episodes[begin : begin + 1024]
        ratios = [np.zeros(e.action_count, np.float32) if e.behavior_logprobs is None else _ratio(e) for e in members]
        boundaries = np.cumsum([0, *(e.action_count for e in members)])
        found = objective.weights(torch.from_numpy(np.concatenate(ratios)), torch.from_numpy(boundaries))
        if found is None:
            return None
        found = found.double()
        total += torch.stack([found.sum(), found.square().sum(), found.new_tensor(float(found.numel()))])
    first, second, count = total.tolist()
    return Weights.of(first / count, second / count)


def _ratio(e: Episode) -> np.ndarray:
    """(T,) log-probabilities of the reference less those that are stored."""
    assert e.ref_logprobs is not None and e.behavior_logprobs is not None
    return e.ref_logprobs - e.behavior_logprobs


def check_behavior(
    objective: Objective, episodes: Sequence[Episode], rows: Iterable[Row], reference: ReferenceName
) -> None:
    """Looks whether stored log-probabilities are near the reference's.

    Raises:
        UserError: where they are far away, weights are made of them, and `sampling` says that the reference wrote the rows.
    """
    total, count, largest, worst = 0.0, 0, -1.0, ""
    for part in parts_of(episodes):
        if part[0].behavior_logprobs is None:  # all rows of a file have them, or none
            continue
        for e in part:
            gaps = np.abs(_ratio(e))
            total, count = total + float(gaps.sum(dtype=np.float64)), count + len(gaps)
            if (mean_gap := float(gaps.mean())) > largest:
                largest, worst = mean_gap, e.source
    if not count or (mean := total / count) <= FAR:
        return
    said = f"logprobs in the file differ from the reference policy's by {mean:.2f} nats a token on average (most in {worst})"
    if objective.weight_level != "none" and not_of_reference(rows, reference) is None:
        raise UserError(
            f"{said}, and sampling names that very policy, at temperature 1: weights made of them would be wrong. Were they "
            "made by other weights, or with another chat template? Store those of this model, or leave the column logprobs "
            "out, or train without weights: --is_level none"
        )
    use = "No weights are made of them" if objective.weight_level == "none" else "Importance weights are made from them"
    logger.warning(
        "%s: another sampler, or processed (temperature, top-p) rather than raw log-probabilities? %s", said, use
    )


def _few_have_all(weights: Weights) -> bool:
    """Whether the effective share is small because some weights are large, not because most are next to 0.

    mean / share is the mean of w over samples that count as often as w says. The default cap keeps it at e or below. Without a
    cap it was 1,000 on chains of 30 tokens with beta 0.002 (mean 17, share 1.7 %), where the policy went on learning, less well.
    """
    return LEAST > weights.effective_share > 0 and weights.mean > max(LEAST, math.e * weights.effective_share)


class Collapse:
    """Looks at the importance weights of every step in which the policy is trained.

    Below LEAST a step learns from a twentieth of its data or less. On the demonstration the mean stays above 0.6 and the share
    above 0.4. At ten times its learning rate, where the policy is lost, both are below LEAST after 14 steps, and the mean is 1e-8
    ten steps later.
    """

    def __init__(self, config: TrainConfig, cap: float | None = None):
        self.config, self.cap = config, cap
        self.steps = self.few = 0  # in a row: steps with weights that collapse, and with few that have all the weight

    def note(self, step: int, weights: Weights | None) -> str | None:
        """A warning, once they are below. `step`: counted from 1."""
        if weights is None:
            return None
        few = _few_have_all(weights)
        self.steps = self.steps + 1 if min(weights) < LEAST and not few else 0
        self.few += few
        if few and self.few == WARNED_AFTER:
            cap = "none" if self.cap is None else f"{self.cap:g}"
            return (
                f"a few samples have nearly all importance weight: {self._told(step, weights)}. Each step learns from those "
                f"alone. Bound the log weight with --is_cap 1 (now {cap}), or raise --beta"
            )
        if self.steps != WARNED_AFTER:
            return None
        return (
            f"the importance weights collapse: {self._told(step, weights)}. The loss is small because the policy has left "
            f"its data. The run stops if this goes on for {STOPPED_AFTER - WARNED_AFTER} steps more"
        )

    def stop(self, step: int, weights: Weights | None) -> str | None:
        """Why the run ends here, and what to change; None where it goes on."""
        if weights is None or self.steps < STOPPED_AFTER:
            return None
        return (
            f"the importance weights have collapsed for {self.steps} steps: {self._told(step, weights)}. The loss is small "
            "because the policy has left its data, and nothing is learnt any more. Train into another --output_dir with a lower "
            f"--learning_rate (now {self.config.learning_rate:g}), a higher --beta, or weights that cannot collapse: a floor "
            "such as --is_floor -1, or --is_level none"
        )

    def _told(self, step: int, weights: Weights) -> str:
        return f"at step {step} their mean is {weights.mean:.2g} and {weights.effective_share:.1%} are effective"

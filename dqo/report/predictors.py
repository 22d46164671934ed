"""What is known of scores on held-out responses: whether they tell right ones from wrong ones, and find the first wrong step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dqo.credit.quality import Steps, auc_within_prompt, chance_of_wrong, lowest_is_wrong
from dqo.credit.steps import highest_half
from dqo.report.groups import Groups
from dqo.report.schema import Chance, Predictor
from dqo.stats import Interval, auc_interval

INITIAL = "initial model"  # whose scores need no training
IMPLICIT, IMPLICIT_BEFORE = "Implicit reward, log(π/ref)", "Implicit reward before the last token"
VALUE, VALUE_HALF = "Value model before the last token", "Value model half-way through a response"
LIKELIHOOD, CERTAINTY = "Likelihood of a response, a token", "Low entropy, a token"


@dataclass(frozen=True)
class Score:
    """Of every held-out response, and of each of its steps where there are any: low where it blames."""

    name: str
    method: str  # INITIAL for what needs no training, "" for what needs no model
    totals: Sequence[float]
    steps: Sequence[Sequence[float]] | None = None


def held_out_of(groups: Groups, headline: str) -> dict[str, Any]:
    """The sections of the page that held-out responses tell: predictors, chance, and the value model."""
    found: dict[str, Any] = {}
    predictors: list[Predictor] = []
    for name in [headline, *(name for name in groups if name != headline)]:
        run = next((run for run in groups[name] if run.held_out), None)
        if run is None:
            continue
        rows = run.held_out
        predictors += predictors_of(name, rows, with_baselines=not predictors)
        if "chance" not in found and (chance := chance_of(rows)) is not None:
            found["chance"] = chance
        if "value_traces" not in found and (traces := run.record.get("value_traces")):
            found["value_traces"] = traces
        predicted, observed = [row.get("value_start", math.nan) for row in rows], [row["reward"] for row in rows]
        if "value_auc" not in found and all(map(math.isfinite, predicted + observed)):
            found["value_calibration"] = {"predicted": predicted, "observed": observed}
            of_values = {p["name"]: p for p in predictors if p["method"] == name}
            if (end := of_values.get(VALUE)) is not None:
                half = of_values.get(VALUE_HALF)
                found["value_auc"] = {"at_end": end["auc"], "at_half": half["auc"] if half else None, "n": end["n"]}
                found["value_auc"] |= {"interval": end["interval"]}
    return found | ({"predictors": predictors} if predictors else {})


def predictors_of(method: str, rows: list[dict], with_baselines: bool) -> list[Predictor]:
    """What a method's scores know of the responses in its held_out.jsonl; with those that need no training, the same for all."""
    found = [_predictor(score, rows) for score in _scores(method, rows, with_baselines)]
    return [predictor for predictor in found if predictor is not None]


def _scores(method: str, rows: list[dict], with_baselines: bool) -> list[Score]:
    def column(name: str) -> list:
        return [row[name] for row in rows]

    has = rows[0].keys()
    lengths = np.array(column("length"))
    found = []
    if "ratio" in has:
        found.append(Score(IMPLICIT, method, column("ratio"), column("step_ratios")))
        before = [
            [*row["step_ratios"][:-1], row["step_ratios"][-1] - row["ratio"] + row["ratio_before_last"]]
            if row["step_ratios"]
            else []
            for row in rows
        ]
        found.append(Score(IMPLICIT_BEFORE, method, column("ratio_before_last"), before))
    elif "ref_logps" in has:  # of a run that kept no more
        found.append(Score(IMPLICIT, method, [row["logps"] - row["ref_logps"] for row in rows]))
    if "value_end" in has:
        found.append(Score(VALUE, method, column("value_end"), column("step_values") if "step_values" in has else None))
        found.append(Score(VALUE_HALF, method, column("value_half")))
    if "logps" in has:
        found.append(Score(LIKELIHOOD, method, (np.array(column("logps")) / lengths).tolist()))
    if with_baselines and "start_logps" in has:
        logprobs, entropies = column("start_step_logprobs"), column("start_step_entropies")
        certain = [[-entropy for entropy in step] for step in entropies]
        found.append(Score(LIKELIHOOD, INITIAL, (np.array(column("start_logps")) / lengths).tolist(), logprobs))
        found.append(Score(CERTAINTY, INITIAL, (-np.array(column("start_entropy")) / lengths).tolist(), certain))
    if with_baselines:
        found.append(Score("Length of the response (no model)", "", lengths.tolist()))
        found.append(Score("Length of the prompt (no model)", "", column("prompt_length")))
    return found


def _predictor(score: Score, rows: list[dict]) -> Predictor | None:
    """What needs no model may tell right responses by small numbers: its direction is taken from these very responses."""
    name, totals = score.name, np.array(score.totals, float)
    if not np.isfinite(totals).all():
        return None
    labels, prompts = [bool(row["label"]) for row in rows], [row["prompt"] for row in rows]
    found = auc_interval(totals, labels, prompts)
    if found is None:
        return None
    if not score.method:
        shorter = found.mean < 0.5
        if shorter:
            totals = -totals
            found = auc_interval(totals, labels, prompts)
        name = name.replace(" (", f", {'shorter' if shorter else 'longer'} is better (")
    assert found is not None
    row: Predictor = {"name": name, "method": score.method, "auc": found.mean, "interval": [found.low, found.high]}  # type: ignore[typeddict-item]
    row |= {"n": len(rows), "within": _listed(auc_within_prompt(totals, labels, prompts))}
    if score.steps is not None:
        steps = _steps(rows, score.steps)
        row["found"] = _listed(lowest_is_wrong(steps))
        if (half := _halves(rows)) is not None:
            row["found_in_half"] = _listed(lowest_is_wrong(steps, half))
    return row


def chance_of(rows: list[dict]) -> Chance | None:
    """Of finding the first wrong step; None where no response has one, or the run kept no steps."""
    if "steps" not in rows[0]:  # of a run that kept none
        return None
    steps = _steps(rows, [[0.0] * row["steps"] for row in rows])
    found, half = chance_of_wrong(steps), _halves(rows)
    if found is None:
        return None
    asked = sum(row["first_wrong_step"] is not None and row["steps"] > 1 for row in rows)
    in_half = None if half is None else _listed(chance_of_wrong(steps, half))
    return {"found": list(found), "found_in_half": in_half, "n": asked}


def _steps(rows: list[dict], scores: Sequence[Sequence[float]]) -> list[Steps]:
    return [(row["prompt"], np.array(of, float), row["first_wrong_step"]) for row, of in zip(rows, scores)]


def _halves(rows: list[dict]) -> list[np.ndarray] | None:
    """For each response the half of its steps where the initial model was the least sure."""
    if "start_step_entropies" not in rows[0]:
        return None
    return [highest_half(row["start_step_entropies"]) for row in rows]


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)

"""What a report is made of: plain JSON data, as report.json holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

Decoding = Literal["greedy", "sampling"]


class _MethodName(TypedDict):
    name: str


class Method(_MethodName, total=False):
    """A method on the same problems, in the same order, as the others; what was not measured is left out."""

    greedy: Sequence[float]  # a score, 0 or 1, for each problem
    sampling: Sequence[Sequence[float]]  # k scores for each problem
    unread: dict[str, float]  # by decoding, the share of answers that the verifier could not read
    seconds: float
    tokens_per_second: float
    updates: int
    extra: dict[str, Any]  # {title of a further column: text or number}


class _CurvePoints(TypedDict):
    name: str  # curves of one name share a plot
    x: list[float]
    y: list[float | None]


class Curve(_CurvePoints, total=False):
    method: str
    how_to_read: str
    x_label: str


class Calibration(TypedDict):
    """One entry for each response."""

    predicted: list[float]
    observed: list[float]


class ValueAUC(TypedDict, total=False):
    """How well the value model tells right held-out responses from wrong ones."""

    at_end: float | None
    at_half: float | None
    n: int  # responses
    interval: list[float] | None  # [low, high] of at_end


class _TokenValues(TypedDict):
    prompt: str
    tokens: list[str]
    values: list[float]  # values[i] is the value before tokens[i]
    reward: float


class ValueTrace(_TokenValues, total=False):
    """The values along one response."""

    step_ends: list[int]  # for each step the position behind its last token
    first_wrong_step: int | None  # counted from 0


class Flip(TypedDict):
    """A problem whose greedy answer changed from the baseline to the headline method."""

    prompt: str
    before: str
    after: str


Flips = dict[Literal["fixed", "broken"], list[Flip]]


class ValueFindings(TypedDict, total=False):
    value_calibration: Calibration
    value_auc: ValueAUC
    value_traces: list[ValueTrace]  # at most 6 are shown, half of them right (reward above 0) where there are enough


class Machine(TypedDict, total=False):
    device: str
    versions: dict[str, str]  # {package: version}


class _Run(TypedDict):
    title: str
    command: str  # the exact one that was run


class Report(_Run, Machine, ValueFindings, total=False):
    created: str
    seed: int
    wall_seconds: float
    options: dict[str, Any]  # those that are not defaults
    methods: list[Method]
    baseline: str  # the method that every other is tested against
    headline: str  # the method that the verdict is about; without it the first that is not the baseline
    curves: list[Curve]
    flips: Flips  # at most 6 of each kind are shown
    data: dict[str, float]  # counts of the rows, by name
    notes: list[str]  # the limits of what is shown


REQUIRED = set(_Run.__annotations__)
KEYS = REQUIRED | set(Report.__annotations__)

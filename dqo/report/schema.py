"""What a report is made of: plain JSON data, as report.json holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

Decoding = Literal["greedy", "sampling"]


class SeedScores(TypedDict):
    """A run's mean accuracies."""

    seed: int
    accuracy: dict[Decoding, float]


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
    seeds: list[SeedScores]  # of several runs, whose scores are pooled above: greedy their mean, sampling run by run
    extra: dict[str, Any]  # {title of a further column: text or number}


class _CurvePoints(TypedDict):
    name: str  # curves of one name share a plot
    x: list[float]
    y: list[float | None]


class Curve(_CurvePoints, total=False):
    method: str
    how_to_read: str
    x_label: str
    seed: int  # curves of one method and several seeds are drawn thin, with their mean
    warmup: float  # up to this x the value model alone is trained


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


class _Tokens(TypedDict):
    prompt: str
    tokens: list[str]
    reward: float


class ValueTrace(_Tokens, total=False):
    """The values along one response of T tokens."""

    label: bool  # whether it is right; without one a reward above 0 is
    values: list[float]  # the value model's: values[i] is the value before tokens[i]
    advantages: list[float]  # beta * log(pi/ref) of each token
    implied: list[
        float
    ]  # (T + 1,) the value that the policy implies before each token, and behind the last: the remainder
    start: dict[str, Any]  # of the implied value: value, origin, responses (dqo.credit.implied.Start)
    step_ends: list[int]  # for each step the position behind its last token
    first_wrong_step: int | None  # counted from 0


class Change(TypedDict):
    """A quantity before and after training."""

    name: str
    better: Literal["lower", "higher", ""]
    how_to_read: str
    methods: dict[str, list[list[float | None]]]  # {method: [before, after] of each run}


class _PredictorAUC(TypedDict):
    name: str
    method: str  # "" where it needs no model
    auc: float
    interval: list[float] | None
    n: int


class Predictor(_PredictorAUC, total=False):
    """How well a score tells right held-out responses from wrong ones, and finds the first wrong step; [mean, low, high]."""

    within: list[float] | None  # AUC within a prompt
    found: list[float] | None  # share of responses whose lowest step is the first wrong one
    found_in_half: list[float] | None  # the same among the half of the steps with the highest initial entropy


class Chance(TypedDict):
    """What a score finds that draws one of the steps, over the responses with a known wrong step; [mean, low, high]."""

    found: list[float]
    found_in_half: list[float] | None
    n: int


class PenalisedStep(TypedDict):
    """A response's first penalised step, and the text around it."""

    prompt: str
    before: str
    text: str
    after: str
    step: int  # counted from 1
    steps: int
    reward: float
    source: str


class Penalised(TypedDict):
    """The penalised steps of the responses that were trained on."""

    rows: int
    of_rows: int
    steps: int
    of_steps: int
    mean_reward: float | None
    process_reward: str  # what the run did with them
    examples: list[PenalisedStep]


class Unread(TypedDict):
    """Answers of a model that the verifier could not read."""

    method: str
    decoding: str
    share: float
    cure: str
    examples: list[dict[str, Any]]  # source, answer, response (its end)


class RunView(TypedDict, total=False):
    directory: str
    method: str
    seed: int
    state: str
    seconds: float
    tokens_per_second: float


class DataSet(TypedDict):
    name: str
    sha256: str
    of: str  # "file", "files" or "rows"


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
    command: str  # the exact ones that were run, a line each


class Report(_Run, Machine, ValueFindings, total=False):
    created: str
    seed: int
    wall_seconds: float
    options: dict[str, Any]  # those that are not defaults, in every run
    options_of: dict[str, dict[str, Any]]  # {method: the others}
    methods: list[Method]
    baseline: str  # the method that every other is tested against
    headline: str  # the method that the verdict is about; without it the first that is not the baseline
    warnings: list[str]  # what a reader must know before he believes the page
    changes: list[Change]
    curves: list[Curve]
    unread: list[Unread]  # where they are many
    flips: Flips  # at most 6 of each kind are shown
    predictors: list[Predictor]
    chance: Chance  # of finding the first wrong step
    penalised: Penalised
    data: dict[str, dict[str, float]]  # {method: counts of the responses that it was trained on, by name}
    data_sets: list[DataSet]
    parameters: dict[str, dict[str, int]]  # {method: numbers of weights, by name}
    runs: list[RunView]
    notes: list[str]  # the limits of what is shown


REQUIRED = set(_Run.__annotations__)
KEYS = REQUIRED | set(Report.__annotations__)

"""Intervals and tests for what is measured on a list of problems or responses.

Arrays are numpy or anything numpy reads; P is problems, k samples of a problem, N responses. Intervals are
95 %. The problems are the random thing: intervals and tests speak of other problems of the same kind, for the
models as they are. They do not cover the variation between training seeds.
"""

from dataclasses import dataclass
from math import comb, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
Z = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
SIGN_FLIPS = 9_999  # the smallest p value a sampled sign-flip test can give is 2 / (SIGN_FLIPS + 1)


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    difference: float  # mean of a - b
    low: float
    high: float
    p_value: float  # two-sided
    wins: int  # problems where a is above b
    losses: int
    test: str

    @property
    def significant(self) -> bool:
        return self.p_value < 1 - CONFIDENCE


@dataclass(frozen=True)
class Proportion:
    """A share of independent trials; the interval is Wilson's (1927), which stays sensible at 0 and at 1."""

    successes: int
    total: int

    def __post_init__(self):
        if not 0 <= self.successes <= self.total or self.total == 0:
            raise ValueError(f"{self.successes} successes of {self.total} is not a proportion")

    @property
    def mean(self) -> float:
        return self.successes / self.total

    @property
    def interval(self) -> Interval:
        from scipy.stats import binomtest

        low, high = binomtest(self.successes, self.total).proportion_ci(CONFIDENCE, method="wilson")
        return Interval(self.mean, float(low), float(high))

    @property
    def low(self) -> float:
        return self.interval.low

    @property
    def high(self) -> float:
        return self.interval.high


def accuracy_interval(per_problem_scores: ArrayLike) -> Interval:
    """Mean accuracy of k samples a problem, scores (P, k) or (P,) in [0, 1].

    Samples of one problem resemble each other, so the P problems are the independent units: with m the
    problem means (P,), se^2 = var(m) / P, and n = mean (1 - mean) / se^2 is the number of independent trials
    that would be as informative, at least P and for 0/1 scores at most P k. The interval is Wilson's at that
    n (Dean and Pagano 2015, "Evaluating confidence interval methods for binomial proportions in clustered
    surveys"). The plain normal interval and the bootstrap were passed over because both shrink to nothing
    when every sample is right; with k = 1 this one is exactly the interval of `Proportion`.
    """
    scores = _unit_scores(per_problem_scores, "per_problem_scores")
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"per_problem_scores must be (problems, samples), got shape {scores.shape}")
    problems, samples = scores.shape
    mean = float(scores.mean())
    squared_error = scores.mean(axis=1).var(ddof=1) / problems if problems > 1 else 0.0
    # Scores between 0 and 1 are averages already, of more samples than are seen here.
    most = problems * samples if _is_binary(scores) else float("inf")
    return _wilson(mean, _effective_trials(mean, squared_error, least=problems, most=most))


def clustered_interval(sums: ArrayLike, counts: ArrayLike) -> Interval:
    """Mean of shares in [0, 1] that come in P groups of unlike sizes; `sums` and `counts` (P,) are those of each group's shares.

    The groups are the independent units. The standard error is that of a ratio (Cochran 1977, 6.3), and the interval Wilson's at
    the equivalent number of trials, as in `accuracy_interval`: at least (sum counts)^2 / sum counts^2, that of groups which are
    wholly right or wholly wrong, and for whole sums at most their count. Of one group nothing is known of others: one trial.
    """
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    if sums.ndim != 1 or sums.shape != counts.shape or not len(sums):
        raise ValueError(f"sums {sums.shape} and counts {counts.shape} must be (groups,) alike, and not empty")
    if not ((counts > 0) & (sums >= 0) & (sums <= counts)).all():
        raise ValueError("each group needs a count above 0, and a sum between 0 and its count")
    groups, total = len(sums), counts.sum()
    mean = float(sums.sum() / total)
    least = float(total**2 / (counts**2).sum())
    if groups == 1:
        return _wilson(mean, least)
    squared_error = float(((sums - mean * counts) ** 2).sum()) / total**2 * groups / (groups - 1)
    most = float(total) if (sums == np.round(sums)).all() else float("inf")
    return _wilson(mean, _effective_trials(mean, squared_error, least=least, most=most))


def mean_interval(values: ArrayLike) -> Interval | None:
    """The mean of independent runs, values (R,), with Student's interval; None for fewer than two."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return None
    from scipy import stats

    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / sqrt(len(values))
    mean = float(values.mean())
    return Interval(mean, mean - float(half), mean + float(half))


def paired_test(a: ArrayLike, b: ArrayLike) -> Paired:
    """Is a better than b on the same problems? a, b (P,) in [0, 1], the difference is a - b.

    Both 0/1: the exact McNemar test, a binomial test of wins against losses, and for the difference the
    interval of Bonett and Price (2012), the Wald interval after one win and one loss are added, which keeps
    its coverage with few discordant pairs (Fagerland, Lydersen and Laake 2013).

    Otherwise (means of several samples): the sign-flip permutation test of the mean difference, exact for any
    number of problems and about the very quantity that is reported, which Wilcoxon's ranks are not; problems
    with equal scores flip into themselves, so ties need no convention. The interval is Student's.
    """
    from scipy import stats

    a, b = _unit_scores(a, "a"), _unit_scores(b, "b")
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ValueError(f"paired scores must be two arrays (problems,), got {a.shape} and {b.shape}")
    problems = len(a)
    gaps = a - b
    difference = float(gaps.mean())
    wins, losses = int((gaps > 0).sum()), int((gaps < 0).sum())

    if _is_binary(a) and _is_binary(b):
        p_value = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        win_share, loss_share = (wins + 1) / (problems + 2), (losses + 1) / (problems + 2)
        center = win_share - loss_share
        half = Z * sqrt((win_share + loss_share - center**2) / (problems + 2))
        # The added pair pulls the centre towards zero; the observed difference must not fall outside.
        low, high = min(center - half, difference), max(center + half, difference)
        low, high = max(low, -1.0), min(high, 1.0)
        return Paired(difference, low, high, float(p_value), wins, losses, "exact McNemar")

    spread = float(gaps.std(ddof=1)) if problems > 1 else float("inf")
    half = stats.t.ppf((1 + CONFIDENCE) / 2, max(problems - 1, 1)) * spread / sqrt(problems)
    low, high = max(difference - half, -1.0), min(difference + half, 1.0)
    p_value = _sign_flip_p_value(gaps[gaps != 0])
    return Paired(difference, float(low), float(high), p_value, wins, losses, "sign-flip permutation")


def auc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Area under the ROC curve: P(score of a positive > score of a negative) + half of P(equal).

    scores (N,), labels (N,) of 0/1. The Mann-Whitney statistic over its maximum. None when one class is
    missing.
    """
    scores, labels = _scores_and_labels(scores, labels)
    positives, negatives = scores[labels == 1], scores[labels == 0]
    if not len(positives) or not len(negatives):
        return None
    from scipy.stats import mannwhitneyu

    statistic = mannwhitneyu(positives, negatives, method="asymptotic").statistic
    return float(statistic / (len(positives) * len(negatives)))


def auc_interval(scores: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None) -> Interval | None:
    """The AUC and its interval; `groups` (N,) names the problem of each response. None without both classes.

    The standard error is that of DeLong et al. (1988), clustered by group (Obuchowski 1997): a positive adds
    (share of negatives below it - AUC) / positives, a negative (share of positives above it - AUC) /
    negatives, and the squared sums of the groups add up. The interval is Wilson's at the equivalent number of
    trials, as in `accuracy_interval`, which stays inside [0, 1]. That number lies between the groups of the
    rarer class, as the variance of an AUC is at most AUC (1 - AUC) / min(positives, negatives), and N.
    """
    area = auc(scores, labels)
    if area is None:
        return None
    from scipy.stats import rankdata

    scores, labels = _scores_and_labels(scores, labels)
    groups = np.arange(len(scores)) if groups is None else np.unique(groups, return_inverse=True)[1]
    if groups.shape != scores.shape:
        raise ValueError(f"groups must have the shape of scores {scores.shape}, got {groups.shape}")
    positive = labels == 1
    # The rank among all minus the rank in one's own class counts the other class below (ties by half).
    others_below = rankdata(scores)
    for members in (positive, ~positive):
        others_below[members] -= rankdata(scores[members])
    count, rest = positive.sum(), (~positive).sum()
    contribution = np.where(positive, others_below / rest - area, 1 - others_below / count - area)
    contribution /= np.where(positive, count, rest)
    per_group = np.bincount(groups, weights=contribution)
    squared_error = float((per_group**2).sum()) * len(per_group) / max(len(per_group) - 1, 1)
    rarer = min(len(np.unique(groups[positive])), len(np.unique(groups[~positive])))
    return _wilson(area, _effective_trials(area, squared_error, least=rarer, most=len(scores)))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from n samples with c right: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021, "Evaluating large language models trained on code".
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 0 <= c <= n and 1 <= k <= n, got n={n} and c={c}")
    return 1 - comb(n - c, k) / comb(n, k)


def calibration_bins(predicted: ArrayLike, observed: ArrayLike, bins: int = 10) -> list[tuple[float, float, int]]:
    """Reliability of predictions against outcomes, both (N,): (mean predicted, mean observed, count) a bin.

    Bins hold equal counts (quantiles of the predictions), so that every point of the plot weighs the same;
    equal predictions share a bin, and bins that this leaves empty are dropped.
    """
    predicted, observed = np.asarray(predicted, float), np.asarray(observed, float)
    if predicted.ndim != 1 or predicted.shape != observed.shape:
        raise ValueError(f"predicted {predicted.shape} and observed {observed.shape} must be (N,) alike")
    if not (np.isfinite(predicted).all() and np.isfinite(observed).all()):
        raise ValueError("predicted and observed must be finite")
    if not len(predicted):
        return []
    edges = np.quantile(predicted, np.arange(1, bins) / bins)
    members = np.searchsorted(edges, predicted, side="left")
    inside = [members == i for i in np.unique(members)]
    return [(float(predicted[i].mean()), float(observed[i].mean()), int(i.sum())) for i in inside]


def _wilson(mean: float, trials: float) -> Interval:
    """Wilson's interval at a number of trials that need not be whole, which scipy's is limited to."""
    center = (mean + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * sqrt(mean * (1 - mean) / trials + Z**2 / (4 * trials**2))
    return Interval(mean, max(0.0, min(center - half, mean)), min(1.0, max(center + half, mean)))


def _effective_trials(mean: float, squared_error: float, least: float, most: float) -> float:
    """Independent trials whose binomial variance is `squared_error`."""
    if mean in (0.0, 1.0):  # no variation was seen to estimate it from
        return least
    if squared_error == 0:
        return most
    return min(max(mean * (1 - mean) / squared_error, least), most)


def _sign_flip_p_value(gaps: np.ndarray) -> float:
    if len(gaps) < 2:  # one gap and its flip are equally far from zero
        return 1.0
    from scipy.stats import permutation_test

    def mean(sample, axis):
        return sample.mean(axis=axis)

    result = permutation_test(
        (gaps,),
        mean,
        permutation_type="samples",  # of one sample: signs
        n_resamples=SIGN_FLIPS,
        batch=1_000,
        vectorized=True,
        random_state=np.random.default_rng(0),  # the same data give the same p value
    )
    return float(result.pvalue)


def _unit_scores(scores: ArrayLike, name: str) -> np.ndarray:
    scores = np.asarray(scores, float)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"{name} must lie in [0, 1] and not be NaN")
    return scores


def _is_binary(scores: np.ndarray) -> bool:
    return bool(np.isin(scores, (0, 1)).all())


def _scores_and_labels(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, float), np.asarray(labels, float)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must be (N,) of one length")
    if np.isnan(scores).any():
        raise ValueError("scores contain NaN")
    if not _is_binary(labels):
        raise ValueError("labels must be 0 or 1")
    return scores, labels

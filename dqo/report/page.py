"""The report of a run: report.html (self-contained), report.md (short), report.json (the dict it was given).

`write_report(directory, report)` takes one dict of plain JSON data. `title` and `command` are required; every
other key may be left out.

    title, command          str; the command is the exact one that was run created, device, seed   str, str,
    int wall_seconds            number versions                {package: version} options
    {name: value}, those that are not defaults baseline, headline      names of methods: every method is
    tested against the baseline, and the verdict is about the headline method (default: the first that is not
    the baseline) methods                 [{name, greedy: [0/1 per problem], sampling: [[0/1] * k per
    problem], seconds, tokens_per_second, updates, extra: {column: text or number}}], all on the same problems
    in the same order; everything but the name may be missing curves                  [{name, method, x:
    [...], y: [number or None], how_to_read, x_label}]; curves of one name share a plot value_calibration
    {predicted: [...], observed: [...]}, one entry a response value_auc               {at_end, at_half, n,
    interval: [low, high]}, on held-out responses; the interval is that of at_end value_traces
    [{prompt, tokens: [str], values: [number], reward, step_ends: [int], first_wrong_step: int or None}];
    values[i] is the value before tokens[i], step_ends are exclusive token positions, steps count from 0; at
    most 6 are shown, half of them right (reward above 0) where there are enough of both flips
    {fixed: [{prompt, before, after}], broken: [...]}, problems that changed from the baseline to the headline
    method; at most 6 of each are shown data                    {rows, problems, share_correct, mixed_prompts,
    mean_length, ...} notes                   [str], the limits of what is shown
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dqo.errors import printable
from dqo.files import write_whole, writing
from dqo.report.plots import draw_all
from dqo.stats import Interval, Paired, Proportion, accuracy_interval, calibration_bins, paired_test, pass_at_k

REQUIRED = {"title", "command"}
KEYS = REQUIRED | {"created", "device", "seed", "wall_seconds", "versions", "options", "baseline", "headline"}
KEYS |= {"methods", "curves", "value_calibration", "value_auc", "value_traces", "flips", "data", "notes"}
COSTS = {"updates": "Updates", "seconds": "Seconds", "tokens_per_second": "Tokens/s"}
MOST_FLIPS = 6  # of each kind
NEARLY_NOTHING = 0.05  # explained variance below which a value model has hardly learned
DECODINGS = {"greedy": "with greedy decoding", "sampling": "with sampling"}


class Result(NamedTuple):
    """A method's accuracies and its paired tests, by decoding; a decoding that was not measured is absent."""

    name: str
    problems: int
    accuracy: dict[str, Interval]
    against: dict[str, Paired]


class Verdict(NamedTuple):
    sentence: str
    details: list[str]


def compare(methods: list[dict], baseline: str | None = None) -> list[Result]:
    """Every method's accuracy with its interval, and its paired tests against the baseline."""
    names = [method["name"] for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"method names must differ, got {names}")
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline {baseline!r} is not among the methods {names}")
    scores = {method["name"]: _scores(method) for method in methods}
    results = []
    for name, ours in scores.items():
        against = {} if name == baseline else _paired_tests(name, ours, baseline, scores.get(baseline, {}))
        accuracy = {kind: accuracy_interval(values) for kind, values in ours.items()}
        results.append(Result(name, len(next(iter(ours.values()), ())), accuracy, against))
    return results


def console_table(methods: list[dict], baseline: str | None = None) -> str:
    """The final table in plain text: percent with half the 95% interval, and paired differences in points."""
    return _table(compare(methods, baseline), baseline)


def write_report(directory: str | Path, report: dict) -> Path:
    """Writes report.html, report.md and report.json into `directory`; returns the path of the page."""
    missing, unknown = sorted(REQUIRED - set(report)), sorted(set(report) - KEYS)
    if missing or unknown:
        raise ValueError(f"a report lacks the keys {missing} and has the unknown keys {unknown}")
    report = _plain(report)
    results = compare(report.get("methods", []), report.get("baseline"))
    compared = (_headline(report), report.get("baseline"))
    verdict = _verdict(results, *compared, report.get("value_auc"))
    texts = {
        "report.json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": _markdown(report, results, verdict),
        "report.html": _html(report, results, verdict),
    }
    directory = Path(directory)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(directory / name, text.encode())
    return directory / "report.html"


def _scores(method: dict) -> dict[str, np.ndarray]:
    """decoding -> (problems, samples)"""
    scores = {}
    for kind in DECODINGS:
        if method.get(kind) is not None and len(method[kind]):
            try:
                values = np.array(method[kind], float)
            except ValueError as error:
                raise ValueError(f"{method['name']}: {kind} needs one number of samples a problem") from error
            scores[kind] = values[:, None] if values.ndim == 1 else values
    if len({len(values) for values in scores.values()}) > 1:
        raise ValueError(f"{method['name']}: greedy and sampling differ in their number of problems")
    return scores


def _paired_tests(name: str, ours: dict, other: str | None, theirs: dict) -> dict[str, Paired]:
    tests = {}
    for kind in ours.keys() & theirs.keys():
        if len(ours[kind]) != len(theirs[kind]):
            raise ValueError(
                f"{kind}: {name} has {len(ours[kind])} problems and {other} has {len(theirs[kind])}; "
                "a paired test needs the same problems in the same order"
            )
        tests[kind] = paired_test(ours[kind].mean(axis=1), theirs[kind].mean(axis=1))
    return {kind: tests[kind] for kind in DECODINGS if kind in tests}


def _headline(report: dict) -> str | None:
    names = [method["name"] for method in report.get("methods", [])]
    headline = report.get("headline")
    if headline is None:
        return next((name for name in names if name != report.get("baseline")), None)
    if headline not in names:
        raise ValueError(f"headline {headline!r} is not among the methods {names}")
    return headline


def _verdict(
    results: list[Result], headline: str | None, baseline: str | None, value_auc: dict | None
) -> Verdict | None:
    """What the headline method gained over the baseline, else what the value model knows, else None."""
    by_name = {result.name: result for result in results}
    if headline is None or not by_name[headline].accuracy:
        return _value_verdict(value_auc or {})
    ours = by_name[headline]
    details = []
    for kind, rate in ours.accuracy.items():
        how = DECODINGS[kind].capitalize()
        text = f"{how} {headline} solves {_rate(rate)} of {ours.problems:,} problems"
        if kind in ours.against:
            test, theirs = ours.against[kind], by_name[baseline].accuracy[kind]
            text += (
                f" and {baseline} {_rate(theirs)}: {points(test.difference)} points "
                f"(95% interval {points(test.low)} to {points(test.high)}), p {_p_relation(test)} by the "
                f"{test.test} test, {test.wins:,} problems better and {test.losses:,} worse"
            )
        details.append(text + ".")
    if not ours.against:
        return Verdict(f"{headline} was measured, and there is no baseline to compare it with.", details)
    return Verdict(_verdict_sentence(headline, baseline, ours.against), details)


def _verdict_sentence(headline: str, baseline: str, against: dict[str, Paired]) -> str:
    outcomes: dict[str, list[str]] = {}
    for kind, test in against.items():
        outcome = "shows no significant difference"
        if test.significant:
            outcome = f"is {'better' if test.difference > 0 else 'worse'} than {baseline}"
        outcomes.setdefault(outcome, []).append(DECODINGS[kind])
    if list(outcomes) == ["shows no significant difference"]:
        return f"There is no significant difference between {headline} and {baseline}."
    return f"{headline} {', but '.join(f'{what} ' + ' and '.join(how) for what, how in outcomes.items())}."


def _value_verdict(value_auc: dict) -> Verdict | None:
    if value_auc.get("at_end") is None:
        return None
    interval = value_auc.get("interval")
    between = f" (95% interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    details = [f"AUC at the end of a response: {value_auc['at_end']:.3f}{between}."]
    if value_auc.get("at_half") is not None:
        details.append(f"AUC half-way through it: {value_auc['at_half']:.3f}.")
    if (interval or [value_auc["at_end"]])[0] > 0.5:
        return Verdict("The value model tells right held-out responses from wrong ones.", details)
    return Verdict("The value model tells right held-out responses from wrong ones no better than chance.", details)


def _warnings(report: dict) -> list[str]:
    warnings = []
    for curve in report.get("curves", []):
        seen = [y for y in curve["y"] if y is not None]
        if curve["name"] == "value/explained_variance" and seen and seen[-1] < NEARLY_NOTHING:
            owner = curve.get("method", "this run")
            warnings.append(
                f"The value model of {owner} ends with an explained variance of {seen[-1]:.2f}: it knows "
                "hardly more than the average return, and advantages computed from it are mostly noise."
            )
    return warnings


def _markdown(report: dict, results: list[Result], verdict: Verdict | None) -> str:
    parts = [f"# {report['title']}"]
    if verdict:
        parts += [f"**{verdict.sentence}**", *verdict.details]
    if results:
        parts.append(f"```\n{_table(results, report.get('baseline'))}\n```")
    notes = [*_warnings(report), *report.get("notes", [])]
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join([*parts, f"```\n{report['command']}\n```"]) + "\n"


def _html(report: dict, results: list[Result], verdict: Verdict | None) -> str:
    from jinja2 import Environment, FileSystemLoader

    headline, baseline = _headline(report), report.get("baseline")
    methods = {method["name"]: method for method in report.get("methods", [])}
    scores = {name: _scores(method) for name, method in methods.items()}
    others = {
        name: _paired_tests(headline, scores[headline], name, theirs)
        for name, theirs in scores.items()
        if name not in (headline, baseline)
    }
    accuracies = {
        kind: {result.name: result.accuracy[kind] for result in results if kind in result.accuracy}
        for kind in DECODINGS
    }
    passes = {name: _passes(kinds["sampling"]) for name, kinds in scores.items() if "sampling" in kinds}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for show in (percent, points, p_text, number, duration):
        environment.filters[show.__name__] = show
    return environment.get_template("report.html.j2").render(
        report=report,
        methods=methods,
        verdict=verdict,
        warnings=_warnings(report),
        results=results,
        kinds=[kind for kind, accuracy in accuracies.items() if accuracy],
        costs=[(key, title) for key, title in COSTS.items() if any(key in m for m in methods.values())],
        extras=list(dict.fromkeys(title for method in methods.values() for title in method.get("extra", {}))),
        headline=headline,
        others={name: tests for name, tests in others.items() if tests},
        flips={kind: _flip_views(flips) for kind, flips in report.get("flips", {}).items() if flips},
        **draw_all(
            report,
            headline=headline,
            accuracies={kind: accuracy for kind, accuracy in accuracies.items() if len(accuracy) > 1},
            passes={name: curve for name, curve in passes.items() if len(curve) > 1},
            reliability=_reliability(**report.get("value_calibration", {"predicted": [], "observed": []})),
        ),
    )


def _passes(samples: np.ndarray) -> dict[int, Interval]:
    """pass@k of (problems, samples) at the powers of two."""
    n = samples.shape[1]
    ks = [2**i for i in range(n.bit_length())]
    right = samples.sum(axis=1).astype(int)
    return {k: accuracy_interval([pass_at_k(n, int(c), k) for c in right]) for k in ks}


def _reliability(predicted: list[float], observed: list[float]) -> list[tuple[float, Interval]]:
    """(mean prediction, mean outcome) of groups of responses; outcomes that are not 0/1 have no interval."""
    shares = set(observed) <= {0, 1}
    return [
        (mean, Proportion(round(share * n), n).interval if shares else Interval(share, share, share))
        for mean, share, n in calibration_bins(predicted, observed)
    ]


def _flip_views(flips: list[dict]) -> list[dict]:
    """Each text as (common beginning, first line that differs, rest), for the page to mark the change."""

    def split(lines: list[str], at: int) -> tuple[str, str, str]:
        return "\n".join(lines[:at]), "\n".join(lines[at : at + 1]), "\n".join(lines[at + 1 :])

    views = []
    for flip in flips[:MOST_FLIPS]:
        before, after = flip["before"].splitlines(), flip["after"].splitlines()
        shared = min(len(before), len(after))
        same = next((i for i in range(shared) if before[i] != after[i]), shared)
        views.append({"prompt": flip["prompt"], "before": split(before, same), "after": split(after, same)})
    return views


def _table(results: list[Result], baseline: str | None) -> str:
    """Aligned plain text, a line a method."""
    kinds = [kind for kind in DECODINGS if any(kind in result.accuracy for result in results)]
    tested = [kind for kind in kinds if any(kind in result.against for result in results)]
    rows = [["method", *(f"{kind} %" for kind in kinds)]]
    for kind in tested:
        rows[0] += [f"{kind} vs {baseline}", "p"]
    for result in results:
        rates = [result.accuracy.get(kind) for kind in kinds]
        rows.append([result.name, *(_plus_minus(rate) if rate else "-" for rate in rates)])
        for test in (result.against.get(kind) for kind in tested):
            rows[-1] += [_points_between(test), p_text(test.p_value)] if test else ["-", "-"]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells in rows:
        lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign unless it rounds to zero."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def p_text(p_value: float) -> str:
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def number(value: Any) -> str:
    """A number as a reader wants it; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int) or value.is_integer() and abs(value) >= 1000:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _rate(rate: Interval) -> str:
    return f"{percent(rate.mean)}% ({percent(rate.low)} to {percent(rate.high)})"


def _plus_minus(rate: Interval) -> str:
    return f"{percent(rate.mean)} ±{percent((rate.high - rate.low) / 2)}"


def _points_between(test: Paired) -> str:
    return f"{points(test.difference)} [{points(test.low)}, {points(test.high)}]".replace("−", "-")


def _p_relation(test: Paired) -> str:
    text = p_text(test.p_value)
    return text.replace("<", "< ") if text.startswith("<") else f"= {text}"


def _plain(value: Any) -> Any:
    """JSON data: numpy's types become Python's, what JSON cannot say (NaN, infinity) becomes None, and control characters of
    samples are written out."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return printable(str(value)) if isinstance(value, str | Path) else value

"""The page of one run or several: report.html (self-contained), report.md (short), report.json (the data it was given)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from dqo.errors import printable
from dqo.files import write_whole, writing
from dqo.report.comparison import (
    DECODINGS,
    MethodResult,
    Verdict,
    compare,
    headline_of,
    paired_tests,
    scores_of,
    verdict_of,
)
from dqo.report.formats import (
    duration,
    measured,
    number_text,
    option_text,
    p_text,
    percent,
    plus_minus,
    points,
    points_between,
    signed,
)
from dqo.report.plots import draw_all
from dqo.report.schema import KEYS, REQUIRED, Change, Decoding, Flip, Method, Report
from dqo.report.worse import with_loss
from dqo.stats import Interval, Proportion, accuracy_interval, calibration_bins, pass_at_k

COSTS = {"updates": "Updates", "seconds": "Seconds", "tokens_per_second": "Tokens/s"}
MOST_FLIPS = 6  # of each kind
NEARLY_NOTHING = 0.05  # explained variance below which a value model has hardly learned


def console_table(methods: list[Method], baseline: str | None = None) -> str:
    """The final table in plain text: percent with half the 95% interval, and paired differences in points."""
    return _table(compare(methods, baseline), baseline)


def write_report(directory: str | Path, report: Report) -> Path:
    """Writes report.html, report.md and report.json into `directory`; returns the path of the page."""
    texts = rendered(report)
    directory = Path(directory)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(directory / name, text.encode())
    return directory / "report.html"


def rendered(report: Report) -> dict[str, str]:
    """{name of a file: its text}."""
    missing, unknown = sorted(REQUIRED - set(report)), sorted(set(report) - KEYS)
    if missing or unknown:
        raise ValueError(f"a report lacks the keys {missing} and has the unknown keys {unknown}")
    report = _plain(report)
    methods = report.get("methods", [])
    results = compare(methods, report.get("baseline"))
    headline = headline_of(report)
    verdict = verdict_of(methods, results, headline, report.get("baseline"), report)
    verdict = with_loss(verdict, report, headline, any(result.against for result in results))
    return {
        "report.json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": _markdown(report, results, verdict),
        "report.html": _html(report, results, verdict),
    }


def _warnings(report: Report) -> list[str]:
    warnings = list(report.get("warnings", []))
    last: dict[str, list[float]] = {}
    for curve in report.get("curves", []):
        seen = [y for y in curve["y"] if y is not None]
        if curve["name"] == "value/explained_variance" and seen:
            last.setdefault(curve.get("method", "this run"), []).append(seen[-1])
    for owner, ends in last.items():
        end = sum(ends) / len(ends)
        if end < NEARLY_NOTHING:
            mean = f", the mean of {len(ends)} seeds" if len(ends) > 1 else ""
            others = " What the policy and the value model know of held-out responses stands at the top."
            warnings.append(
                f"The value model of {owner} ends with an explained variance of {measured(end)}{mean}: it knows hardly more than "
                f"the average return, as a baseline and as a picture.{others if report.get('predictors') else ''}"
            )
    return warnings


def _markdown(report: Report, results: list[MethodResult], verdict: Verdict | None) -> str:
    parts = [f"# {report['title']}"]
    if verdict:
        parts += [f"**{verdict.sentence}**", *verdict.details]
    if results:
        parts.append(f"```\n{_table(results, report.get('baseline'))}\n```")
    notes = [*_warnings(report), *report.get("notes", [])]
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join([*parts, f"```\n{report['command']}\n```"]) + "\n"


def _html(report: Report, results: list[MethodResult], verdict: Verdict | None) -> str:
    from jinja2 import Environment, FileSystemLoader

    headline, baseline = headline_of(report), report.get("baseline")
    methods = {method["name"]: method for method in report.get("methods", [])}
    scores = {name: scores_of(method) for name, method in methods.items()}
    others = {
        name: paired_tests(headline, scores[headline], name, theirs)
        for name, theirs in scores.items()
        if headline is not None and name not in (headline, baseline)
    }
    accuracies = {
        kind: {result.name: result.accuracy[kind] for result in results if kind in result.accuracy}
        for kind in DECODINGS
    }
    runs = {name: max(1, len(method.get("seeds", []))) for name, method in methods.items()}
    passes = {name: _passes(kinds["sampling"], runs[name]) for name, kinds in scores.items() if "sampling" in kinds}
    seeds: dict[Decoding, dict[str, Any]] = {
        kind: {result.name: result.seeds[kind].runs for result in results if kind in result.seeds} for kind in DECODINGS
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for show in (percent, points, p_text, number_text, duration, measured, option_text, signed):
        environment.filters[show.__name__] = show
    return environment.get_template("report.html.j2").render(
        report=report,
        methods=methods,
        verdict=verdict,
        warnings=_warnings(report),
        changes=[{**change, "rows": _change_rows(change)} for change in report.get("changes", [])],
        seeded=any(seeds.values()),
        results=results,
        kinds=[kind for kind, accuracy in accuracies.items() if accuracy],
        costs=[]
        if any(seeds.values())
        else [(k, title) for k, title in COSTS.items() if any(k in m for m in methods.values())],
        extras=list(dict.fromkeys(title for method in methods.values() for title in method.get("extra", {}))),
        headline=headline,
        others={name: tests for name, tests in others.items() if tests},
        flips={kind: _flip_views(flips) for kind, flips in report.get("flips", {}).items() if flips},
        **draw_all(
            report,
            headline=headline,
            accuracies={kind: accuracy for kind, accuracy in accuracies.items() if len(accuracy) > 1},
            seeds=seeds,
            passes={name: curve for name, curve in passes.items() if len(curve) > 1},
            reliability=_reliability(**report.get("value_calibration", {"predicted": [], "observed": []})),
        ),
    )


def _passes(samples: np.ndarray, runs: int) -> dict[int, Interval]:
    """pass@k of (problems, runs * samples) at the powers of two; k samples are of one run, and its runs are averaged."""
    samples = samples.reshape(len(samples), runs, -1)
    n = samples.shape[2]
    ks = [2**i for i in range(n.bit_length())]
    right = samples.sum(axis=2).astype(int)
    return {k: accuracy_interval([np.mean([pass_at_k(n, int(c), k) for c in row]) for row in right]) for k in ks}


def _change_rows(change: Change) -> list[dict]:
    """A row a method: the means of its runs before and after, and the least and greatest after where there are several."""
    rows = []
    for name, pairs in change["methods"].items():
        ends = [[x for x in column if x is not None] for column in zip(*pairs)]
        before, after = (sum(end) / len(end) if end else None for end in ends)
        row: dict[str, Any] = {"method": name, "before": before, "after": after, "range": None, "verdict": ""}
        if len(ends[1]) > 1:
            row["range"] = (min(ends[1]), max(ends[1]))
        if before is not None and after is not None and measured(before) != measured(after) and change["better"]:
            row["verdict"] = "right" if (after > before) == (change["better"] == "higher") else "wrong"
        rows.append(row)
    return rows


def _reliability(predicted: list[float], observed: list[float]) -> list[tuple[float, Interval]]:
    """(mean prediction, mean outcome) of groups of responses; outcomes that are not 0/1 have no interval."""
    shares = set(observed) <= {0, 1}
    return [
        (mean, Proportion(round(share * n), n).interval if shares else Interval(share, share, share))
        for mean, share, n in calibration_bins(predicted, observed)
    ]


def _flip_views(flips: list[Flip]) -> list[dict]:
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


def _table(results: list[MethodResult], baseline: str | None) -> str:
    """Aligned plain text, a line a method."""
    kinds = [kind for kind in DECODINGS if any(kind in result.accuracy for result in results)]
    tested = [kind for kind in kinds if any(kind in result.against for result in results)]
    lost = [kind for kind in kinds if any(kind in result.unread for result in results)]
    rows = [["method", *(f"{kind} %" for kind in kinds), *(f"{kind} unread %" for kind in lost)]]
    for kind in tested:
        rows[0] += [f"{kind} vs {baseline}", "p"]
    for result in results:
        rates = [result.accuracy.get(kind) for kind in kinds]
        rows.append([result.name, *(plus_minus(rate) if rate else "-" for rate in rates)])
        rows[-1] += [percent(result.unread[kind]) if kind in result.unread else "-" for kind in lost]
        for test in (result.against.get(kind) for kind in tested):
            rows[-1] += [points_between(test), p_text(test.p_value)] if test else ["-", "-"]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells in rows:
        lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


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

"""The page, the short text and the table, from plausible and from hostile data."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from dqo.report.comparison import compare
from dqo.report.curves import MOST_POINTS, thin
from dqo.report.page import console_table, write_report
from dqo.report.plots import MOST_TRACES, half_right, trace_plot, value_limits
from dqo.stats import Proportion, accuracy_interval, paired_test

HOSTILE = '<script>alert("1 & 2")</script> <b>&amp; $x_1^{$ #0072b2 id="k" 日本'
VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; unclosed or crossed tags are an error."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.open, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def scores(problems=400, k=4, skill=0.0, seed=0):
    """Greedy and sampling scores of problems whose difficulty is the same for every seed and skill."""
    difficulty = np.random.default_rng(99).normal(size=problems)
    rng = np.random.default_rng(seed)
    chance = 1 / (1 + np.exp(difficulty - skill))
    greedy = (rng.uniform(size=problems) < chance).astype(int)
    sampling = (rng.uniform(size=(problems, k)) < chance[:, None]).astype(int)
    return {"greedy": greedy.tolist(), "sampling": sampling.tolist()}


def trace(reward=1.0, wrong=None, tokens=("1+2=3", "\n", HOSTILE, "3+3=6")):
    values = [0.5 + 0.1 * i for i in range(len(tokens))]
    return {
        "prompt": HOSTILE,
        "tokens": list(tokens),
        "values": values,
        "reward": reward,
        "step_ends": [2, len(tokens)],
        "first_wrong_step": wrong,
    }


@pytest.fixture(scope="module")
def full():
    rng = np.random.default_rng(3)
    predicted = rng.uniform(size=200)
    return {
        "title": f"A report on {HOSTILE}",
        "command": f"dqo-train demo --title '{HOSTILE}'",
        "created": "2026-01-02T03:04:05+00:00",
        "device": "2 cores",
        "seed": 2048,
        "wall_seconds": 281.3,
        "versions": {"torch": "2.13.0"},
        "options": {"beta": 0.1, "learning_rate": 3e-4},
        "baseline": "base",
        "headline": "dqo",
        "methods": [
            {"name": "base", **scores(seed=1)},
            {"name": "dpo <&>", **scores(skill=0.8, seed=2), "seconds": 45.2, "extra": {"memory, GB": 1.5}},
            {"name": "dqo", **scores(skill=2.0, seed=3), "seconds": 58.0, "updates": 2560},
        ],
        "curves": [
            {"name": "loss", "method": "dqo", "x": list(range(500)), "y": rng.uniform(size=500).tolist()},
            {"name": "loss", "method": "dpo <&>", "x": [1, 2, 3], "y": [1.0, None, 0.5]},
            {
                "name": "a <b> of mine",
                "method": "dqo",
                "x": [1, 2],
                "y": [1, 2],
                "how_to_read": f"See {HOSTILE}.",
            },
        ],
        "value_calibration": {
            "predicted": predicted.tolist(),
            "observed": (rng.uniform(size=200) < predicted).astype(int).tolist(),
        },
        "value_auc": {"at_end": 0.941, "at_half": 0.783, "n": 200, "interval": [0.921, 0.957]},
        "value_traces": [trace(), trace(0.0, wrong=1), trace(0.0, wrong=0)],
        "flips": {
            "fixed": [{"prompt": HOSTILE, "before": f"same\n{HOSTILE}", "after": "same\nother\nend"}],
            "broken": [{"prompt": "p", "before": "", "after": "x"}],
        },
        "warnings": [f"Mind {HOSTILE}."],
        "changes": [
            {
                "name": "Held-out loss",
                "better": "lower",
                "how_to_read": HOSTILE,
                "methods": {"dqo": [[0.5, 0.25]], "dpo <&>": [[0.7, None]]},
            }
        ],
        "predictors": [
            {"name": "Value model", "method": "dqo", "auc": 0.941, "interval": [0.921, 0.957], "n": 200},
            {"name": HOSTILE, "method": "", "auc": 0.66, "interval": None, "n": 200},
        ],
        "penalised": {
            **{
                "rows": 70,
                "of_rows": 100,
                "steps": 81,
                "of_steps": 400,
                "mean_reward": -1.0,
                "process_reward": "additive",
            },
            "examples": [
                {
                    "prompt": HOSTILE,
                    "before": "fine\n",
                    "text": HOSTILE,
                    "after": "",
                    "step": 2,
                    "steps": 2,
                    "reward": -1.0,
                    "source": "a.jsonl:3",
                }
            ],
        },
        "data": {"dqo": {"rows": 12288, "share_correct": 0.3127}, "dpo <&>": {"rows": 5004}},
        "data_sets": [{"name": HOSTILE, "sha256": "ab" * 32, "of": "file"}],
        "parameters": {"dqo": {"policy": 123456}},
        "options_of": {"dqo": {"lam": 0.95}},
        "runs": [
            {"directory": HOSTILE, "method": "dqo", "seed": 1, "state": "finished", "seconds": 58.0},
            {"directory": "b", "method": "unknown", "seed": 2, "state": "not finished: step 3 of 9"},
        ],
        "notes": [f"Only {HOSTILE}."],
    }


@pytest.fixture(scope="module")
def html(full, tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("full"), full).read_text(encoding="utf-8")


def verdict_of(directory, **changes):
    report = {"title": "t", "command": "c", "baseline": "sft", "headline": "dqo", **changes}
    write_report(directory, report)
    return re.search(r"\*\*(.*)\*\*", (directory / "report.md").read_text()).group(1)


def test_user_text_is_shown_and_never_becomes_markup(html):
    page = Page(html)
    shown = " ".join(HOSTILE.split())
    assert "script" not in page.tags
    assert page.text.count(shown) >= 10  # title twice, command, prompts, tokens, flips, how to read, notes
    assert "<script>" not in html and "&amp;lt;" not in html
    assert "dpo <&>" in page.text


def test_tokens_are_drawn_as_they_are():
    tokens = ["$x_1^{$", "#0072b2", ' id="k"', "<b>&lt;", "url(#a)", "\n"]
    drawn = trace_plot(trace(tokens=tokens) | {"step_ends": []}, (0, 1))
    labels = Page(drawn).texts
    for label in ["$x_1^{$", "#0072b2", '·id="k"', "<b>&lt;", "url(#a)", "↵"]:
        assert label in labels


def test_an_implied_value_is_drawn_beside_the_value_models():
    plain = trace(tokens="abc") | {"step_ends": []}
    with_implied = plain | {"implied": [0.4, 0.5, 1.5, 1.25]}
    assert value_limits([with_implied])[1] > 1.5 > value_limits([plain])[1]

    def lines(one):  # points of every line in the colour of a series
        paths = re.findall(r'<path d="([^"]*)"[^>]*style="[^"]*stroke: var\(--(series-\d)', trace_plot(one, (0, 2)))
        return {(series, path.count("L") + 1) for path, series in paths}

    assert lines(plain) == {("series-0", 3)}
    assert lines(with_implied) == {("series-0", 4), ("series-1", 3)}
    assert lines(with_implied | {"values": []}) == {("series-0", 4)}


def test_the_page_needs_nothing_from_elsewhere(html):
    page = Page(html)
    assert len(html.encode()) < 1_000_000
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert links and all(value.startswith("#") for value in links)
    namespaces = re.findall(r'xmlns(?::xlink)?="([^"]*)"', html)
    assert html.count("http") == sum("http" in namespace for namespace in namespaces)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)


def test_ids_on_the_page_differ_and_every_reference_has_its_target(full, tmp_path):
    # The same response twice would be the same picture twice.
    one_of_each = full | {"value_traces": full["value_traces"][:2]}
    text = write_report(tmp_path, one_of_each).read_text()
    ids = [value for name, value in Page(text).attributes if name == "id"]
    references = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    assert len(ids) == len(set(ids))
    assert references and references <= set(ids)


def test_every_colour_of_the_plots_is_defined_for_light_and_for_dark(html):
    light, dark = re.search(r":root \{(.*?)\}.*?:root \{(.*?)\}", html, re.DOTALL).groups()
    colors = {name for name in re.findall(r"var\(--([\w-]+)", html) if name not in ("sans", "mono")}
    assert {"series-0", "series-1", "muted", "good", "bad"} <= colors
    for scheme in (light, dark):
        assert colors <= set(re.findall(r"--([\w-]+):", scheme))
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    outside_variables = re.sub(r"var\(--[\w-]+, #\w+\)", "", re.sub(r">[^<]*<", "><", drawn))
    assert not re.findall(r"(?:fill|stroke): #\w+", outside_variables)


def test_sections_come_in_the_order_of_interest(html):
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        "Before and after",
        "Methods",
        "More samples a problem",
        "Problems that changed",
        "Training",
        "The value model",
        "Penalised steps",
        "Data and models",
        "Limits",
        "Reproduction",
    ]
    assert html.index('class="verdict"') < html.index("<h2>")


def test_every_picture_says_how_to_read_it(html):
    pictures = html.count("<svg")
    assert pictures == 2 + 1 + 3 + 1 + 3  # intervals, pass@k, curves (loss by method), reliability, traces
    captions = re.findall(r"</svg>\s*<figcaption><b>How to read this.</b> (.+?)</figcaption>", html, re.DOTALL)
    captions += re.findall(r"</svg>\s*<figcaption style[^>]*><b>How to read this.</b>", html)
    traces = 3
    assert len(captions) == pictures - traces
    assert "the first wrong step is shaded" in html
    assert "levels of different methods do not compare" in html  # the default text for a known curve


def test_the_table_of_the_page_shows_the_statistics(html, full):
    base, _, dqo = full["methods"]
    text = Page(html).text
    rate = accuracy_interval(dqo["sampling"])
    test = paired_test(dqo["greedy"], base["greedy"])
    assert f"{100 * rate.mean:.1f} {100 * rate.low:.1f}–{100 * rate.high:.1f}" in text
    assert f"+{100 * test.difference:.1f} +{100 * test.low:.1f} to +{100 * test.high:.1f}" in text
    assert f"{test.wins} : {test.losses}" in text
    assert "2,560" in text and "12,288" in text and "1.5" in text
    assert "seed 2048" in text and "4 min 41 s" in text and "learning rate 0.0003" in text


def test_the_first_wrong_step_and_the_changed_line_are_marked(html):
    marks = ["".join(re.sub("<[^>]*>", "", mark)) for mark in re.findall(r"<mark[^>]*>(.*?)</mark>", html, re.DOTALL)]
    assert any(mark.endswith("3+3=6") for mark in marks) and "1+2=3\n" in marks
    assert 'class="good">other</mark>\nend</pre>' in html


def test_a_report_needs_only_title_and_command(tmp_path):
    path = write_report(tmp_path / "new" / "folder", {"title": "Nothing yet", "command": "dqo-train"})
    page = Page(path.read_text())
    assert "Nothing yet" in page.text and "dqo-train" in page.text
    assert "svg" not in page.tags and "table" not in page.tags
    assert (path.parent / "report.md").read_text() == "# Nothing yet\n\n```\ndqo-train\n```\n"


def test_missing_and_unknown_keys_are_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"lacks the keys \['command'\].*unknown keys \['curvs'\]"):
        write_report(tmp_path / "out", {"title": "t", "curvs": []})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_report_json_gives_the_same_page_again(full, html, tmp_path):
    write_report(tmp_path / "first", full)
    again = json.loads((tmp_path / "first" / "report.json").read_text())
    assert again == full
    assert write_report(tmp_path / "second", again).read_text() == html


def test_numbers_that_json_lacks_become_null_and_gaps(tmp_path):
    curve = {"name": "kl", "x": np.arange(3), "y": [0.1, float("nan"), np.float32(0.5)]}
    path = write_report(tmp_path, {"title": "t", "command": "c", "seed": np.int64(3), "curves": [curve]})
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["curves"][0] == {"name": "kl", "x": [0, 1, 2], "y": [0.1, None, 0.5]}
    assert saved["seed"] == 3
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", path.read_text(), re.DOTALL))


def test_the_verdict_names_a_clear_winner_with_numbers(full, tmp_path):
    write_report(tmp_path, full)
    text = (tmp_path / "report.md").read_text()
    base, _, dqo = full["methods"]
    test = paired_test(dqo["greedy"], base["greedy"])
    rate = Proportion(sum(dqo["greedy"]), 400)
    assert "**dqo is better than base with greedy decoding and with sampling.**" in text
    assert f"dqo solves {100 * rate.mean:.1f}% ({100 * rate.low:.1f} to {100 * rate.high:.1f}) of 400" in text
    assert f"+{100 * test.difference:.1f} points" in text and "p < 0.001 by the exact McNemar test" in text


def test_the_verdict_says_no_significant_difference_when_there_is_none(tmp_path):
    same_skill = [{"name": "sft", **scores(seed=5)}, {"name": "dqo", **scores(seed=6)}]
    assert not any(test.significant for test in compare(same_skill, "sft")[1].against.values())
    verdict = verdict_of(tmp_path, methods=same_skill)
    assert verdict == "There is no significant difference between dqo and sft."


def test_the_verdict_admits_defeat_and_a_split_decision(tmp_path):
    good, poor = scores(skill=2.0, seed=1), scores(skill=0.0, seed=2)
    methods = [{"name": "sft", **good}, {"name": "dqo", **poor}]
    verdict = verdict_of(tmp_path, methods=methods)
    assert verdict == "dqo is worse than sft with greedy decoding and with sampling."
    methods = [
        {"name": "sft", **poor},
        {"name": "dqo", "greedy": good["greedy"], "sampling": poor["sampling"]},
    ]
    verdict = verdict_of(tmp_path, methods=methods)
    assert verdict == (
        "dqo is better than sft with greedy decoding, but shows no significant difference with sampling."
    )


@pytest.mark.parametrize("interval, expected", [([0.62, 0.8], "from wrong ones."), ([0.45, 0.8], "than chance.")])
def test_without_scores_the_verdict_is_about_the_value_model(tmp_path, interval, expected):
    auc = {"at_end": 0.7, "at_half": None, "n": 50, "interval": interval}
    write_report(tmp_path, {"title": "t", "command": "c", "methods": [{"name": "dqo"}], "value_auc": auc})
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"\*\*(.*)\*\*", text).group(1).endswith(expected)
    assert f"0.700 (95% interval {interval[0]:.3f} to {interval[1]:.3f})" in text


def test_a_value_model_that_learned_nothing_is_pointed_out(tmp_path):
    def warned(last):
        curve = {"name": "value/explained_variance", "method": "dqo", "x": [1, 2, 3], "y": [0.5, last, None]}
        path = write_report(tmp_path, {"title": "t", "command": "c", "curves": [curve]})
        return 'class="warning"' in path.read_text()

    assert warned(0.01) and not warned(0.4)


def test_the_console_table_is_aligned_and_complete():
    methods = [
        {"name": "base", "greedy": [0, 0, 1, 0] * 50},
        {"name": "a longer name", "greedy": [1, 1, 1, 0] * 50, "sampling": [[1, 0]] * 200},
    ]
    header, rule, base, better = console_table(methods, "base").split("\n")
    assert len({len(line) for line in (header, rule, base, better)}) == 1
    assert base.split() == ["base", "25.0", "±6.0", "-", "-", "-"]
    test = paired_test(methods[1]["greedy"], methods[0]["greedy"])
    assert better.startswith("a longer name")
    assert f"+50.0 [+{100 * test.low:.1f}, +{100 * test.high:.1f}]  <0.001" in better
    assert "-" not in console_table(methods[1:]).split("\n")[2]


def test_methods_on_different_problems_are_refused():
    methods = [{"name": "base", "greedy": [0, 1]}, {"name": "dqo", "greedy": [1, 1, 1]}]
    with pytest.raises(ValueError, match="dqo has 3 problems and base has 2"):
        console_table(methods, "base")
    with pytest.raises(ValueError, match="number of problems"):
        console_table([{"name": "dqo", "greedy": [1], "sampling": [[1], [0]]}])
    with pytest.raises(ValueError, match="one number of samples"):
        console_table([{"name": "dqo", "sampling": [[1, 0], [0]]}])


@pytest.mark.parametrize("names, baseline", [(["a", "a"], "a"), (["a", "b"], "c")])
def test_unclear_names_are_refused(names, baseline):
    with pytest.raises(ValueError, match="names must differ|not among"):
        console_table([{"name": name, "greedy": [1]} for name in names], baseline)


@pytest.mark.parametrize("right, wrong, shown", [(9, 9, (3, 3)), (9, 1, (5, 1)), (0, 9, (0, 6)), (2, 1, (2, 1))])
def test_traces_are_half_right_where_there_are_enough(right, wrong, shown):
    chosen = half_right([trace(1.0)] * right + [trace(0.0)] * wrong)
    rewards = [t["reward"] for t in chosen]
    assert (rewards.count(1.0), rewards.count(0.0)) == shown and len(chosen) <= MOST_TRACES


def test_a_long_curve_is_thinned_to_means_and_keeps_its_gaps():
    x = np.arange(10 * MOST_POINTS)
    y = [None if i < 15 else float(i) for i in x]
    short_x, short_y = thin(x, y)
    assert len(short_x) == MOST_POINTS
    assert short_x[:2] == pytest.approx([4.5, 14.5])
    assert np.isnan(short_y[0]) and short_y[1:3] == pytest.approx([17.0, 24.5])
    assert thin([1, 2], [3, None])[0] == pytest.approx([1, 2])


@pytest.mark.parametrize("outcomes", [[-1.0, 0.25, 2.5] * 30, [True, False, True] * 30, [1.0] * 90])
def test_any_outcome_can_be_drawn_against_its_prediction(tmp_path, outcomes):
    calibration = {"predicted": np.linspace(-1, 2, 90).tolist(), "observed": outcomes}
    page = write_report(tmp_path, {"title": "t", "command": "c", "value_calibration": calibration}).read_text()
    assert page.count("<svg") == 1


def test_a_long_response_and_one_without_steps_are_drawn(tmp_path):
    long = trace(tokens=["word "] * 500) | {"step_ends": [], "first_wrong_step": None}
    bare = {"prompt": "p", "tokens": ["a"], "values": [None], "reward": -1}
    page = write_report(tmp_path, {"title": "t", "command": "c", "value_traces": [long, bare]}).read_text()
    assert page.count("<svg") == 2 and len(page) < 200_000


def test_importing_the_report_loads_no_plotting_library():
    heavy = "{'matplotlib', 'scipy', 'jinja2', 'torch'}"
    code = f"import sys, dqo.report; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The value along responses, drawn and in words."""

import re

import pytest

from dqo.report.page import write_report
from dqo.report.traces import MOST_TRACES, half_right, limits_of, trace_plot, trace_views
from tests.dqo.report.pages import HOSTILE, Page, credit, trace


def test_tokens_are_drawn_as_they_are():
    tokens = ["$x_1^{$", "#0072b2", ' id="k"', "<b>&lt;", "url(#a)", "\n"]
    given = trace(tokens=tokens) | {"step_ends": []}
    drawn = trace_plot(given, limits_of([given]))
    labels = Page(drawn).texts
    for label in ["$x_1^{$", "#0072b2", '·id="k"', "<b>&lt;", "url(#a)", "↵"]:
        assert label in labels


@pytest.mark.parametrize("right, wrong, shown", [(9, 9, (3, 3)), (9, 1, (5, 1)), (0, 9, (0, 6)), (2, 1, (2, 1))])
def test_traces_are_half_right_where_there_are_enough(right, wrong, shown):
    chosen = half_right([trace(1.0)] * right + [trace(0.0)] * wrong)
    rewards = [t["reward"] for t in chosen]
    assert (rewards.count(1.0), rewards.count(0.0)) == shown and len(chosen) <= MOST_TRACES


def test_a_long_response_and_one_without_steps_are_drawn(tmp_path):
    long = trace(tokens=["word "] * 500) | {"step_ends": [], "first_wrong_step": None}
    bare = {"prompt": "p", "tokens": ["a"], "values": [None], "reward": -1}
    page = write_report(tmp_path, {"title": "t", "command": "c", "value_traces": [long, bare]}).read_text()
    assert page.count("<svg") == 2 and len(page) < 200_000


def test_blame_is_in_the_colour_of_tokens_and_in_the_sums_of_steps():
    (view,) = trace_views([trace(0.0, wrong=1, **credit())])
    assert view["shades"] == [(False, 23), (False, 0), (False, 12), (True, 70)]
    assert view["step_sums"] == pytest.approx([0.1, -0.25]) and view["lowest"] == 1


def test_all_traces_have_one_scale():
    weak, strong = trace(**credit((0.01, 0.0, 0.0, -0.03))), trace(0.0, **credit())
    assert limits_of([weak, strong]).advantage == 0.3
    views = trace_views([weak, strong])
    assert views[0]["shades"][3] == (True, 7) and views[1]["shades"][3] == (True, 70)


@pytest.mark.parametrize("kept", [["values"], ["advantages", "implied", "start"], [*credit(), "values"]])
def test_a_trace_shows_what_the_run_kept(kept, tmp_path):
    given = trace(0.0, wrong=1, **credit())
    given = {name: value for name, value in given.items() if name in kept or name not in ("values", *credit())}
    page = write_report(tmp_path, {"title": "t", "command": "c", "value_traces": [given]}).read_text()
    text = Page(page).text
    assert ("is its advantage" in text) == ("2 ✗ −0.25" in text) == ("advantages" in kept)
    assert ("begins at 0.50 (the mean of 3 other responses to the prompt) and leaves +0.35 behind" in text) == (
        "implied" in kept
    )
    assert ("The dashed line is the value model’s" in text) == (set(kept) == {*credit(), "values"})
    assert page.count("stroke-dasharray") >= 1  # the way to the outcome
    written = re.search(r"<pre>(.*?)</pre>", page, re.DOTALL).group(1)
    marked = re.search(r"<(?:mark|b)[^>]*>(.*)</(?:mark|b)>", written, re.DOTALL).group(1)
    shown = " ".join(Page(f"<p>{marked}</p>").texts)
    assert " ".join(HOSTILE.split()) in " ".join(shown.split()) and shown.endswith("3+3=6") and "1+2" not in shown


def test_a_response_is_right_by_its_label_and_not_by_the_sign_of_its_reward(tmp_path):
    given = [trace(0.3) | {"label": False}, trace(0.0) | {"label": True}]
    assert [t["label"] for t in half_right(given)] == [True, False]
    page = write_report(tmp_path, {"title": "t", "command": "c", "value_traces": given}).read_text()
    assert page.index("✓ right") < page.index("✗ wrong")
    assert page.count("✓ right") == page.count("✗ wrong") == 1
    alike = [trace_plot(trace(0.0) | {"label": label}, limits_of(given)) for label in (True, False)]
    assert alike[0] != alike[1] and trace_plot(trace(0.0), limits_of(given)) == alike[1]

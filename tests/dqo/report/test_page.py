"""The page and the short text, from plausible and from hostile data."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from dqo.report.page import write_report
from dqo.stats import accuracy_interval, paired_test
from tests.dqo.report.pages import HOSTILE, Page, full_report


@pytest.fixture(scope="module")
def full():
    return full_report()


@pytest.fixture(scope="module")
def html(full, tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("full"), full).read_text(encoding="utf-8")


def test_user_text_is_shown_and_never_becomes_markup(html):
    page = Page(html)
    shown = " ".join(HOSTILE.split())
    assert "script" not in page.tags
    assert page.text.count(shown) >= 10  # title twice, command, prompts, tokens, flips, how to read, notes
    assert "<script>" not in html and "&amp;lt;" not in html
    assert "dpo <&>" in page.text


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
        "Credit on held-out responses",
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
    marks = [
        "".join(re.sub("<[^>]*>", "", mark))
        for mark in re.findall(r"<(?:mark|b class)[^>]*>(.*?)</(?:mark|b)>", html, re.DOTALL)
    ]
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


def test_a_value_model_that_learned_nothing_is_pointed_out(tmp_path):
    def warned(last):
        curve = {"name": "value/explained_variance", "method": "dqo", "x": [1, 2, 3], "y": [0.5, last, None]}
        path = write_report(tmp_path, {"title": "t", "command": "c", "curves": [curve]})
        return 'class="warning"' in path.read_text()

    assert warned(0.01) and not warned(0.4)


@pytest.mark.parametrize("outcomes", [[-1.0, 0.25, 2.5] * 30, [True, False, True] * 30, [1.0] * 90])
def test_any_outcome_can_be_drawn_against_its_prediction(tmp_path, outcomes):
    calibration = {"predicted": np.linspace(-1, 2, 90).tolist(), "observed": outcomes}
    page = write_report(tmp_path, {"title": "t", "command": "c", "value_calibration": calibration}).read_text()
    assert page.count("<svg") == 1


def test_importing_the_report_loads_no_plotting_library():
    heavy = "{'matplotlib', 'scipy', 'jinja2', 'torch'}"
    code = f"import sys, dqo.report; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

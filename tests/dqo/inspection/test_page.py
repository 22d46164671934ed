"""The page of an inspection: everything is in it, nothing comes from elsewhere, and data are never markup."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dqo.errors import UserError
from dqo.inspection.page import rendered
from dqo.inspection.run import inspect
from dqo.inspection.views import LEVELS, VIEWS, levels, number_text, scale_of, step_numbers
from tests.dqo.inspection.stored import HOSTILE, inspection, make_run, response, rows_with_steps, write_rows


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.titles = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if title := dict(attributes).get("title"):
            self.titles.append(title)

    def handle_data(self, data):
        self.text += data


def test_the_page_of_a_run_is_written_and_needs_nothing_from_elsewhere(tmp_path):
    make_run(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", rows_with_steps())
    out = tmp_path / "new" / "page.html"
    found = inspect(tmp_path / "out", rows, output_file=out)
    with pytest.raises(UserError, match="exists"):
        inspect(tmp_path / "out", rows, output_file=out)
    html = out.read_text()
    page = Page(html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert not [
        a for _, a in page.tags for name in ("src", "href", "xlink:href") if not a.get(name, "#").startswith("#")
    ]
    radios = [a for tag, a in page.tags if tag == "input"]
    assert [a["id"] for a in radios] == [f"by-{name}" for name in found.scales] and "checked" in radios[0]
    assert [a["for"] for tag, a in page.tags if tag == "label"] == [a["id"] for a in radios]
    assert page.text.count("✗ first wrong") == sum(r.first_wrong_step is not None for r in found.responses) == 1
    assert len(page.titles) == sum(len(r.actions) for r in found.responses)
    assert [tag for tag, _ in page.tags].count("svg") == len(found.responses) == 2
    assert "prefers-color-scheme: dark" in html and "viewport" in html


def test_each_token_has_the_colour_of_each_view_and_its_numbers():
    one = response([0.1, -0.9, 0.02], step_ends=[0, 2], first_wrong=1, texts=["a", "E", "b\n", "c"], env=(1,))
    page = Page(rendered(inspection(one)))
    tokens = [a for tag, a in page.tags if tag == "span" and a.get("title")]
    assert [a.get("class") for a in tokens] == [None, "advantage-m4 kl-p4", None]
    assert tokens[1]["title"] == "advantage −0.900\nKL 0.900\nlog π −1.900\nlog ref −1.900\nimplied value 0.600"
    assert [a for tag, a in page.tags if a.get("class") == "env"] == [{"class": "env"}]
    assert "−0.880" in page.text and "lowest" in page.text  # the second step's sum
    assert "value model" not in page.text.split("How to read")[0]


def test_hostile_text_is_shown_and_is_no_markup():
    one = response([1.0, 1.0], texts=[HOSTILE, "$x_1$"], prompt=HOSTILE, source=HOSTILE)
    html = rendered(inspection(one, directory=HOSTILE, notes=[HOSTILE]))
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags} and page.text.count("<script>alert(1)</script>") >= 5
    assert not {c for c in html if ord(c) < 32} - {"\n"}


def test_scales_levels_and_numbers_of_steps():
    columns = [np.array([0.1, -0.5]), np.array([0.2])]
    assert scale_of(VIEWS["advantage"], columns) == 0.5
    assert scale_of(VIEWS["value"], columns) == 1.0  # small values look small
    assert scale_of(VIEWS["kl"], [np.zeros(3)]) == 1.0
    many = [np.r_[np.full(99, 0.1), 50.0]]
    assert scale_of(VIEWS["advantage"], many) == pytest.approx(0.1)  # one outlier takes no colour from the others
    assert levels(np.array([0.0, 0.04, -0.1, 0.5, -9.0, np.nan]), 0.5).tolist() == [0, 0, -1, LEVELS, -LEVELS, 0]
    values = np.array([1.0, 3.0, 5.0])
    assert step_numbers(VIEWS["advantage"], values, [0, 2]).tolist() == [1.0, 8.0]
    assert step_numbers(VIEWS["value"], values, [0, 2]).tolist() == [1.0, 4.0]
    assert [number_text("advantage", x) for x in (0.1, -0.0001)] == ["+0.100", "0.000"]
    assert [number_text("kl", x) for x in (0.1, -0.1)] == ["0.100", "-0.100"]


def test_a_response_is_marked_by_its_label_and_not_by_the_pay_of_its_last_token():
    def drawn(label):
        html = rendered(
            inspection(response([0.1, 0.2], label=label, reward=1.0))
        )  # a potential leaves the last token 0
        return html[html.index("<svg") : html.rindex("</svg>")]

    assert drawn(True) != drawn(False)

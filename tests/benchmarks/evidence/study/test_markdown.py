"""The study's tables as Markdown, and the page that has them."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence.study.markdown import (
    ablations_table,
    claims_table,
    confirmed_table,
    difference_text,
    overview,
    table_of,
)

ROOT = Path(__file__).parents[4]
RECORDED = json.loads((ROOT / "benchmarks/results/study.json").read_text())
PAGE = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("evidence_results", "evidence_more"))


@pytest.mark.parametrize("task", list(RECORDED["rows"]))
def test_the_page_has_the_recorded_table_of_a_task(task):
    assert [line for line in table_of(task, RECORDED["rows"][task]) if line not in PAGE] == []


def test_the_page_has_the_other_recorded_tables():
    tables = [overview(RECORDED["rows"]), claims_table(RECORDED["claims"]), ablations_table(RECORDED["ablations"])]
    confirmed = RECORDED.get("confirmed", [])
    tables += [*map(confirmed_table, confirmed), claims_table(confirmed)]
    assert [line for table in tables for line in table if line not in PAGE and len(table) > 2] == []


def row(name, mean, **told):
    measure = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "of_seeds": [mean, mean]}
    return {"method": name, "accuracy": measure, "greedy": measure, "sampling": measure} | told


def test_the_best_is_bold_and_a_setting_is_told_shortly():
    gap = {"mean": 0.2, "low": -0.1, "high": 0.5}
    rows = [
        row("base", 0.3, **{"dqo ahead": gap | {"holm": 0.0003}}),
        row("dpo", 0.4, setting={"learning_rate": 3e-5, "beta": 0.8}, failed=1, cpu_seconds=9.6)
        | {"dqo ahead": gap | {"holm": 0.9}, "verdict": "does not earn its place"},
        row("dqo", 0.5, setting={"learning_rate": 1e-4, "is_level": "none"}, failed=0, cpu_seconds=8.0),
    ]
    heads, _, base, dpo, dqo = table_of("a", rows)
    assert "| `dqo` ahead | verdict on `dqo` |" in heads and "dqo-nll" not in heads
    assert "| +20.0 (−10.0 to 50.0), p 0.0003 |" in base
    assert dpo.endswith("| +20.0 (−10.0 to 50.0) | no place | 10 | 3e-5, 0.8; 1 ended itself |")
    assert dqo == "| `dqo` | **50.0** (45.0–55.0) | **50.0** | **50.0** | 50, 50 |  |  | 8 | 1e-4, none |"
    assert overview({"a": rows})[-1] == "| `dqo` | **50.0** ± 5.0 | **50.0** | **50** |"


def test_the_overview_has_means_of_what_was_run_on_all_tasks_that_are_tuned():
    rows = {
        "a": [row("dqo", 0.5), row("kto", 0.4)],
        "g2": [row("dqo", 0.1)],
        "c": [row("kto", 0.8)],
        "d": [row("kto", 0.0)],
    }
    heads, _, kto, dqo = overview(rows)
    assert heads == "| method | `a` | `g2` | `c` | `d` | mean of 3 | lowest seed |"
    assert kto == "| `kto` | 40.0 ± 5.0 |  | **80.0** ± 5.0 | **0.0** ± 5.0 | **40.0** | **0** |"
    assert dqo == "| `dqo` | **50.0** ± 5.0 | **10.0** ± 5.0 |  |  |  |  |"


def test_differences_have_a_sign_and_p_values_an_exponent():
    assert difference_text({"mean": -0.073, "low": -0.112, "high": -0.034, "holm": 2.8e-5}).endswith("p 2.8e-05")
    assert difference_text({"mean": -0.073, "low": -0.112, "high": -0.034}) == "−7.3 (−11.2 to −3.4)"
    assert difference_text(None) == ""


def test_a_change_that_one_task_has_not_leaves_its_cells_empty():
    told = {"seeds": [0, 2], "cpu_seconds": 3.2}
    rows = [
        {"task": "a", "change": "no warm-up", "accuracy": [0.1, -0.05]} | told,
        {"task": "b14", "change": "lambda 0.9", "accuracy": [-0.02, -0.04]} | told,
    ]
    assert ablations_table(rows)[2:] == [
        "| no warm-up | +2.5 | +10.0, −5.0 | 3 |  |  |  |",
        "| lambda 0.9 |  |  |  | −3.0 | −2.0, −4.0 | 3 |",
    ]

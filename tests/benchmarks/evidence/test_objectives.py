"""The comparison of all objectives: what is planned, its file of prefix values, its table, and the whole of it at a tiny size."""

import dataclasses
import json

import pytest

from benchmarks.evidence import objective_options, objectives, objectives_table
from benchmarks.evidence.objective_options import BUDGET, OPTIONS, RECIPE
from benchmarks.evidence.objectives import comparison, with_prefix_values
from dqo.commands.compare import compare_command
from dqo.comparison.plan import flags_of, plan
from dqo.config.options import load_options
from dqo.data.rows import Row, read_rows, write_rows
from dqo.demo.rollouts import graded_rows
from dqo.models.new import save
from dqo.objectives.registry import OBJECTIVES
from tests.dqo.helpers import TASK, policy, rollout_rows, tokenizer

SAMPLE_OR_ASK = {"xpo", "adpo", "zpg"}
OF_COMPARE = {"methods", "seeds", "output_dir"}


def test_every_objective_makes_the_same_updates_from_as_many_responses(tmp_path):
    assert set(OBJECTIVES) - SAMPLE_OR_ASK == set(OPTIONS)
    flags = flags_of(comparison(list(OPTIONS), tmp_path / "demo", tmp_path / "out"))
    runs, firsts = plan(list(OPTIONS), 1, tmp_path / "out", [flag for flag in flags if flag.name not in OF_COMPARE])
    for run, first in zip(runs, firsts):
        options = load_options(run.arguments)
        warmup = options.train.value_warmup_steps if options.trains_values else 0
        assert options.train.max_steps - warmup == BUDGET["max_steps"], run.method
        size = OBJECTIVES[run.method].group_size or RECIPE.samples
        assert options.train.per_device_train_batch_size * size == BUDGET["per_device_train_batch_size"], run.method
        assert (warmup > 0) == first.objective.needs_values, run.method


def test_a_prefix_is_worth_the_mean_outcome_of_the_responses_that_begin_with_it():
    def row(completion, reward, prompt="p"):
        return Row(prompt=prompt, completion=completion, reward=reward, steps=[[0, 1], [1, 2]], step_rewards=[0.0, 0.0])

    rows = with_prefix_values([row("ab", 1.0), row("ac", 0.0), row("ab", 0.0), row("xb", 1.0), row("ab", 1.0, "q")])
    assert [r.step_rewards for r in rows] == [[1 / 3, 0.5], [1 / 3, 0.0], [1 / 3, 0.5], [1.0, 1.0], [1.0, 1.0]]
    assert [r.reward for r in rows] == [1.0, 0.0, 0.0, 1.0, 1.0]


def test_lines_of_code_are_counted_by_hand(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('"""One.\n\nTwo."""\n\nimport os  # a comment\n\n# more\nbeta = 1\n"""What it\nis."""\n\nx = "a"\n')
    assert objectives_table.code_lines(path) == 3


@pytest.fixture
def demonstration(tmp_path):
    """A directory as `dqo demo` leaves it, with a tiny model."""
    place = tmp_path / "demo"
    save(policy(), tokenizer(), place / "base")
    for seed, name in enumerate(("rollouts", "held_out")):
        rows = [
            r
            for row in rollout_rows(12, 4, seed)
            for r in graded_rows(TASK, row["prompt"], [(row["completion"], True)])
        ]
        (place / "data").mkdir(exist_ok=True)
        write_rows(place / "data" / f"{name}.jsonl", rows)
    (place / "demo.json").write_text('{"seed": 0}')
    return place


@pytest.mark.slow
def test_the_comparison_goes_on_and_tells_what_it_measured(demonstration, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(objectives_table, "RESULTS", tmp_path / "results")
    tiny = dataclasses.replace(RECIPE, min_steps=TASK.min_steps, max_steps=TASK.max_steps, eval_problems=4)
    monkeypatch.setattr(objectives, "RECIPE", tiny)
    monkeypatch.setitem(BUDGET, "per_device_train_batch_size", 8)
    monkeypatch.setattr(objective_options, "WARMUP", 1)
    monkeypatch.setattr(objectives, "compare", compare_command)  # in this process
    words = [str(demonstration), "--output_dir", str(tmp_path / "out"), "--updates", "2"]
    objectives.main([*words, "--methods", "rto"])  # after dpo, which it reads
    monkeypatch.setattr(objectives, "compare", None)
    objectives.main([*words, "--methods", "dpo", "rto"])  # nothing is left to train
    found = json.loads((tmp_path / "results" / "objectives.json").read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["base", "dpo", "rto"]
    assert {name: (r["updates"], r["updates_of_critic_alone"]) for name, r in rows.items() if name != "base"} == {
        "dpo": (2, 0),
        "rto": (2, 1),
    }
    for row in (rows["dpo"], rows["rto"]):
        assert row["kl"] > 0 and row["cpu_seconds"] > 0 and 0 <= row["auc"]["mean"] <= 1 and row["code_lines"] > 5
    assert rows["rto"]["cpu_seconds_with_needs"] == rows["rto"]["cpu_seconds"] + rows["dpo"]["cpu_seconds"]
    assert (tmp_path / "results" / "objectives.svg").exists()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 * 5 and len({line.count("|") for line in lines}) == 1
    paid = {p for row in read_rows(str(tmp_path / "out-data" / "prefix_values.jsonl")) for p in row.step_rewards}
    assert {0.0, 1.0} < paid

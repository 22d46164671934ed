"""The experiments with critics: what is measured, that they go on, and one of them on a tiny model."""

import json

import numpy as np
import pytest

from benchmarks.evidence import critic_quality, critic_runs, critic_table, critics
from benchmarks.evidence.critic_table import summarise, tables
from dqo.config.options import options_of
from dqo.data.rows import read_rows, write_rows
from dqo.demo.recipe import Recipe
from dqo.demo.rollouts import graded_rows
from dqo.grading.arith import ArithTask
from dqo.models.new import save
from tests.dqo.helpers import TASK, episodes, policy, rollout_rows, tokenizer

STAGES = ("screen", "policy", "lambda")


def test_what_a_critic_knows_by_hand():
    found = episodes(4)
    for episode in found:
        count = len(episode.completion_ids)
        episode.step_ends, episode.step_rewards = list(range(count)), [0.0] * (count - 1) + [-1.0]
        episode.first_wrong_step = count - 1
    knowing = [np.full(e.action_count, e.reward) for e in found]
    said = critic_quality.quality_of_values(knowing, found)
    assert said["explained_variance/start"] == said["explained_variance/all"] == said["auc/end"] == 1
    assert said["mean/right"] == 1 and said["mean/wrong"] == 0
    assert critic_quality.explained_variance(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(-3)
    blaming = [np.append(np.ones(e.action_count - 1), -1.0) for e in found]
    assert critic_quality.quality_of_scores(blaming, found)["first_wrong_step"] == 1
    assert critic_quality.quality_of_scores([-b for b in blaming], found)["first_wrong_step"] == 0


def test_exact_chances_are_those_of_the_demonstrator_at_the_ends_of_lines():
    task, prompt = ArithTask(4, 4, hard_share=1.0), "3*7-2+5*4="
    text = task.solution(prompt)
    rates = critic_quality.pass_rates(task, prompt, text)
    assert len(rates) == len(text) + 1 and rates[0] == task.pass_rate(prompt) < 1
    assert rates[5] == rates[6] == rates[10] == task.pass_rate(prompt, text[:6])  # from the digit to before the next
    assert rates[-4] == rates[-1] == 1 > rates[-5]  # the last step decides
    assert critic_quality.pass_rates(task, prompt, text[:-1] + "x")[-1] == 0


def test_every_run_has_options_of_the_trainer_and_the_same_updates_of_the_policy(tmp_path):
    runs = [run for stage in STAGES for run in critics.planned(stage)]
    assert len({run.directory(tmp_path) for run in runs}) == len(runs)
    for run in runs:
        if run.stage == "screen" or run.variant == critics.DEFAULT:  # from which others take their values
            (run.directory(tmp_path) / "run").mkdir(parents=True)
    one_each = {(run.stage, run.variant): run for run in runs}.values()
    for run in one_each:
        options = options_of(critics.spec_of(run, tmp_path)["options"] | {"output_dir": "out"}, run.variant).train
        policy_updates = options.max_steps - options.value_warmup_steps
        assert policy_updates == (0 if run.stage == "screen" else critics.POLICY_UPDATES), run


def test_only_what_has_no_result_of_these_options_is_run(tmp_path, monkeypatch):
    made = []

    def make(run, output):
        made.append(run.variant)
        path = run.directory(output) / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"spec": critics.spec_of(run, output)}))
        return run.variant != "head"

    monkeypatch.setattr(critics, "make", make)
    monkeypatch.setattr(critics, "make_task", lambda *_: None)
    runs = [run for run in critics.planned("policy") if run.task == "6-10" and run.seed == 0]
    failed = critics.go_on(runs, tmp_path, tmp_path)
    assert made == [run.variant for run in runs] and [run.variant for run in failed] == ["head"]
    made.clear()
    runs[1].options["beta"] = 0.7
    critics.go_on(runs, tmp_path, tmp_path)
    assert made == [runs[1].variant]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """OUT with a tiny task in it."""
    task = tmp_path / "tasks" / "6-10"
    save(policy(), tokenizer(), task / "base")
    for seed, name in enumerate(("rollouts", "held_out")):
        rows = rollout_rows(prompts=12, samples=4, seed=seed)
        graded = [row for r in rows for row in graded_rows(TASK, r["prompt"], [(r["completion"], True)])]
        write_rows(task / f"{name}.jsonl", graded)
    tiny = Recipe(min_steps=2, max_steps=4, eval_problems=4)
    monkeypatch.setitem(critic_runs.TASKS, "6-10", critic_runs.Task(tiny))
    exact = critic_runs._quality_of_pass_rates(critic_runs.TASKS["6-10"], tokenizer(), task / "held_out.jsonl")
    assert (
        exact["explained_variance/end"] == exact["auc/end"] == 1 and len(read_rows(str(task / "held_out.jsonl"))) == 48
    )
    told = {"name": "6-10", "seed": 0, "base": {"greedy": 0.5, "sampling": 0.5}, "exact": exact}
    critic_runs.write_json(task / "task.json", told)
    return tmp_path


def test_a_run_is_measured_and_stands_in_the_table(place, monkeypatch):
    def in_this_process(command, **_):
        critic_runs.run(critic_runs.Path(command[-1]))
        return critics.subprocess.CompletedProcess(command, 0)

    small = {"max_steps": 3, "value_warmup_steps": 1, "per_device_train_batch_size": 8}
    alone = {"max_steps": 2, "value_warmup_steps": 2, "per_device_train_batch_size": 8}
    runs = [
        critics.Planned("policy", "6-10", "separate", 0, critics.SEPARATE | small, ()),
        critics.Planned("policy", "6-10", "none", 0, {"value_model": "none"} | small, ()),
        critics.Planned(
            "policy", "6-10", "implied", 0, critics.FROZEN["implied"] | small | {"value_warmup_steps": 0}, ()
        ),
        critics.Planned("screen", "6-10", "head-1e-3", 100, critics.HEAD | alone, (1,)),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(critics.subprocess, "run", in_this_process)
        assert critics.go_on(runs, place, place) == []
    results = [(run, critics.result_of(run, place)) for run in runs]
    separate, _, implied, screened = (result for _, result in results)
    assert [stage["update"] for stage in screened["stages"]] == [0, 1, 2] and "greedy" not in screened
    assert len(separate["greedy"]) == 4 and len(separate["sampling"][0]) == critic_runs.SAMPLES
    assert separate["updates"] == 3 and separate["cpu_seconds"] > 0
    # V is implied from before the first update on
    assert implied["stages"][0]["value"] == implied["stages"][-1]["value"] != separate["stages"][-1]["value"]
    before = screened["stages"][0]  # V = 0 and pi = ref: neither says anything
    assert before["value"]["auc/end"] == 0.5 and before["log_ratio"]["auc"] == pytest.approx(0.5, abs=0.2)
    told = [json.loads((place / "tasks" / "6-10" / "task.json").read_text())]
    summary = json.loads(json.dumps(summarise(results, told, critics.DEFAULT, ["another"])))
    assert [row["update"] for row in summary["screen"]] == [1, 2]
    rows = {row["variant"]: row for row in summary["policy"]}
    assert "p_value" in rows["none"]["greedy"] and "p_value" not in rows["separate"]["greedy"]
    text = tables(summary)
    assert "| exact chance |" in text and "| none |" in text and "Not run: 1 runs" in text


def test_a_difference_to_the_default_is_paired_over_the_seeds_that_both_have():
    def result(seed, variant, greedy):
        stage = {"value": {"x": 0.0}, "log_ratio": {"x": None}}
        found = {"updates": 1, "cpu_seconds": 1.0, "wall_seconds": 1.0, "stages": [stage], "spec": {"options": {}}}
        run = critics.Planned("policy", "6-10", variant, seed, {}, ())
        return run, found | {"greedy": greedy, "sampling": [[g, 0] for g in greedy]}

    results = [result(0, "separate", [0, 0, 1, 1]), result(1, "separate", [0, 0, 0, 0])]
    results += [result(0, "head", [1, 0, 1, 1]), result(1, "head", [1, 1, 0, 0]), result(2, "head", [1, 1, 1, 1])]
    row = summarise(results, [], "separate", [])["policy"][1]
    assert row["greedy"]["minus_default"] == pytest.approx((1 + 2) / 8)  # seeds 0 and 1
    assert row["sampling"]["minus_default"] == pytest.approx((1 + 2) / 16)
    over_seeds = row["greedy"]["over_seeds"]  # 1/4 and 2/4
    assert over_seeds["mean"] == pytest.approx(3 / 8) and over_seeds["low"] == pytest.approx(
        3 / 8 - 12.706 / 8, rel=1e-3
    )
    assert critic_table._difference_text(row["greedy"]) == "+37.5 (-121.3 to +196.3)"
    assert (row["greedy"]["mean"], row["greedy"]["low"], row["greedy"]["high"]) == (0.75, 0.5, 1.0)

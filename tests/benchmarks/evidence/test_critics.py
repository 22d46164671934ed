"""The experiments with critics: what is measured, that they go on, and one of them on a tiny model."""

import functools
import json

import numpy as np
import pytest

from benchmarks.evidence import critic_quality, critic_runs, critic_table, critics, pieces
from benchmarks.evidence.critic_table import summarise, tables, with_earlier
from dqo.config.options import options_of
from dqo.data.rows import read_rows, write_rows
from dqo.demo.recipe import Recipe
from dqo.demo.rollouts import graded_rows
from dqo.errors import UserError
from dqo.grading.arith import ArithTask
from dqo.models.new import save
from tests.dqo.helpers import TASK, episodes, policy, rollout_rows, tokenizer

EVERY = [run for stage in critics.STAGES for run in critics.planned(stage)]


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
    assert len({run.place for run in EVERY}) == len(EVERY)
    for run in EVERY:
        if run.stage == "screen" or run.variant == critics.DEFAULT:  # from which others take their values
            (tmp_path / run.place / "run").mkdir(parents=True)
    one_each = {(run.stage, run.variant): run for run in EVERY}.values()
    for run in one_each:
        options = options_of(critics.spec_of(run, tmp_path)["options"] | {"output_dir": "out"}, run.variant).train
        policy_updates = options.max_steps - options.value_warmup_steps
        assert policy_updates == (0 if run.stage == "screen" else critics.POLICY_UPDATES), run


def test_only_what_has_no_result_of_these_options_is_run(tmp_path, monkeypatch, capsys):
    made = []

    def run(command, **_):
        directory = critics.Path(command[-1])
        made.append(directory.parent.name)
        result = {"spec": json.loads((directory / "spec.json").read_text())}
        if made != ["separate", "separate-cold"]:
            (directory / "result.json").write_text(json.dumps(result))
        return critics.subprocess.CompletedProcess(command, int(made == ["separate", "separate-cold"]))

    def task(_, __, directory):
        directory.mkdir(parents=True)
        (directory / "task.json").write_text("{}")

    monkeypatch.setattr(critics.subprocess, "run", run)
    monkeypatch.setattr(critics, "make_task", task)
    runs = [run for run in critics.planned("policy") if run.task == "6-10" and run.seed == 0]

    def go_on():
        made.clear()
        return pieces.go_on(runs, tmp_path, 1, critics.result_of, lambda *given: critics.make(*given, tmp_path))

    assert go_on() == 1 and made == [run.variant for run in runs]
    assert "separate-cold/seed-0/log.txt" in capsys.readouterr().err
    assert go_on() == 0 and made == ["separate-cold"]
    runs[3].options["beta"] = 0.7
    assert go_on() == 0 and made == [runs[3].variant]


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
        work = functools.partial(critics.make, demonstration=place)
        assert pieces.go_on(runs, place, 1, critics.result_of, work) == 0
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
    summary = summarise(results, told, critics.DEFAULT, critics.DQO)
    another = [critics.Planned("policy", "6-10", "none", 1, runs[1].options, ())]
    summary = json.loads(json.dumps(with_earlier(summary, None, [*runs, *another], critics.DQO)))
    assert summary["not_run"] == ["policy 6-10 none 1"]
    assert [row["update"] for row in summary["screen"]] == [1, 2]
    rows = {row["variant"]: row for row in summary["policy"]}
    assert "p_value" in rows["none"]["greedy"] and "p_value" not in rows["separate"]["greedy"]
    text = tables(summary)
    assert "| exact chance |" in text and "| none |" in text and "Not run: 1 runs" in text


def result(seed, variant, greedy, stage="policy", **options):
    """A planned run and its invented result."""
    value = {"explained_variance/end": 0.0, "changes/first_wrong_step": 0.0}
    look = {"update": 1, "value": value, "log_ratio": {"first_wrong_step": 0.0}}
    found = {"updates": 1, "cpu_seconds": 1.0, "wall_seconds": 1.0, "stages": [look]}
    run = critics.Planned(stage, "6-10", variant, seed, options, ())
    return run, found | {"greedy": greedy, "sampling": [[g, 0] for g in greedy]}


def test_a_difference_to_the_default_is_paired_over_the_seeds_that_both_have():
    results = [result(0, "separate", [0, 0, 1, 1]), result(1, "separate", [0, 0, 0, 0])]
    results += [result(0, "head", [1, 0, 1, 1]), result(1, "head", [1, 1, 0, 0]), result(2, "head", [1, 1, 1, 1])]
    row = summarise(results, [], "separate", {})["policy"][1]
    assert row["greedy"]["minus_default"] == pytest.approx((1 + 2) / 8)  # seeds 0 and 1
    assert row["sampling"]["minus_default"] == pytest.approx((1 + 2) / 16)
    over_seeds = row["greedy"]["over_seeds"]  # 1/4 and 2/4
    assert over_seeds["mean"] == pytest.approx(3 / 8) and over_seeds["low"] == pytest.approx(
        3 / 8 - 12.706 / 8, rel=1e-3
    )
    assert critic_table._difference_text(row["greedy"]) == "+37.5 (−121.3 to 196.3)"
    assert (row["greedy"]["mean"], row["greedy"]["low"], row["greedy"]["high"]) == (0.75, 0.5, 1.0)


def test_rows_of_another_out_stay_beside_those_of_more_seeds_or_other_options():
    common = {"lam": 1.0}
    first = [result(seed, name, [0, 1]) for seed in (0, 1) for name in ("separate", "head")]
    first += [result(0, "none", [0, 0]), result(0, "lam-0.9-none", [1, 1], "lambda", value_model="separate")]
    earlier = with_earlier(summarise(first, [{"name": "6-10"}], "separate", common), None, [], common)
    for row in (row for stage in critics.STAGES for row in earlier[stage]):
        row["recorded"] = row["recorded"] | {"commit": "abc1234"}
    second = [result(0, "separate", [1, 1]), *[result(seed, "head", [1, 1]) for seed in (0, 1)]]
    planned = [run for run, _ in [*first[:5], result(2, "head", [])]]
    planned += [critics.Planned("lambda", "6-10", "lam-0.9-none", 0, {"value_model": "head"}, ())]
    found = with_earlier(summarise(second, [], "separate", common), json.loads(json.dumps(earlier)), planned, common)
    assert [(row["variant"], row["seeds"], row["recorded"]["commit"] == "abc1234") for row in found["policy"]] == [
        ("separate", [0, 1], True),  # of more seeds
        ("head", [0, 1], False),
        ("none", [0], True),
    ]
    assert found["policy"][0]["greedy"]["mean"] == 0.5 and found["tasks"] == [{"name": "6-10"}]
    assert found["lambda"][0]["other_options"] == {"value_model": "separate"}
    assert found["not_run"] == ["policy 6-10 head 2", "lambda 6-10 lam-0.9-none 0"]
    text = tables(found | {"tasks": []})
    assert "| separate (1) |" in text and "| head |" in text and "| lam-0.9-none (2) |" in text
    assert "(1) recorded" in text and "commit abc1234" in text and "; with value_model separate." in text
    for run, _ in second[:1]:
        run.options["beta"] = 0.7  # the recorded row of more seeds has another beta
    found = with_earlier(summarise(second, [], "separate", common), earlier, planned, common)
    assert found["policy"][0]["seeds"] == [0]
    found["lambda"][0]["recorded"] = found["policy"][0]["recorded"]  # its options alone are others
    assert "| lam-0.9-none (3) |" in tables(found | {"tasks": []})


def summary_on(base, results):
    """Of an OUT whose base models have this accuracy."""
    exact = {f"explained_variance/{at}": base for at in ("start", "half", "end")} | {"auc/half": base, "auc/end": base}
    exact |= {"changes/first_wrong_step": base, "changes/first_wrong_step_chance": base}
    tasks = [{"name": name, "base": {"greedy": base}, "exact": exact} for name in ("6-10", "8-12")]
    for run, found in results:
        if run.stage == "screen":
            found["stages"][0]["value"], found["stages"][0]["cpu_seconds"] = exact, 1.0
    return summarise(results, tasks, "separate", {})


def test_rows_on_different_base_models_never_stand_in_one_table(tmp_path, capsys):
    old = [result(0, "separate", [0, 1]), result(1, "separate", [0, 1]), result(0, "none", [0, 1])]
    old += [result(0, "lam-1.0-trajectory", [0, 1], "lambda"), result(100, "head-1e-3", [0, 1], "screen")]
    recorded = with_earlier(summary_on(0.2, old), None, [run for run, _ in old], {})
    assert [task["name"] for task in recorded["tasks"]] == ["6-10"]  # nothing stands on the other
    path = tmp_path / "critics.json"
    for row in (row for stage in critics.STAGES for row in recorded[stage]):
        del row["base"]  # as an earlier version recorded it
    path.write_text(json.dumps(recorded))
    capsys.readouterr()

    new = [result(0, "separate", [1, 1])]
    found = with_earlier(summary_on(0.3, new), critic_table.read(path), [run for run, _ in [*old, *new]], {})
    said = "policy 6-10: recorded rows left out, as their base model is another than OUT's: 2"
    assert capsys.readouterr().out.splitlines() == [said]
    assert [(row["variant"], row["seeds"], row["base"]) for row in found["policy"]] == [
        ("separate", [0], {"greedy": 0.3})
    ]
    assert "policy 6-10 none 0" in found["not_run"]
    assert [row["base"]["greedy"] for row in [*found["lambda"], *found["screen"]]] == [0.2, 0.2]
    assert [(task["name"], task["base"]["greedy"]) for task in found["tasks"]] == [("6-10", 0.3), ("6-10", 0.2)]
    assert "| exact chance |  |  | 0.200 |" in tables(found) and "0.300" not in tables(found)

    path.write_text(json.dumps(found))  # with both bases of the task
    screened = with_earlier(
        summary_on(0.3, [result(100, "head-1e-3", [0, 1], "screen")]), critic_table.read(path), [], {}
    )
    assert "screen 6-10" in capsys.readouterr().out and len(screened["policy"]) == 1
    assert "| exact chance |  |  | 0.300 |" in tables(screened) and "0.200" not in tables(screened)
    same = with_earlier(summary_on(0.2, old[2:3]), critic_table.read(path), [], {})
    assert [row["variant"] for row in same["lambda"]] == ["lam-1.0-trajectory"]

    path.write_text("<<<<<<< ours\n")
    with pytest.raises(UserError, match="critics.json: these are no recorded critics .*from git again"):
        critic_table.read(path)


def test_the_recorded_file_is_written_by_record_alone(tmp_path, monkeypatch, capsys):
    recorded, output = tmp_path / "critics.json", tmp_path / "out"
    monkeypatch.setattr(critics, "RESULTS", recorded)
    critics.main([str(output), "--table", "--record"])
    assert "nothing is written" in capsys.readouterr().out and not recorded.exists()
    earlier = summary_on(0.2, [result(seed, "head-warm", [0, 1]) for seed in (0, 1)])
    recorded.write_text(json.dumps(with_earlier(earlier, None, [], {})))
    before = recorded.read_bytes()
    critics.main([str(output), "--table", "--record"])
    said = capsys.readouterr().out
    assert "this is what was recorded" in said and "| 6-10 | head-warm | 2 |" in said
    assert recorded.read_bytes() == before and not output.exists()

    task = {"name": "6-10", "base": {"greedy": 0.9}, "exact": {}}
    (output / "tasks/6-10").mkdir(parents=True)
    critic_runs.write_json(output / "tasks/6-10/task.json", task)
    run, (_, found) = critics.planned("policy")[0], result(0, "separate", [0, 1])
    (output / run.place).mkdir(parents=True)
    critic_runs.write_json(output / run.place / "result.json", found | {"spec": critics.spec_of(run, output)})
    critics.main([str(output), "--table"])
    assert recorded.read_bytes() == before
    own = (output / "critics.json").read_text()
    assert [(row["variant"], row["seeds"]) for row in json.loads(own)["policy"]] == [("separate", [0])]
    critics.main([str(output), "--table", "--record"])
    assert recorded.read_text() == own
    assert "| 6-10 | separate |" in capsys.readouterr().out


def test_what_was_recorded_is_planned_still():
    """But for the one row of lambda, which was made with another winner."""
    earlier = json.loads(critics.RESULTS.read_text())
    today = {(run.stage, run.variant): critics.DQO | run.options for run in EVERY}
    for stage in critics.STAGES:
        for row in earlier[stage]:
            assert stage == "lambda" or row["options"] == today[stage, row["variant"]], row["variant"]
    assert all(options["value_model"] == "head" for (stage, _), options in today.items() if stage == "lambda")

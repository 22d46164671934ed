"""The demonstration on a recipe so small that it proves the path, not the claim."""

import json

import pytest

from dqo.demo.recipe import DemoConfig, Recipe
from dqo.demo.run import run_demo
from dqo.errors import UserError

pytestmark = pytest.mark.slow

TINY = Recipe(
    min_steps=2,
    max_steps=3,
    hidden_size=32,
    layers=2,
    heads=4,
    intermediate_size=64,
    demonstrations=12288,
    prompts=128,
    eval_problems=20,
    eval_samples=2,
    held_out_problems=20,
    batch=64,
    updates=3,
    value_warmup_updates=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    return run_demo(DemoConfig(output_dir=str(output)), TINY), output


def test_it_goes_from_nothing_to_a_self_contained_report(finished):
    path, output = finished
    page = path.read_text()
    assert path == output / "report.html"
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "").replace("https://arxiv.org", "")
    report = json.loads((output / "report.json").read_text())
    assert [m["name"] for m in report["methods"]] == ["base", *TINY.methods]
    assert all(len(m["greedy"]) == 20 and len(m["sampling"][0]) == 2 for m in report["methods"])


def test_dqo_weighs_the_base_models_samples(finished):
    _, output = finished
    record = json.loads((output / "dqo" / "run.json").read_text())["importance_weights"]
    assert (record["is_level"], record["option"]) == ("trajectory", "auto")
    assert record["at_start"] == {"effective_share": 1.0, "mean": 1.0}


def test_every_method_makes_the_same_number_of_policy_updates(finished):
    _, output = finished
    steps = {m["name"]: m.get("updates") for m in json.loads((output / "report.json").read_text())["methods"]}
    two_more = {"dqo": 5, "dqo-steps": 5}  # of the value model alone
    assert steps == {"base": None} | dict.fromkeys(TINY.methods, 3) | two_more


def test_problems_of_data_and_evaluation_are_distinct(finished):
    _, output = finished
    prompts = {
        name: {json.loads(line)["prompt"] for line in (output / "data" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("demonstrations", "more_demonstrations", "rollouts", "half_right", "held_out")
    }
    assert prompts["half_right"] <= prompts["rollouts"]
    assert not prompts["rollouts"] & prompts["held_out"]
    assert not (prompts["demonstrations"] | prompts["more_demonstrations"]) & (
        prompts["rollouts"] | prompts["held_out"]
    )


def test_the_rollouts_carry_exact_step_marks(finished):
    from dqo.grading.arith import ArithTask

    _, output = finished
    task = ArithTask(2, 3)
    for line in (output / "data" / "rollouts.jsonl").read_text().splitlines():
        row = json.loads(line)
        grade = task.grade(row["prompt"], row["completion"])
        assert row["label"] == (grade.correct and row["finish_reason"] == "stop")
        assert [reward < 0 for reward in row["step_rewards"]] == [not right for right in grade.step_correct]


def test_two_methods_read_labels_of_steps_and_all_the_same_responses(finished):
    _, output = finished
    rows = [json.loads(line) for line in (output / "data" / "half_right.jsonl").read_text().splitlines()]
    wrong = [row["step_rewards"].count(-1.0) for row in rows if not row["label"]]
    assert 0 < sum(row["label"] for row in rows) < 0.2 * len(rows) and min(wrong) > 0
    configured = {name: (output / name / "config.yaml").read_text() for name in TINY.methods}
    used = {name: text.split("process_reward: ")[1].split()[0] for name, text in configured.items()}
    assert used == dict.fromkeys(TINY.methods, "none") | {"dqo-steps": "additive"}
    others = {"sft-continued": "more_demonstrations", "rft-steps": "right_steps"}
    assert all(f"{others.get(name, 'half_right')}.jsonl" in configured[name] for name in TINY.methods)
    steps = [json.loads(line) for line in (output / "data" / "right_steps.jsonl").read_text().splitlines()]
    assert 0 < len(steps) <= len(rows) and not any(-1.0 in row["step_rewards"] for row in steps)


def test_the_same_command_goes_on_and_another_seed_is_refused(finished):
    path, output = finished
    before = json.loads((output / "report.json").read_text())["methods"]
    run_demo(DemoConfig(output_dir=str(output)), TINY)
    after = json.loads((output / "report.json").read_text())["methods"]
    assert [m["sampling"] for m in before] == [m["sampling"] for m in after]
    with pytest.raises(UserError, match="another seed or recipe"):
        run_demo(DemoConfig(output_dir=str(output), seed=5), TINY)


def test_a_used_directory_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="in use"):
        run_demo(DemoConfig(output_dir=str(tmp_path)), TINY)

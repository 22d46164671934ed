"""The demonstration on a recipe so small that it proves the path, not the claim."""

import json

import pytest
import yaml

from dqo.demo.recipe import SHOWN, DemoConfig, Recipe
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
    two_more = dict.fromkeys(SHOWN, 5)  # of the value model alone
    assert steps == {"base": None} | dict.fromkeys(TINY.methods, 3) | two_more


def test_problems_of_data_and_evaluation_are_distinct(finished):
    _, output = finished
    prompts = {
        name: {json.loads(line)["prompt"] for line in (output / "data" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("demonstrations", "rollouts", "half_right", "noisy_labels", "held_out")
    }
    assert prompts["half_right"] <= prompts["rollouts"]
    assert not prompts["rollouts"] & prompts["held_out"]
    assert not prompts["demonstrations"] & (prompts["rollouts"] | prompts["held_out"])


def test_the_rollouts_carry_exact_step_marks(finished):
    from dqo.grading.arith import ArithTask

    _, output = finished
    task = ArithTask(2, 3)
    for line in (output / "data" / "rollouts.jsonl").read_text().splitlines():
        row = json.loads(line)
        grade = task.grade(row["prompt"], row["completion"])
        assert row["label"] == (grade.correct and row["finish_reason"] == "stop")
        assert [reward < 0 for reward in row["step_rewards"]] == [not right for right in grade.step_correct]


def test_half_of_the_methods_read_labels_of_steps_and_two_of_them_wrong_ones(finished):
    _, output = finished
    exact, noisy = (
        [json.loads(line) for line in (output / "data" / name).read_text().splitlines()]
        for name in ("half_right.jsonl", "noisy_labels.jsonl")
    )
    assert 0 < sum(row["label"] for row in exact) < 0.2 * len(exact)
    assert min(row["step_rewards"].count(-1.0) for row in exact if not row["label"]) > 0
    assert [row["completion"] for row in exact] == [row["completion"] for row in noisy]
    turned = {
        (row["prompt"], row["completion"], i): a != b
        for row, other in zip(exact, noisy)
        for i, (a, b) in enumerate(zip(row["step_rewards"], other["step_rewards"]))
    }
    assert sum(turned.values()) == round(0.2 * len(turned))
    for name in TINY.methods:
        options = yaml.safe_load((output / name / "config.yaml").read_text())
        labelled = name.endswith(("-steps", "-noisy"))
        assert options["dataset_name"].endswith("noisy_labels.jsonl") == name.endswith("-noisy")
        assert (options["process_reward"] == "additive") == (labelled and name in SHOWN)
        assert (options.get("nll_on", options.get("imitate")) == "steps") == labelled


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

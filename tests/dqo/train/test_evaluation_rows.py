"""Rows that are evaluated after training, by two processes with sharded models as by one."""

import json

import pytest

from dqo.models.new import save
from tests.dqo import forked
from tests.dqo.evaluation.test_evaluate import VERIFIER
from tests.dqo.helpers import policy, rollout_rows, tokenizer
from tests.dqo.run_python import evaluated

pytestmark = pytest.mark.slow

RUNS = {
    # whose reference is refreshed, and which answers problems meanwhile
    "curry": {"method": "curry_dpo", "stages": 2, "max_steps": 4, "eval_steps": 2, "verifier": VERIFIER},
    "rto": {"method": "rto", "behavior": "reference", "max_steps": 2},  # with a frozen model beside the reference
    "oreo": {"method": "oreo", "max_steps": 2},  # whose loss reads the reference's logits
}


def test_two_processes_with_shards_evaluate_as_one_does(files):
    save(policy(seed=1), tokenizer(), files / "other")
    trained = {row["prompt"] for row in rollout_rows(prompts=12)}
    rows = [row for row in rollout_rows(prompts=9, seed=5) if row["prompt"] not in trained]
    tasks = [{"prompt": row["prompt"], "answer": "1"} for row in rows[::4]]
    (files / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    (files / "rows.json").write_text(json.dumps(rows))
    assert len(tasks) > 3
    plain = {"model_name_or_path": str(files / "model"), "dataset_name": str(files / "rollouts.jsonl")}
    plain |= {"eval_fraction": 0.2, "logging_steps": 1, "learning_rate": 1e-2, "max_completion_length": 8}
    by_two = {}
    for name, options in RUNS.items():
        options = plain | options
        if name == "curry":
            options |= {"eval_tasks": str(files / "tasks.jsonl"), "num_generations": 1}
        if name == "rto":
            options["dpo_model"] = str(files / "other")
        evaluated(files / f"{name}-one", options | {"per_device_train_batch_size": 8}, rows)
        by_two[str(files / f"{name}-two")] = options | {"per_device_train_batch_size": 4, "fsdp": True}
    (files / "runs.json").write_text(json.dumps(by_two))
    ends = forked.launch(files / "runs.json", files / "rows.json", entry="tests.dqo.run_python:main")
    assert [end.returncode for end in ends] == [0, 0], [end.stderr[-3000:] for end in ends]
    for name in RUNS:
        one, two = (json.loads((files / f"{name}-{many}" / "found.json").read_text()) for many in ("one", "two"))
        assert two["evaluate"] == pytest.approx(one["evaluate"], rel=2e-3, abs=2e-5), name
        for column, values in one["predict"].items():
            assert two["predict"][column] == pytest.approx(values, rel=2e-3, abs=2e-5), (name, column)
        answered = [[row.get("eval_accuracy") for row in found["logged"] if "eval_loss" in row] for found in (one, two)]
        assert answered[0] == answered[1] and (None in answered[0]) == (name != "curry")
    refreshed, first = (
        json.loads((files / f"{name}-two" / "found.json").read_text())["predict"]["ref_logps"]
        for name in ("curry", "oreo")
    )
    assert len(refreshed) == len(rows) and refreshed != pytest.approx(first, abs=1e-2)
    said = [(files / f"curry-{many}" / "generations.jsonl").read_text() for many in ("one", "two")]
    assert said[0] == said[1] and len(said[0].splitlines()) == 3 * min(5, len(tasks))

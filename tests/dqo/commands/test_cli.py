"""The commands as a user types them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dqo.commands import cli
from dqo.models.new import save
from tests.dqo.helpers import policy, rollout_rows, tokenizer

ROOT = Path(__file__).parents[3]


def dqo(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "dqo", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def files(tmp_path):
    save(policy(), tokenizer(), tmp_path / "model")
    (tmp_path / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rollout_rows(prompts=20))))
    return tmp_path


def training(files, *more):
    data = ("--dataset_name", files / "rollouts.jsonl", "--model_name_or_path", files / "model")
    return dqo("train", *data, "--output_dir", files / "out", "--max_steps", 3, *more)


def test_training_on_a_file_ends_with_a_report_and_its_numbers(files):
    tasks = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "2+2=", "answer": "4"}]
    (files / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    evaluated = ("--eval_tasks", files / "tasks.jsonl", "--verifier", "gsm8k", "--max_completion_length", 4)
    finished = training(files, "--eval_fraction", 0.3, *evaluated)
    assert finished.returncode == 0, finished.stderr
    assert "eval_value/auc_end" in finished.stdout and "tokens/s" in finished.stdout
    report = json.loads((files / "out" / "report.json").read_text())
    assert report["options"]["max_steps"] == 3
    assert [m["name"] for m in report["methods"]] == ["base", "dqo"]
    assert (files / "out" / "report.html").stat().st_size > 1000
    again = training(files, "--eval_fraction", 0.3, *evaluated)
    assert again.returncode == 0 and "is finished, 3 steps" in again.stdout + again.stderr


def test_the_written_config_reproduces_the_options(files):
    training(files)
    config = files / "out" / "config.yaml"
    finished = dqo("train", "--config", config, "--output_dir", files / "again", "--dry_run")
    assert finished.returncode == 0, finished.stderr
    assert "max_steps: 3" in finished.stdout
    assert not (files / "again").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("train", "--lerning_rate", "1"), "--learning_rate"),
        (("train", "--method", "dpo"), "--dataset_name is missing"),
        (("train", "--dataset_name", "absent.jsonl", "--model_name_or_path", "x"), "absent.jsonl: no such file"),
        (("trian",), "unknown command 'trian'.*Did you mean 'train'"),
        (("convert", "gsm8k", "a", "b"), "gsm8k-solutions"),
        (("init", "--dataset_name", "absent.jsonl", "--output_dir", "x"), "absent.jsonl: no such file"),
    ],
)
def test_mistakes_exit_with_2_and_name_the_cure(arguments, message):
    finished = dqo(*arguments)
    assert finished.returncode == 2
    assert re.search(message, finished.stderr, re.S), finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_bad_row_is_named_before_a_model_is_loaded(files):
    lines = (files / "rollouts.jsonl").read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | {"reward": "1"})
    (files / "rollouts.jsonl").write_text("\n".join(lines))
    for path in (files / "model").iterdir():
        path.unlink()  # loading it would fail with another message
    finished = training(files)
    assert finished.returncode == 2
    assert re.search(r"rollouts\.jsonl:5.*reward", finished.stderr, re.S)


def test_bad_eval_tasks_are_named_before_training(files):
    (files / "tasks.jsonl").write_text('{"prompt": "1+1="}\n')
    finished = training(files, "--eval_tasks", files / "tasks.jsonl", "--verifier", "gsm8k")
    assert finished.returncode == 2 and "tasks.jsonl:1" in finished.stderr
    assert not (files / "out").exists()


def test_a_used_output_directory_is_refused(files):
    (files / "out").mkdir()
    (files / "out" / "thesis.txt").write_text("mine")
    finished = training(files)
    assert finished.returncode == 2 and "holds other files" in finished.stderr


def test_gsm8k_solutions_go_from_conversion_to_training(tmp_path):
    solution = {"solution": "2+3=<<2+3=5>>5\nA: 5", "is_correct": True}
    wrong = {"solution": "2*3=<<2*3=5>>5\nA: 6", "is_correct": False}
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    lines = [
        {"question": f"Add {i}.", "ground_truth": "A: 5", **dict(zip(models, [solution, wrong, solution, wrong]))}
        for i in range(12)
    ]
    (tmp_path / "solutions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert dqo("convert", "gsm8k-solutions", tmp_path / "solutions.jsonl", tmp_path / "rollouts.jsonl").returncode == 0
    bare = dqo(
        "convert",
        "gsm8k-solutions",
        tmp_path / "solutions.jsonl",
        tmp_path / "bare.jsonl",
        "--no_keep_annotations",
        "--step_penalty",
        2,
    )
    assert bare.returncode == 0 and "<<" not in (tmp_path / "bare.jsonl").read_text()
    assert "<<" in (tmp_path / "rollouts.jsonl").read_text()
    assert "-2.0" in (tmp_path / "bare.jsonl").read_text() and "-0.5" in (tmp_path / "rollouts.jsonl").read_text()
    size = ("--vocab_size", 300, "--hidden_size", 16, "--layers", 1, "--heads", 2)
    made = dqo("init", "--dataset_name", tmp_path / "rollouts.jsonl", "--output_dir", tmp_path / "model", *size)
    assert made.returncode == 0, made.stderr
    undecided = training(tmp_path)
    assert undecided.returncode == 2 and "--process_reward additive" in undecided.stderr
    finished = training(tmp_path, "--process_reward", "additive")
    assert finished.returncode == 0, finished.stderr


def test_help_lists_every_command(capsys):
    cli.dqo_command(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)

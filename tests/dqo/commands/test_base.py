"""The commands as a user types them."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dqo.commands
from dqo.commands import base
from dqo.errors import UserError
from dqo.models.new import save
from tests.dqo import forked
from tests.dqo.helpers import policy, rollout_rows, tokenizer

ROOT = Path(__file__).parents[3]


def dqo_run(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "dqo", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def files(tmp_path):
    save(policy(), tokenizer(), tmp_path / "model")
    (tmp_path / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rollout_rows(prompts=20))))
    return tmp_path


def training(files, *more):
    data = ("--dataset_name", files / "rollouts.jsonl", "--model_name_or_path", files / "model")
    return forked.run("train", *data, "--output_dir", files / "out", "--max_steps", 3, *more, place=ROOT)


@pytest.mark.slow
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
    # random models: no answer has the verifier's form, which is no finding about their difference
    assert all(m["unread"] == {"greedy": 1.0, "sampling": 1.0} for m in report["methods"])
    assert "base, greedy: no answer could be read by the verifier gsm8k, such as these:" in finished.stdout
    assert "no significant difference" not in (files / "out" / "report.md").read_text()
    assert (files / "out" / "report.html").stat().st_size > 1000
    again = training(files, "--eval_fraction", 0.3, *evaluated)
    assert again.returncode == 0 and "is finished, 3 steps" in again.stdout + again.stderr


@pytest.mark.slow
def test_the_written_config_reproduces_the_options(files):
    training(files)
    config = files / "out" / "config.yaml"
    finished = forked.run("train", "--config", config, "--output_dir", files / "again", "--dry_run")
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
    finished = dqo_run(*arguments)
    assert finished.returncode == 2
    assert re.search(message, finished.stderr, re.S), finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.slow
def test_a_bad_row_is_named_before_a_model_is_loaded(files):
    lines = (files / "rollouts.jsonl").read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | {"reward": "1"})
    (files / "rollouts.jsonl").write_text("\n".join(lines))
    for path in (files / "model").iterdir():
        path.unlink()  # loading it would fail with another message
    finished = training(files)
    assert finished.returncode == 2
    assert re.search(r"rollouts\.jsonl:5.*reward", finished.stderr, re.S)


@pytest.mark.slow
def test_bad_eval_tasks_are_named_before_training(files):
    (files / "tasks.jsonl").write_text('{"prompt": "1+1="}\n')
    finished = training(files, "--eval_tasks", files / "tasks.jsonl", "--verifier", "gsm8k")
    assert finished.returncode == 2 and "tasks.jsonl:1" in finished.stderr
    assert not (files / "out").exists()


def test_a_used_output_directory_is_refused(files):
    (files / "out").mkdir()
    (files / "out" / "thesis.txt").write_text("mine")
    data = ("--dataset_name", files / "rollouts.jsonl", "--model_name_or_path", files / "model")
    finished = dqo_run("train", *data, "--output_dir", files / "out", "--max_steps", 3)
    assert finished.returncode == 2 and "holds other files" in finished.stderr


@pytest.mark.slow
def test_gsm8k_solutions_go_from_conversion_to_training(tmp_path):
    solution = {"solution": "2+3=<<2+3=5>>5\nA: 5", "is_correct": True}
    wrong = {"solution": "2*3=<<2*3=5>>5\nA: 6", "is_correct": False}
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    lines = [
        {"question": f"Add {i}.", "ground_truth": "A: 5", **dict(zip(models, [solution, wrong, solution, wrong]))}
        for i in range(12)
    ]
    (tmp_path / "solutions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert (
        forked.run("convert", "gsm8k-solutions", tmp_path / "solutions.jsonl", tmp_path / "rollouts.jsonl").returncode
        == 0
    )
    bare = forked.run(
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
    made = forked.run("init", "--dataset_name", tmp_path / "rollouts.jsonl", "--output_dir", tmp_path / "model", *size)
    assert made.returncode == 0, made.stderr
    undecided = training(tmp_path)
    assert undecided.returncode == 2 and "--process_reward additive" in undecided.stderr
    finished = training(tmp_path, "--process_reward", "additive")
    assert finished.returncode == 0, finished.stderr


HELP = """usage: dqo <command> [options]; `dqo <command> --help` for its options

  train     Train on your rollouts; without any option of training, the built-in demonstration.
  demo      Compare base, continued SFT, RFT, DPO and DQO on a built-in task, from nothing to report.html.
  convert   Turn a public data format into a rollout file.
  check     Check rollout files and show what training will see of them.
  init      Make a small random model with a tokenizer trained on a rollout file.
  sample    Sample responses of a model to prompts, as rollout rows.
  score     Grade stored responses by a verifier, or their steps by a model.
  eval      Answer problems with a model, grade the answers, and test evaluations against each other.
  report    Write one page of one run or several, side by side.
  inspect   Show what a finished run says of each token of stored responses.
  compare   Train several methods on one file with one budget, and write a page over all of them.
  export    Write a run's policy, its adapter merged, as transformers and vLLM load it.
  env       Print versions, devices and kernels that work here, to copy into a report of a bug.
  zpg       Train a policy by which of two perturbed copies answers better, without gradients.
"""


def test_help_lists_the_commands_in_the_order_of_their_places(capsys):
    base.dqo_command(["--help"])
    assert capsys.readouterr().out == HELP


def test_every_module_beside_the_base_and_the_view_is_a_command():
    files = {path.stem for path in Path(base.__file__).parent.glob("*.py")} - {"__init__", "base", "check_view"}
    assert set(base.commands()) == files


def test_a_command_is_a_file_and_no_list_names_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "greet.py").write_text(
        'PLACE = 0\ndef greet_command(arguments, prog):\n    """Say hello."""\n    print(prog, arguments)\n'
    )
    monkeypatch.setattr(dqo.commands, "__path__", [*dqo.commands.__path__, str(tmp_path)])
    base.dqo_command(["greet", "--loud"])
    assert capsys.readouterr().out == "dqo greet ['--loud']\n"
    base.dqo_command([])
    assert capsys.readouterr().out.splitlines()[2] == "  greet     Say hello."
    sys.modules.pop("dqo.commands.greet")


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (UserError("rows.jsonl:3: no"), 2, "error: rows.jsonl:3: no\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "error: out: No space left on device\n"),
        (BrokenPipeError(), 1, ""),
        (
            torch.OutOfMemoryError("Tried to allocate 2 GiB"),
            2,
            "error: out of memory: Tried to allocate 2 GiB. A smaller model, --use_peft or --bf16 needs less\n",
        ),
        (RuntimeError("shapes"), None, None),
        (OSError(errno.ENOENT, "No such file", "x"), None, None),  # a fault of the program: its traceback says where
        (KeyError("x"), None, None),
    ],
)
def test_an_error_of_the_user_or_the_machine_is_one_line_and_exit_code_2(monkeypatch, capfd, raised, code, said):
    def command():
        raise raised

    monkeypatch.setattr(base.signals, "install", lambda: None)
    monkeypatch.setattr(base.os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit if code is not None else type(raised)) as ended:
        base.run(command)
    if code is not None:
        assert ended.value.code == code and capfd.readouterr().err == said


def test_train_is_what_the_package_hands_out():
    from dqo.train import begin, run, train

    assert train is run.train and begin is run.begin
    with pytest.raises(ImportError, match="cannot import name 'trained'"):
        from dqo.train import trained  # noqa: F401


@pytest.mark.parametrize("module", ["dqo", "dqo.train"])
def test_modules_run_as_the_scripts_do(module):
    arguments = ["train", "--lam", "2"] if module == "dqo" else ["--lam", "2"]
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "lam must be in [0, 1], got 2.0 (from --lam)" in done.stderr

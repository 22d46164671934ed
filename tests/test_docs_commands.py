"""The shell commands of README.md, CONTRIBUTING.md and docs/: those of the trainer are run, the others' options are checked."""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dqo.commands.base import commands as dqo_commands
from tests.dqo import forked
from tests.dqo.conftest import files  # noqa: F401
from tests.pages import CONTRIBUTING, PAGES, PYPROJECT, README, ROOT, blocks, commands, each_page, named, source_of


def entry(script: str):
    """The function that pyproject.toml names for a command."""
    module, name = re.search(rf'^{script} = "([\w.]+):(\w+)"$', PYPROJECT, re.M).groups()
    return getattr(importlib.import_module(module), name)


PREFIXES = [{"solution_prefix": "Q?", "mc_value": 0.5}, {"solution_prefix": "Q?\n\nIt is \\boxed{4}.", "mc_value": 1.0}]
APS = {"question": "Q?", "final_answer": "4", "question_id": "7", "reasoning_steps": PREFIXES}
SOLUTIONS = {
    "ground_truth": "9 * 2 = $<<9*2=18>>18\nA: 18",
    "small": {"solution": "9 * 2 = $<<9*2=11>>11\nA: 11", "is_correct": False},
    "large": {"solution": "9 * 2 = $<<9*2=18>>18\nA: 18", "is_correct": True},
}


@pytest.fixture
def place(files, monkeypatch):  # noqa: F811
    """A working directory with what the pages' commands read."""
    monkeypatch.chdir(files)
    solutions = [json.dumps({"question": f"How much is {i}?", **SOLUTIONS}) for i in range(20)]
    Path("example_model_solutions.jsonl").write_text("\n".join(solutions))
    Path("problems.jsonl").write_text(json.dumps({"prompt": "1+2=", "answer": "#### 3"}))
    Path("samples.jsonl").write_text(json.dumps({"prompt": "1+2=", "completion": "1+2=3\n#### 3", "answer": "3"}))
    Path("public.jsonl").write_text(json.dumps(APS))
    Path("test.jsonl").write_text(json.dumps({"prompt": "2+2=", "answer": "#### 4"}))
    shutil.copytree("model", "out")
    Path("out/config.yaml").write_text("dataset_name: rollouts.jsonl\nmodel_name_or_path: model\nbeta: 0.03\n")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield files
    for number, handler in before.items():  # a command takes them over
        signal.signal(number, handler)


def arguments_of(command: str) -> list[str]:
    values = {"DIR_OR_HUB_NAME": "model", "M": "model", "SOURCE": "public.jsonl"}
    return [values.get(word, word) for word in command.split()]


def call(monkeypatch, script: str, arguments: list[str]) -> None:
    """A command in this process; an error ends it with a status, which fails the test."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    entry(script)()


def is_of_the_trainer(command: str) -> bool:
    return command.startswith(("dqo ", "dqo-train", "accelerate launch "))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(map(is_of_the_trainer, commands(page)))], ids=lambda p: p.name
)
def test_commands_of_the_trainer_run_in_their_order_up_to_training(page, place, monkeypatch, capsys):
    for command in filter(is_of_the_trainer, commands(page)):
        script, *arguments = arguments_of(command)
        if script == "accelerate":
            from accelerate.commands.launch import launch_command_parser

            given = launch_command_parser().parse_args(arguments[1:])
            assert given.module and given.training_script in ("dqo.train", "dqo")
            script = "dqo" if given.training_script == "dqo" else "dqo-train"
            arguments = given.training_script_args
        if script == "dqo-train" and arguments:
            call(monkeypatch, script, [*dict.fromkeys([*arguments, "--dry_run"])])
            assert "nothing was loaded or written" in capsys.readouterr().out, command
        elif arguments[:1] == ["compare"]:
            call(monkeypatch, script, [*arguments, "--dry_run"])
            assert "nothing was trained or written" in capsys.readouterr().out, command
        elif script == "dqo-train" or arguments[0] in (
            "demo",
            "export",
        ):  # minutes, or a trained model: tests/dqo has them
            with pytest.raises(SystemExit) as left:
                call(monkeypatch, "dqo", [*(arguments or ["demo"]), "--help"])
            assert left.value.code in (0, None)
        else:
            in_small = ["--max_steps", "1", "--num_pairs", "2", "--max_completion_length", "4"]  # else minutes
            call(monkeypatch, script, [*arguments, *(in_small if arguments[0] == "zpg" else [])])
        if arguments[:1] == ["score"]:  # a random model is never right, and equal rewards are refused
            shutil.copy("rollouts.jsonl", arguments[arguments.index("--output_file") + 1])


@pytest.mark.slow
def test_the_objective_of_the_recipe_trains_from_a_module_of_ones_own(place):
    (written,) = [text for text in blocks(CONTRIBUTING, "python") if "(Objective)" in text]
    Path("recipe.py").write_text(written)
    arguments = "--method recipe:REBEL --dataset_name rollouts.jsonl --model_name_or_path model --max_steps 2 --use_cpu"
    done = forked.run("train", *arguments.split(), "--output_dir", "new", place=place, path=[place])
    assert done.returncode == 0, done.stderr
    assert (place / "new" / "report.html").exists()


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Of all commands, with those of every method of the README's table."""
    cells = re.findall(r"^\| (`\w+`[^|]*)\|", README.read_text(), re.M)
    methods = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    shown = io.StringIO()
    asked = [["train", "--method", method] for method in methods]
    asked += [[name] for name in dqo_commands() if name != "train"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        for arguments in asked:
            with pytest.raises(SystemExit):
                call(patch, "dqo", [*arguments, "--help"])
    return set(re.findall(r"(?<![\w-])--\w+", shown.getvalue()))


@pytest.mark.parametrize("name", ["README.md", "docs/data.md", "docs/training.md", "docs/methods.md", "docs/gsm8k.md"])
def test_options_that_it_names_are_options(name, options):
    assert {"--beta", "--max_pairs_per_prompt", "--vocab_size"} <= options
    assert not [
        word
        for word in named(ROOT / name)
        if word.startswith("--") and word not in options | {"--help", "--config", "--fsdp_offload_params"}
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [README, ROOT / "docs" / "training.md", ROOT / "docs" / "gsm8k.md"], ids=lambda p: p.name
)
def test_commands_of_the_trainer_train(page, place, monkeypatch):
    """In small: two steps each. In this process, because imports take longer than the steps."""
    for command in (c for c in commands(page) if c.startswith(("dqo ", "dqo-train --"))):
        command = command.replace("dqo-train", "dqo train").replace("--max_steps 200", "")
        arguments = arguments_of(command)[1:]
        if arguments[0] == "train":
            shutil.rmtree(arguments[arguments.index("--output_dir") + 1], ignore_errors=True)
            arguments += ["--max_steps", "2", "--use_cpu", "--max_completion_length", "8"]
        call(monkeypatch, "dqo", arguments)
        if arguments[0] == "score":  # see above
            shutil.copy("rollouts.jsonl", arguments[arguments.index("--output_file") + 1])
        if arguments[0] == "train" and "--dry_run" not in arguments:
            assert (place / arguments[arguments.index("--output_dir") + 1] / "report.html").exists()


@pytest.fixture(scope="module")
def pytest_help(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("empty")
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.run([sys.executable, "-m", "pytest", "--help"], cwd=folder, capture_output=True, text=True).stdout


def check_pytest(arguments: list[str], text: str) -> None:
    markers = set(re.findall(r'^    "(\w+): ', PYPROJECT, re.M))
    for i, word in enumerate(arguments):
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(word.partition('=')[0])}(?![\w-])", text), word
        elif arguments[i - 1] == "-n":
            assert word == "auto"  # pytest-xdist's
        elif arguments[i - 1] == "-m":
            assert set(re.findall(r"\w+", word)) - {"and", "or", "not"} <= markers, word
        else:
            assert (ROOT / word).exists(), word


def check_pip(arguments: list[str]) -> None:
    assert arguments.pop(0) == "install"
    for word in arguments:
        if extras := re.fullmatch(r"'?\.(?:\[([\w,]+)\])?'?", word):
            for extra in filter(None, (extras[1] or "").split(",")):
                assert re.search(rf"^{extra} = \[", PYPROJECT, re.M), extra
        else:
            assert word in ("-c", "-e", "pre-commit") or (ROOT / word).exists(), word


@each_page
def test_every_other_command_exists_with_its_options(page, pytest_help):
    shown = commands(page)
    if page == CONTRIBUTING:  # its table
        shown += [c for c in re.findall(r"\| `([^`]+)`", page.read_text()) if " " in c or c.startswith(".")]
    for command in shown:
        if is_of_the_trainer(command):
            continue
        words = re.findall(r'"[^"]*"|\S+', re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command))
        program, arguments = words[0], [word.strip('"') for word in words[1:]]
        if program == "pytest":
            check_pytest(arguments, pytest_help)
        elif program == "pip":
            check_pip(arguments)
        elif program == "python":  # the module is found by another test
            options = [word for word in arguments[2:] if word.startswith("--")]
            assert all(option in source_of(arguments[1]).read_text() for option in options), command
        elif program == "ruff":
            assert command in (ROOT / ".ci" / "run").read_text(), command
        elif program == "pre-commit":
            assert arguments == ["install"] and (ROOT / ".pre-commit-config.yaml").exists()
        else:
            assert os.access(ROOT / program, os.X_OK), f"no test knows the command {command}"


def test_the_two_commands_are_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    first, second = [re.sub(r"\s+#.*", "", line) for line in blocks(README, "bash")[0].splitlines()]
    assert first == "pip install -e . && dqo-train" and second == "pip install -e '.[test]' && pytest -n auto"
    assert "\npip install -q -e .\n" in ci and " dqo-train --output_dir " in ci
    assert "\npytest -n auto -m 'not aot'" in ci  # the second one's tests, and the slow ones


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "data.md"], ids=lambda page: page.name)
def test_each_row_of_the_data_format_is_one(page, tmp_path, monkeypatch, capsys):
    rows = blocks(page, "json")
    assert rows
    for row in rows:
        (tmp_path / "rows.jsonl").write_text(json.dumps(json.loads(row)))  # on one line
        call(monkeypatch, "dqo", ["check", str(tmp_path / "rows.jsonl")])
        shown = capsys.readouterr().out
        assert "1 of 1 prompts" in shown and "correct  100.0% (1)" in shown

"""README.md, CONTRIBUTING.md and docs/ are run: their Python, commands and links, and the paths and modules that they name."""

import contextlib
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.dqo.conftest import files  # noqa: F401

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *DOCS]
PYPROJECT = (ROOT / "pyproject.toml").read_text()

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)
    return [text for name, text in found if name == language]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def commands(page: Path) -> list[str]:
    """Of the shell blocks, one by one, as written."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in re.sub(r"\s+#.*", "", line).split(" && ") if part.strip()]


# -------------------------------------------------------------------------------------------------------------- pages


def test_the_readme_is_one_page():
    assert len(README.read_text().split()) <= 1000


@pytest.mark.parametrize("page", [CONTRIBUTING, *DOCS], ids=lambda page: page.name)
def test_a_page_begins_with_what_the_reader_can_do_after_it(page):
    title, _, sentence, empty = page.read_text().split("\n")[:4]
    assert title.startswith("# ") and empty == ""
    assert re.fullmatch(r"After this page you can [^.]+\.", re.sub(r"\.(?=\w)", "", sentence)), sentence


def test_the_readme_links_to_every_page():
    linked = {target for _, target in links(README)}
    assert {f"docs/{page.name}" for page in DOCS} | {"CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"} <= linked


def links(page: Path) -> list[tuple[str, str]]:
    return [(text, target.partition("#")[0]) for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(page))]


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        aim = page.parent / path if path else page
        assert aim.exists(), target
        headings = re.findall(r"^#+ (.*)$", aim.read_text(), re.M) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, target


PLACEHOLDERS = {"X": "lambda_return", "NAME": "dpo", "BACKEND": "cpp"}
FOLDERS = r"(?:\.ci|benchmarks|csrc|docs|dqo|dqo_kernels|examples|tests)"


def named(page: Path) -> list[str]:
    """Words of the page's code, its placeholders filled in."""
    words = " ".join(re.findall(r"`([^`\n]+)`", prose(page))).split()
    for name, value in PLACEHOLDERS.items():
        words = [re.sub(rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", value, word) for word in words]
    return words


@each_page
def test_paths_that_it_names_exist(page):
    paths = [word for word in named(page) if re.fullmatch(FOLDERS + r"/[\w./*-]*", word)]
    assert not [path for path in paths if not list(ROOT.glob(path))]


def there(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    try:
        importlib.import_module(name)
        return True
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return bool(module) and there(module) and hasattr(importlib.import_module(module), attribute)


@each_page
def test_dotted_names_of_the_packages_exist(page):
    names = [word for word in named(page) if re.fullmatch(r"(?:dqo|dqo_kernels)(?:\.\w+)+(?<!\.py)", word)]
    assert not [name for name in names if not there(name)]


def source_of(module: str) -> Path | None:
    """The file that `python -m MODULE` runs."""
    path = ROOT / module.replace(".", "/")
    return next((found for found in (path / "__main__.py", path.with_suffix(".py")) if found.exists()), None)


@each_page
def test_modules_that_it_runs_can_be_run(page):
    modules = set(re.findall(r"python -m ([\w.]+)", page.read_text()))
    assert not [module for module in modules if source_of(module) is None]


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "architecture.md"], ids=lambda page: page.name)
def test_trees_name_what_is_there_and_every_folder(page):
    lines = "".join(blocks(page, "")).splitlines()
    paths = [path for line in lines for path in re.split(r"\s{3,}", line.strip())[0].split()]
    assert not [path for path in paths if not (ROOT / path).exists()]
    folders = {f"dqo/{init.parent.name}/" for init in ROOT.glob("dqo/*/__init__.py")}
    assert not folders - set(paths)
    assert page != README or len(lines) <= 15


def test_the_architecture_lists_the_folders_in_the_order_of_their_imports():
    from tests.folders import GROUP

    groups = [
        GROUP[name] for name in re.findall(r"\bdqo/(\w+)(?:/|\.py)", blocks(ROOT / "docs" / "architecture.md", "")[0])
    ]
    assert len(groups) == len(GROUP) and groups == sorted(groups)


# ----------------------------------------------------------------------------------------------------------- commands


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
    Path("public.jsonl").write_text(json.dumps(APS))
    Path("out").mkdir()
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
            assert given.module and given.training_script == "dqo.train"
            script, arguments = "dqo-train", given.training_script_args
        if script == "dqo-train" and arguments:
            call(monkeypatch, script, [*dict.fromkeys([*arguments, "--dry_run"])])
            assert "nothing was loaded or written" in capsys.readouterr().out, command
        elif script == "dqo-train" or arguments[0] == "demo":  # minutes: tests/dqo has smaller ones
            with pytest.raises(SystemExit) as left:
                call(monkeypatch, "dqo", ["demo", *arguments[1:], "--help"])
            assert left.value.code in (0, None)
        else:
            call(monkeypatch, script, arguments)


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Of all commands, with those of every method of the README's table."""
    methods = re.findall(r"^\| `(\w+)`", README.read_text(), re.M)
    shown = io.StringIO()
    asked = [["train", "--method", method] for method in methods] + [["check"], ["convert"], ["init"], ["demo"]]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        for arguments in asked:
            with pytest.raises(SystemExit):
                call(patch, "dqo", [*arguments, "--help"])
    return set(re.findall(r"(?<![\w-])--\w+", shown.getvalue()))


@pytest.mark.parametrize("name", ["README.md", "docs/data.md", "docs/training.md", "docs/methods.md", "docs/gsm8k.md"])
def test_options_that_it_names_are_options(name, options):
    assert {"--beta", "--max_pairs_per_prompt", "--vocab_size"} <= options
    assert not [
        word for word in named(ROOT / name) if word.startswith("--") and word not in options | {"--help", "--config"}
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [README, ROOT / "docs" / "training.md", ROOT / "docs" / "gsm8k.md"], ids=lambda p: p.name
)
def test_commands_of_the_trainer_train(page, place):
    """In small: two steps each."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for i, command in enumerate(c for c in commands(page) if c.startswith(("dqo ", "dqo-train --"))):
        command = command.replace("dqo-train", "dqo train").replace("--max_steps 200", "")
        arguments = arguments_of(command)[1:]
        if arguments[0] == "train":
            arguments += f"--max_steps 2 --use_cpu --max_completion_length 8 --output_dir run{i}".split()
        done = subprocess.run(
            [sys.executable, "-m", "dqo", *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr)
        if arguments[0] == "train" and "--dry_run" not in arguments:
            assert (place / f"run{i}" / "report.html").exists()


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
    assert first == "pip install -e . && dqo-train" and second == "pip install -e '.[test]' && pytest"
    assert "pip install -q -e .\n" in ci and "\ndqo-train " in ci and "\npytest\n" in ci


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "data.md"], ids=lambda page: page.name)
def test_the_row_of_the_data_format_is_one(page, tmp_path, monkeypatch, capsys):
    (row,) = blocks(page, "json")
    (tmp_path / "rows.jsonl").write_text(row)
    call(monkeypatch, "dqo", ["check", str(tmp_path / "rows.jsonl")])
    shown = capsys.readouterr().out
    assert "1 of 1 prompts" in shown and "correct  100.0% (1)" in shown


# ------------------------------------------------------------------------------------------------------------- Python


def train_from_python(written: str, files: Path, capsys) -> None:  # noqa: F811
    exec(written.replace("DIR_OR_HUB_NAME", "model").replace("max_steps=100", "max_steps=2, eval_fraction=0.3"), {})
    assert (files / "out" / "model.safetensors").exists()
    assert ("print(trainer.evaluate())" in written) == ("'eval_loss': " in capsys.readouterr().out)
    assert ("save_model" in written) == (files / "final" / "critic").exists()


def loss_of_logits(written: str, files: Path, capsys) -> None:  # noqa: F811
    torch.manual_seed(0)
    names = {
        "logits": torch.randn(2, 5, 11, requires_grad=True),
        "actions": torch.randint(0, 11, (2, 5)),
        "rewards": torch.randn(2, 5),
        "values": torch.randn(2, 5, requires_grad=True),
        "ref_logprobs": -torch.rand(2, 5),
        "mask": torch.arange(5) < torch.tensor([[5], [3]]),
    }
    exec(written, names)
    assert names["logits"].grad.abs().sum() > 0 and names["values"].grad.abs().sum() > 0
    assert not names["logits"].grad[1, 3:].any()


def loss_of_ones_own(written: str, files: Path, capsys) -> None:  # noqa: F811
    torch.manual_seed(0)
    names = {
        "hidden": torch.randn(9, 4, requires_grad=True),
        "weight": torch.randn(11, 4, requires_grad=True),
        "actions": torch.randint(0, 11, (9,)),
        "cu_seqlens": torch.tensor([0, 5, 9]),
        "advantages": torch.randn(9),
    }
    exec(written, names)
    assert names["hidden"].grad.abs().sum() > 0 and names["weight"].grad.abs().sum() > 0
    assert names["metrics"]["entropy"] > 0


RUNS = {"DQOTrainer(": train_from_python, "= soft_bellman_loss(": loss_of_logits, "linear_row_loss(": loss_of_ones_own}
PYTHON = [(page, text) for page in PAGES for text in blocks(page, "python")]


@pytest.mark.parametrize("page, written", PYTHON, ids=[f"{page.name}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_runs_as_it_is_written(page, written, files, monkeypatch, capsys):  # noqa: F811
    (run,) = [run for mark, run in RUNS.items() if mark in written]
    monkeypatch.chdir(files)
    run(written, files, capsys)


def test_the_readme_shows_each_of_the_two_packages():
    written = "".join(blocks(README, "python"))
    assert "DQOTrainer(" in written and "= soft_bellman_loss(" in written


# ---------------------------------------------------------------------------------------------------- files beside them


def test_the_citation_is_of_this_version():
    import dqo

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == dqo.__version__ and f'version = "{dqo.__version__}"' in PYPROJECT
    assert cited["references"][0]["url"] in README.read_text()


def test_the_changelog_names_this_version():
    import dqo

    assert re.search(rf"^## \[(Unreleased\] )?{re.escape(dqo.__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_pre_commit_runs_what_ci_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"].replace(" --force-exclude", " .") for hook in hooks]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [" ".join(sorted(e.split())) for e in entries] == [
        " ".join(sorted(line.split())) for line in ci if line.startswith("ruff ")
    ]

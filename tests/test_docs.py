"""README.md, CONTRIBUTING.md and docs/: their form, their links, the paths and modules that they name; their Python is run."""

import ast
import importlib
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.dqo.conftest import files  # noqa: F401
from tests.dqo.objectives.packed import stats_of
from tests.pages import CONTRIBUTING, DOCS, PAGES, PYPROJECT, README, ROOT, blocks, each_page, named, prose, source_of

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


FOLDERS = r"(?:\.ci|benchmarks|csrc|docs|dqo|dqo_kernels|examples|tests)"


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


def objective_of_the_recipe(written: str, files: Path, capsys) -> None:  # noqa: F811
    names = {"__name__": "recipe"}
    exec(written, names)
    prompts = types.SimpleNamespace(prompt=np.array([4, 7, 4, 9]))
    assert names["REBEL"]().prepare(prompts).groups.tolist() == [[0, 2]]
    logprobs = -torch.rand(7, dtype=torch.float64).requires_grad_()
    rows, ends = {"ref_logprobs": -torch.rand(7, dtype=torch.float64)}, [0, 1, 3, 6, 7]
    rows |= {"rewards": torch.rand(7, dtype=torch.float64), "label": torch.ones(7)}
    loss, metrics = names["REBEL"](beta=0.3)(stats_of(logprobs), rows, torch.tensor(ends))
    fitted = 0.3 * (logprobs - rows["ref_logprobs"]) - rows["rewards"]
    a, b, c, d = [sum(fitted[begin:end]) for begin, end in zip(ends, ends[1:])]
    torch.testing.assert_close(loss, (a - b) ** 2 + (c - d) ** 2)
    assert metrics["rebel/error_abs_mean"][1] == 2


def its_test(written: str, files: Path, capsys) -> None:  # noqa: F811
    names: dict = {}
    exec(written, names)
    names["test_the_loss_of_one_pair_by_hand"]()


def sample_from_python(written: str, files: Path, capsys) -> None:  # noqa: F811
    (files / "problems.jsonl").write_text('{"prompt": "1+2="}\n')
    exec(
        written.replace("DIR_OR_HUB_NAME", "model").replace("generations=4", "generations=4, max_completion_length=4"),
        {},
    )
    assert len((files / "sampled.jsonl").read_text().splitlines()) == 4
    assert capsys.readouterr().out.startswith("4 ")


RUNS = {
    "DQOTrainer(": train_from_python,
    "= soft_bellman_loss(": loss_of_logits,
    "linear_row_loss(": loss_of_ones_own,
    "class REBEL(": objective_of_the_recipe,
    "def test_the_loss": its_test,
    "import sample\n": sample_from_python,
}
PYTHON = [(page, text) for page in PAGES for text in blocks(page, "python")]
COPIES = {text.splitlines()[0][2:]: text for _, text in PYTHON if text.startswith("# ")}  # {file: what is shown of it}
WHOLE = [(page, text) for page, text in PYTHON if text not in COPIES.values() or any(mark in text for mark in RUNS)]


@pytest.mark.parametrize("page, written", WHOLE, ids=[f"{page.name}-{i}" for i, (page, _) in enumerate(WHOLE)])
def test_python_runs_as_it_is_written(page, written, files, monkeypatch, capsys):  # noqa: F811
    (run,) = [run for mark, run in RUNS.items() if mark in written]
    monkeypatch.chdir(files)
    run(written, files, capsys)


def statements(text: str) -> list[str]:
    """Lines of code in one form: without comments and empty lines, an import for each name."""
    found = []
    for line in ast.unparse(ast.parse(text)).splitlines():
        head, imported, names = line.partition(" import ")
        is_import = head.lstrip().startswith("from ") and imported
        found += [head + imported + name for name in names.split(", ")] if is_import else [line] if line else []
    return found


@pytest.mark.parametrize("path", COPIES)
def test_code_under_the_name_of_a_file_is_taken_from_it_in_its_order(path):
    left = iter(statements((ROOT / path).read_text()))
    assert not [line for line in statements(COPIES[path]) if line not in left]


def test_each_recipe_shows_code_of_the_package():
    shown = {path for path, text in COPIES.items() if text in CONTRIBUTING.read_text()}
    assert {Path(path).parts[0] for path in shown} == {"dqo", "dqo_kernels", "tests"} and len(shown) >= 4


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "methods.md"], ids=lambda page: page.name)
def test_a_table_lists_every_method(page):
    from dqo.objectives import OBJECTIVES

    rows = [line for line in page.read_text().splitlines() if line.startswith("| ") and "dqo/objectives/" in line]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])) == sorted(OBJECTIVES)


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

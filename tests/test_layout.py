"""The house: imports point one way, files are short, objectives have their files."""

import ast
from pathlib import Path

import pytest

from dqo.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("dqo/**/*.py"))

# A file imports from lower levels only. Within a level no file imports another.
LEVELS = [
    {
        "command_options",
        "errors",
        "math_worker",
        "objectives.dpo",
        "objectives.dqo",
        "objectives.dro",
        "objectives.oreo",
        "objectives.rft",
        "objectives.sft",
        "objectives.sums",
        "report_plots",
        "rows_hints",
        "signals",
        "statistics",
        "tasks.arith",
        "terms",
        "verify",
        "watch",
    },
    {
        "adapters",
        "answers",
        "architecture",
        "cli",
        "damage",
        "ends",
        "files",
        "lora_options",
        "model_objects",
        "objectives.kto",
        "option_values",
        "requirements",
        "rows_formats",
    },
    {
        "__main__",
        "ids",
        "lora",
        "math_grader",
        "new_model",
        "objectives",
        "option_files",
        "reference_cache",
        "report",
        "rows_checks",
        "rows_files",
    },
    {"config", "rows", "verifiers"},
    {"chat", "convert_source", "demo", "hub", "launcher", "rows_warnings"},
    {"convert_forms", "convert_gsm8k", "convert_steps", "inputs", "parallel", "row_tokens"},
    {"callback_args", "convert", "episodes", "optim", "trackers"},
    {"batches", "check_view"},
    {"attention", "check", "metrics", "models", "reference", "router"},
    {"fitness", "sample", "value_models"},
    {"evaluate", "learner"},
    {"callbacks", "checkpoint", "step"},
    {"held_out", "prepare", "recorder"},
    {"train"},
    {"findings"},
    {"demo_report", "run_report"},
    {"api"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "dqo").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.glob("dqo/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_trainer_imports_from_lower_levels_only(path):
    module = module_of(path)
    if module in ("", "tasks"):
        return
    assert module in LEVEL, f"{module} has no level; place it in LEVELS"
    for name in imports_of(path, top_level_only=True):
        imported = name.removeprefix("dqo.")
        if name.startswith("dqo.") and imported in LEVEL and imported != module:
            assert LEVEL[imported] < LEVEL[module], f"{module} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_of_readable_size(path):
    assert len(path.read_text().splitlines()) <= 400


def test_every_objective_is_one_file_and_one_test():
    for name in OBJECTIVES:
        assert (ROOT / "dqo" / "objectives" / f"{name}.py").exists()
        assert any(name in path.stem for path in (ROOT / "tests" / "dqo" / "objectives").glob("test_*.py"))


def test_no_file_that_is_read_before_the_options_imports_torch():
    for name in ("cli", "config", "rows", "verify", "convert", "check", "demo", "errors", "requirements", "inputs"):
        imported = imports_of(ROOT / "dqo" / f"{name}.py", top_level_only=True)
        assert not imported & {"torch", "transformers", "dqo_kernels"}, name

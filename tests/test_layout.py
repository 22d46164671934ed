"""The house: imports point one way, files are short, operations and objectives have their files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dqo.objectives import OBJECTIVES
from dqo_kernels import dispatch
from tests import folders
from tests.folders import imports_of

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("dqo/**/*.py"), *ROOT.glob("dqo_kernels/**/*.py")])

KERNEL_LEVELS = [
    {
        "addresses",
        "checks",
        "dispatch",
        "packed",
        "gemm",
        "gather_weight",
        "cpu_threads",
        "scan_triton",
        "token_stats_triton_kernels",
    },
    {"library"},
    {"vocab_parallel"},
    {"layout", "lambda_return", "token_stats", "linear_inputs"},
    {"lambda_return_cpp", "soft_bellman_cpp", "token_stats_cpp", "linear_engine"},
    {"lambda_return_triton", "soft_bellman_triton", "token_stats_triton"},
    {"lambda_return_cuda", "soft_bellman_cuda", "token_stats_cuda"},
    {"soft_bellman", "soft_bellman_loss_cuda", "linear_token_stats"},
    {"soft_bellman_loss", "linear_row_loss"},
    {"linear_soft_bellman_loss"},
]
KERNEL_LEVEL = {name: level for level, names in enumerate(KERNEL_LEVELS) for name in names}


def test_folders_import_in_the_order_in_which_data_flows():
    for module, imported in folders.module_graph().items():
        for name in imported - {"dqo"}:
            above, below = (folders.folder_of(x) for x in (module, name))
            assert folders.GROUP[below] <= folders.GROUP[above], f"{module} imports {name}"


def test_no_import_goes_in_a_circle():
    assert folders.circle(folders.folder_graph()) == []
    assert folders.circle({m: v - {"dqo"} for m, v in folders.module_graph().items()}) == []


def test_the_search_for_circles_finds_one():
    assert folders.circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]


def test_no_file_has_the_name_of_a_module_of_the_standard_library():
    for path in SOURCES:
        assert path.stem.startswith("__") or path.stem not in sys.stdlib_module_names, path


def test_every_folder_says_what_lives_in_it():
    for path in ROOT.glob("dqo/*/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text and len(text.splitlines()) <= 4 or path.parent.name == "objectives", path


@pytest.mark.parametrize("path", sorted(ROOT.glob("dqo_kernels/**/*.py")), ids=lambda p: p.name)
def test_the_kernels_do_not_know_the_trainer(path):
    assert not any(name == "dqo" or name.startswith("dqo.") for name in imports_of(path))


@pytest.mark.parametrize("path", sorted(ROOT.glob("dqo_kernels/[a-z]*.py")), ids=lambda p: p.name)
def test_the_kernels_import_from_lower_levels_only(path):
    assert path.stem in KERNEL_LEVEL, f"{path.stem} has no level; place it in KERNEL_LEVELS"
    for name in imports_of(path):
        imported = name.removeprefix("dqo_kernels.")
        if name.startswith("dqo_kernels.") and imported in KERNEL_LEVEL:
            assert KERNEL_LEVEL[imported] < KERNEL_LEVEL[path.stem], f"{path.stem} imports {imported}"


def test_a_native_operation_is_one_stem_everywhere():
    for op, devices in dispatch.TABLE.items():
        assert (ROOT / "dqo_kernels" / f"{op}.py").exists()
        if op.startswith("linear"):  # GEMMs around the row kernels of token_stats
            continue
        if "cpp" in devices["cpu"]:
            for path in (f"dqo_kernels/{op}_cpp.py", f"csrc/cpu/{op}.cpp", f"csrc/common/{op}.h"):
                assert (ROOT / path).exists(), path
            for path in (f"tests/kernels/test_{op}.py", f"benchmarks/bench_{op}.py"):
                assert (ROOT / path).exists(), path
        for path in (f"dqo_kernels/{op}_triton.py", f"dqo_kernels/{op}_cuda.py", f"csrc/cuda/{op}.cu"):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_of_readable_size(path):
    assert len(path.read_text().splitlines()) <= 400


def test_every_objective_is_one_file_and_one_test():
    for name in OBJECTIVES:
        assert (ROOT / "dqo" / "objectives" / f"{name}.py").exists()
        assert any(name in path.stem for path in (ROOT / "tests" / "dqo" / "objectives").glob("test_*.py"))


def test_nothing_that_is_imported_before_the_options_are_checked_imports_torch():
    code = "import sys, dqo.demo.run, dqo.train.inputs; from dqo.commands.base import commands; commands()\n"
    code += "sys.exit(bool({'torch', 'transformers', 'dqo_kernels'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

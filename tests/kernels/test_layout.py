"""The kernels' house: what operations share lies below them, imports run in no circle, an operation is one stem everywhere."""

import ast
from pathlib import Path

import pytest

from dqo_kernels.core import dispatch
from tests.import_graph import circle, imported_names, imports, modules, upward

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dqo_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ORDER = ("core", "linear", "")  # the operations, as stems side by side, are in the package itself


def test_folders_import_from_those_below_them():
    assert upward(PACKAGE, ORDER) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(imports(PACKAGE)) == []


def test_only_the_package_itself_imports_every_public_operation():
    """`dqo_kernels` would be half made for whoever below imports from it."""
    importers = {module for module, imported in imports(PACKAGE).items() if PACKAGE.name in imported}
    assert importers <= {f"{PACKAGE.name}.__main__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_kernels_know_neither_the_trainer_nor_what_measures_them(path):
    assert not {name.partition(".")[0] for name in imported_names(path)} & {"dqo", "benchmarks", "tests"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_of_readable_size(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("folder", [folder for folder in ORDER if folder])
def test_a_folder_says_what_lives_there_and_loads_nothing(folder):
    (said,) = ast.parse((PACKAGE / folder / "__init__.py").read_text()).body
    assert isinstance(said, ast.Expr) and 3 <= len(said.value.value.strip().splitlines()) <= 4


def test_a_native_operation_is_one_stem_everywhere():
    for op, devices in dispatch.TABLE.items():
        assert f"dqo_kernels.{op}" in modules(PACKAGE)
        if op.startswith("linear"):  # GEMMs around the row kernels of token_stats
            continue
        paths = [f"dqo_kernels/{op}_triton.py", f"dqo_kernels/{op}_cuda.py", f"csrc/cuda/{op}.cu"]
        if "cpp" in devices["cpu"]:
            paths += [f"dqo_kernels/{op}_cpp.py", f"csrc/cpu/{op}.cpp", f"csrc/common/{op}.h"]
            paths += [f"tests/kernels/test_{op}.py", f"benchmarks/kernels/bench_{op}.py"]
        assert [path for path in paths if not (ROOT / path).exists()] == []

"""The house: imports point one way, files are short, folders say what lives in them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import folders

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("dqo/**/*.py"))


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
        if path.parent.name == "commands":  # a command's file has its name, and no file there is run by itself
            continue
        assert path.stem.startswith("__") or path.stem not in sys.stdlib_module_names, path


def test_every_folder_says_what_lives_in_it():
    for path in ROOT.glob("dqo/*/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text and len(text.splitlines()) <= 4, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_of_readable_size(path):
    assert len(path.read_text().splitlines()) <= 400


def test_nothing_that_is_imported_before_the_options_are_checked_imports_torch():
    code = "import sys, dqo.demo.run, dqo.train.inputs; from dqo.commands.base import commands; commands()\n"
    code += "sys.exit(bool({'torch', 'transformers', 'dqo_kernels'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

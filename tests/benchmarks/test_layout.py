"""The benchmarks' house: how things are measured lies below what is measured, and nothing imports in a circle."""

from pathlib import Path

from tests.import_graph import circle, imports, upward

PACKAGE = Path(__file__).parents[2] / "benchmarks"
ORDER = ("harness", "kernels", "trainer", "evidence", "gpu", "")  # report.py and conftest.py are in the package itself


def test_folders_import_from_those_below_them():
    assert upward(PACKAGE, ORDER) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(imports(PACKAGE)) == []

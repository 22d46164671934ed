"""What shows that the methods learn is run by hand, and seldom: here it is at least loaded."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks" / "evidence"


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("[!_]*.py"))])
def test_every_module_finds_what_it_imports(name):
    importlib.import_module(f"benchmarks.evidence.{name}")

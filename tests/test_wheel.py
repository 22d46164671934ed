"""What is built is whole: from a wheel alone, in a clean directory, the commands run and the demonstration writes its report."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dqo_kernels
from tests.dqo.demo.test_run import TINY

pytest.importorskip("setuptools")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the Python packages. Without setup.py nothing is compiled."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for package in ("dqo", "dqo_kernels"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder]
    subprocess.run(command, check=True, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a program with nothing of this repository but what is in the wheel."""
    site, work = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    for library in Path(dqo_kernels.__file__).parent.glob("*.so"):
        shutil.copy(library, site / "dqo_kernels")

    def run(*arguments, script=None):
        program = [sys.executable] if script is None else [sys.executable, site / "bin" / script]
        environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
        command = [*map(str, program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.site, run.work = site, work
    return run


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        str(path.relative_to(ROOT))
        for package in ("dqo", "dqo_kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert names == files and {"dqo/py.typed", "dqo_kernels/py.typed", "dqo/report/templates/report.html.j2"} <= files


def test_the_modules_are_those_of_the_wheel(installed):
    where = installed("-c", "import dqo, dqo_kernels; print(dqo.__file__); print(dqo_kernels.__file__)").split()
    assert all(Path(path).is_relative_to(installed.site) for path in where)


def test_the_scripts_make_a_model_check_a_file_and_train_on_it(installed):
    rows = [f'{{"prompt": "{i}+1=", "completion": "{i + j}", "reward": {j}}}' for i in range(8) for j in (0, 1)]
    (installed.work / "rows.jsonl").write_text("\n".join(rows))
    size = ("--vocab_size", 270, "--hidden_size", 16, "--layers", 1, "--heads", 2, "--max_length", 64)
    installed("init", "--dataset_name", "rows.jsonl", "--output_dir", "model", *size, script="dqo")
    assert "16 of 8 prompts" in installed("check", "rows.jsonl", "--model_name_or_path", "model", script="dqo")
    data = ("--dataset_name", "rows.jsonl", "--model_name_or_path", "model", "--max_length", 64)
    installed(*data, "--output_dir", "out", "--max_steps", 2, script="dqo-train")
    assert (installed.work / "out" / "report.html").stat().st_size > 1000
    assert "--dataset_name" in installed("-m", "dqo.train", "--help")


def test_the_demonstration_writes_its_report(installed):
    run = "from dqo.demo.recipe import DemoConfig, Recipe; from dqo.demo.run import run_demo"
    printed = installed("-c", f"{run}; print(run_demo(DemoConfig(output_dir='demo'), {TINY!r}))")
    assert printed.endswith("report.html\n") and "<svg" in (installed.work / "demo" / "report.html").read_text()

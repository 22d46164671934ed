"""What is built is whole: from a wheel alone, in a clean directory, the commands run and training writes its report."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dqo_kernels

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

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, *map(str, arguments)]
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


# Everything that is run from the wheel, in one process: the imports take longer than the rest.
PROGRAM = """
import json, runpy, sys
import dqo, dqo_kernels, dqo.demo.run
print(dqo.__file__, dqo_kernels.__file__, sep="\\n")
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, (name, arguments, ended.code)
"""


def test_its_scripts_train_and_report(installed):
    rows = [f'{{"prompt": "{i}+1=", "completion": "{i + j}", "reward": {j}}}' for i in range(8) for j in (0, 1)]
    (installed.work / "rows.jsonl").write_text("\n".join(rows))
    dqo, dqo_train = (str(installed.site / "bin" / name) for name in ("dqo", "dqo-train"))
    size = "--vocab_size 270 --hidden_size 16 --layers 1 --heads 2 --max_length 64"
    data = "--dataset_name rows.jsonl --model_name_or_path model --max_length 64"
    commands = [
        [dqo, *f"init --dataset_name rows.jsonl --output_dir model {size}".split()],
        [dqo, *["check", "rows.jsonl", "--model_name_or_path", "model"]],
        [dqo_train, *f"{data} --output_dir out --max_steps 2".split()],
        [str(installed.site / "dqo" / "train" / "__main__.py"), "--help"],
    ]
    *where, rest = installed("-c", PROGRAM, json.dumps(commands)).split("\n", 2)
    assert len(where) == 2 and all(Path(path).is_relative_to(installed.site) for path in where)
    assert "16 of 8 prompts" in rest and "--dataset_name" in rest
    assert "<svg" in (installed.work / "out" / "report.html").read_text()

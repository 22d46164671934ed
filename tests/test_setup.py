"""Building: an extension that cannot be built is left out with one line, and the rest goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
pytest.importorskip("pybind11")
ROOT = Path(__file__).parents[1]


def said(folder, **environment):
    """What `setup.py` prints beside the package's name, with only a C++ compiler and these programs on PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / "c++"
    if not path.exists():
        path.write_text("#!/bin/sh\nexit 0\n")
        path.chmod(0o755)
    names = ("HOME", "TMPDIR", "PYTHONPATH")
    environment = {name: os.environ[name] for name in names if name in os.environ} | {"PATH": str(folder)} | environment
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("dqo_kernels:")]


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_without_nvcc_the_cuda_kernels_are_left_out(tmp_path):
    (line,) = said(tmp_path / "bin")
    assert "'cuda' is left out" in line and "nvcc is not on PATH" in line


def test_they_are_left_out_when_nobody_wants_them(tmp_path):
    program(tmp_path / "bin" / "nvcc", "exit 1")
    (line,) = said(tmp_path / "bin", DQO_KERNELS_CUDA="0")
    assert "'cuda' is left out: DQO_KERNELS_CUDA=0" in line


@pytest.mark.parametrize("release, lines", [("11.8", ["needs 12.0"]), ("12.4", [])])
def test_a_toolkit_that_is_too_old_is_left_out(tmp_path, release, lines):
    version = f'echo "Cuda compilation tools, release {release}, V"'
    text = f'case "$1" in --version) {version} ;; *) echo "#$ TOP=/opt/cuda" >&2 ;; esac'
    program(tmp_path / "cuda" / "bin" / "nvcc", text)
    found = said(tmp_path / "bin", CUDA_HOME=str(tmp_path / "cuda"))
    assert len(found) == len(lines) and all(a in b for a, b in zip(lines, found, strict=True))


def described():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_file_of_a_package_that_is_no_module_is_in_what_is_built():
    packed = {
        path
        for package, globs in described()["tool"]["setuptools"]["package-data"].items()
        for g in globs
        for path in (ROOT / package).glob(g)
    }
    built = {".pyc", ".so"}
    for package in ("dqo", "dqo_kernels"):
        files = [path for path in (ROOT / package).rglob("*") if path.is_file() and path.suffix not in {".py", *built}]
        assert ROOT / package / "py.typed" in files
        assert set(files) <= packed


def test_every_folder_with_modules_is_a_package_that_is_found_and_nothing_else_is():
    from setuptools import find_packages

    find = described()["tool"]["setuptools"]["packages"]["find"]
    assert find.pop("namespaces") is False
    modules = {
        path.parent.relative_to(ROOT) for package in ("dqo", "dqo_kernels") for path in (ROOT / package).rglob("*.py")
    }
    assert set(find_packages(str(ROOT), **find)) == {".".join(path.parts) for path in modules}


def test_every_dependency_has_an_oldest_version_that_constraints_txt_satisfies():
    from packaging.requirements import Requirement

    project = described()["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    for line in (
        project["dependencies"] + project["optional-dependencies"]["test"] + project["optional-dependencies"]["dev"]
    ):
        requirement = Requirement(line)
        assert any(bound.operator == ">=" for bound in requirement.specifier), line
        if requirement.name not in ("triton", "setuptools"):  # torch's, and the builder's own
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), line

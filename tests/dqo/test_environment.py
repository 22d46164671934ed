import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import dqo
from dqo import api, environment
from dqo.commands.base import dqo_command
from dqo.environment import env, version_line


@pytest.fixture(scope="module")
def facts():
    return env()


def test_versions_are_those_of_the_packages(facts):
    assert facts["torch"] == torch.__version__ and facts["transformers"] == transformers.__version__
    assert facts["python"].startswith(sys.version.split()[0])
    told = facts["also installed"] + facts["not installed"]
    assert all(name in told for name in environment.EXTRAS) and "tyro" in facts["also installed"]
    assert api.env is env


def test_every_backend_works_or_says_why_not(facts):
    told = {
        name.split()[1]: value for name, value in facts.items() if name.startswith("kernels") and name.endswith("cpu")
    }
    assert told["reference"] == "works" and told.get("cuda", "works") == "works"  # where it is emulated
    assert "_cpu " in facts["compiled"] and "_cuda " in facts["compiled"]
    assert told["triton"] == "works" or told["triton"].startswith("no: ")


def test_a_kernel_that_computes_something_else_is_named(monkeypatch):
    import dqo_kernels.__main__ as kernels

    monkeypatch.setattr(kernels, "verdict", lambda name, backend, device: (name != "lambda_return", "7.1 / 0.2"))
    assert env()["kernels reference on cpu"] == "fails its self-check: lambda_return 7.1 / 0.2"


def test_a_broken_torch_is_a_line_too(monkeypatch):
    def broken():
        raise ImportError("libcudart.so.13:\n cannot open")
        yield

    monkeypatch.setattr(environment, "_of_torch", broken)
    assert env()["torch"].endswith("; it cannot be used: ImportError: libcudart.so.13: cannot open")


def test_the_command_prints_a_line_each_and_no_secret(monkeypatch, capsys, facts):
    monkeypatch.setattr(environment, "_of_torch", lambda: iter(()))
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    monkeypatch.setenv("DQO_NOTE", "two\nlines\x1b[2J")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:open-sesame@mirror.example/hub")
    monkeypatch.setenv("NCCL_PASSPHRASE", "sesame")
    dqo_command(["env"])
    lines = capsys.readouterr().out.splitlines()
    assert all(": " in line for line in lines) and {line.partition(":")[0] for line in lines} <= facts.keys()
    text = "\n".join(lines)
    assert "HF_TOKEN=(set)" in text and "sesame" not in text and "DQO_NOTE=two lines\\x1b[2J" in text
    assert "hub /somewhere/hub" in text and "HF_ENDPOINT=https://(set)@mirror.example/hub" in text


def test_the_version_has_the_commit_of_a_checkout(tmp_path, monkeypatch, capsys):
    dqo_command(["--version"])
    said = capsys.readouterr().out
    assert said == version_line() + "\n" and said.startswith(f"dqo {dqo.__version__}")
    if (Path(dqo.__file__).parents[1] / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        assert f"(commit {head.stdout[:12]}" in said


@pytest.mark.parametrize(
    "noted, said",
    [
        (
            {"url": "https://x/dqo", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}},
            " (commit 0123456789ab of https://x/dqo)",
        ),
        ({"url": "file:///dqo", "dir_info": {"editable": True}}, ""),
        (None, ""),
    ],
)
def test_the_version_has_the_commit_that_pip_noted(tmp_path, monkeypatch, noted, said):
    class Distribution:
        def read_text(self, name):
            return None if noted is None else json.dumps(noted)

    monkeypatch.setattr(dqo, "__file__", str(tmp_path / "dqo" / "__init__.py"))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    assert version_line() == f"dqo {dqo.__version__}{said}"

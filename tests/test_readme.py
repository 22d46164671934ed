"""README.md is run: its Python, its flags, its paths."""

import re
from pathlib import Path

import pytest
import torch

from tests.dqo.conftest import files  # noqa: F401

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
    return [text for name, text in found if name == language]


def python_with(text: str) -> str:
    (found,) = [block for block in blocks("python") if text in block]
    return found


def test_the_trainer_runs_as_it_is_written(files, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(files)
    written = (
        python_with("DQOTrainer(")
        .replace("DIR_OR_HUB_NAME", "model")
        .replace("max_steps=100", "max_steps=2, eval_fraction=0.3")
    )
    exec(written, {})
    assert "eval_loss" in capsys.readouterr().out
    assert (files / "final" / "critic").exists() and (files / "out" / "model.safetensors").exists()


def test_the_drop_in_runs_and_trains_logits_and_values():
    torch.manual_seed(0)
    names = {
        "logits": torch.randn(2, 5, 11, requires_grad=True),
        "actions": torch.randint(0, 11, (2, 5)),
        "rewards": torch.randn(2, 5),
        "values": torch.randn(2, 5, requires_grad=True),
        "ref_logprobs": -torch.rand(2, 5),
        "mask": torch.arange(5) < torch.tensor([[5], [3]]),
    }
    exec(python_with("soft_bellman_loss("), names)
    assert names["logits"].grad.abs().sum() > 0 and names["values"].grad.abs().sum() > 0
    assert not names["logits"].grad[1, 3:].any()


def test_a_loss_of_ones_own_runs_without_logits():
    torch.manual_seed(0)
    names = {
        "hidden": torch.randn(9, 4, requires_grad=True),
        "weight": torch.randn(11, 4, requires_grad=True),
        "actions": torch.randint(0, 11, (9,)),
        "cu_seqlens": torch.tensor([0, 5, 9]),
        "advantages": torch.randn(9),
    }
    exec(python_with("linear_row_loss("), names)
    assert names["hidden"].grad.abs().sum() > 0 and names["weight"].grad.abs().sum() > 0
    assert names["metrics"]["entropy"] > 0


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line) for line in lines]


@pytest.mark.parametrize("command", [c for c in commands() if "dqo-train --" in c or "dqo.train --" in c])
def test_every_training_command_resolves(command):
    from dqo.config.options import load_options

    load_options(re.split(r"dqo.train ", command)[1].split())


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("dqo ")])
def test_every_other_command_exists_with_its_flags(command, capsys):
    from dqo.commands.base import commands as table

    _, name, *arguments = command.split()
    with pytest.raises(SystemExit):
        table()[name](["--help"], f"dqo {name}")
    shown = capsys.readouterr().out
    assert all(argument in shown for argument in arguments if argument.startswith("--"))


def test_the_two_commands_are_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    first, second = commands()[:2]
    assert first == "pip install -e . && dqo-train" and second == "pip install -e '.[test]' && pytest"
    assert "pip install -q -e .\n" in ci and "\ndqo-train " in ci and "\npytest\n" in ci


def test_the_row_of_the_data_format_is_one():
    import json

    from dqo.data.rows import read_rows

    (row,) = read_rows([json.loads(block) for block in blocks("json")])
    assert row.label is True


def test_the_tree_names_what_is_there():
    (tree,) = blocks("")
    folder = ""
    for line in tree.splitlines():
        names, indented = re.split(r"\s{3,}", line.strip())[0].split(), line.startswith("  ")
        for name in names:
            path = ROOT / (folder if indented else "") / name
            assert list(path.parent.glob(path.name)), name
        if not indented and names[0].endswith("/"):
            folder = names[0]

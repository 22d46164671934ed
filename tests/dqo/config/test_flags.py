"""Flags before tyro reads them: configuration files are taken, unknown flags refused."""

import pytest

from dqo.config.options import load_options
from dqo.errors import UserError


def test_an_unknown_flag_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match="unknown option '--lerning_rate'. Did you mean '--learning_rate'"):
        load_options(["--lerning_rate", "3"])


def test_files_are_taken_however_they_are_given(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("beta: 0.3\nlam: 0.5\n")
    second.write_text("lam: 0.7\n")
    for arguments in (
        ["--config", str(first), str(second)],
        [f"--config={first}", f"--config={second}"],
        ["--config", str(first), "--seed", "3", "--config", str(second)],
        ["--config", str(first), f"--config={second}"],
    ):
        objective = load_options(arguments).objective
        assert (objective.beta, objective.lam) == (0.3, 0.7), arguments
    for arguments in (["--config"], ["--config="], ["--config", "--seed", "1"]):
        with pytest.raises(UserError, match="--config needs a file"):
            load_options(arguments)
    with pytest.raises(UserError, match="absent.yaml: cannot be read"):
        load_options([f"--config={tmp_path}/absent.yaml"])

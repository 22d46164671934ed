"""Flags before tyro reads them: configuration files are taken, unknown flags refused."""

import dataclasses
from typing import Annotated, Literal

import pytest
import tyro

from dqo.config.flags import given_values
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


@pytest.mark.parametrize("yes", [["--use_peft", "True"], ["--use-peft=true"], ["--use_peft"], ["--use_peft", "TRUE"]])
@pytest.mark.parametrize("no", [["--no_bf16"], ["--bf16", "False"], ["--bf16=false"]])
def test_a_switch_may_be_followed_by_its_value(yes, no):
    needed = ["--dataset_name", "True", "--padding_free", "True", "--output_dir=false"]
    found = load_options([*yes, *needed, *no]).train
    assert (found.use_peft, found.bf16, found.padding_free) == (True, False, True)
    assert (found.dataset_name, found.output_dir) == ("True", "false")


@dataclasses.dataclass(frozen=True)
class Several:
    """Options of every kind."""

    files: tyro.conf.Positional[tuple[str, ...]]
    out: str
    steps: int = 3
    rate: float | None = 0.5
    names: tuple[str, ...] | None = None
    kind: Literal["a", "b"] | None = None
    on: bool = True
    off: bool = False
    more: Annotated[tuple[int, ...], tyro.conf.arg(help="Numbers.")] = dataclasses.field(default_factory=tuple)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x", "y"],
        ["--steps=-2", "--rate", "None", "--no_on", "--off"],
        ["--names", "p", "q", "--kind", "b", "--more", "1", "2"],
        ["--rate", "-1e-3", "--names", "None", "--no-off", "--on"],
    ],
)
def test_a_parser_of_the_named_options_finds_what_one_of_all_finds(arguments):
    arguments = [*arguments, "--out", "o"]
    whole = tyro.cli(Several, args=arguments, use_underscores=True)
    assert Several(**given_values([Several], arguments)) == whole
    default = Several(("z",), "p", 1, None, ("r",), "a", False, True, (7,))
    whole = tyro.cli(Several, args=arguments, default=default, use_underscores=True)
    if not {"x", "y"} & set(arguments):  # files have a default and are not named: left to the parser of all
        assert dataclasses.replace(default, **given_values([default], arguments)) == whole


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        ["--steps", "x"],
        ["--kind", "c"],
        ["--no_steps"],
        ["--off=3"],
        ["--rate"],
        ["--kind", "a", "x"],
    ],
)
def test_what_does_not_fit_is_told_by_a_parser_of_all(arguments, capsys):
    assert given_values([Several(("z",), "p")], arguments) is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("value", ["1", "yes"])
def test_a_switch_takes_no_other_value(value):
    with pytest.raises(UserError, match=f"--use_cpu is True or False, or stands alone for True, got '{value}'"):
        load_options(["--dataset_name", "rows.jsonl", "--beta", "0.1", f"--use-cpu={value}"])

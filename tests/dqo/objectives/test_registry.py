"""Methods are the modules of dqo/objectives, and classes of other packages that are named as package.module:Class."""

import ast
import re
import sys
import textwrap
from pathlib import Path

import pytest

from dqo import DQOConfig
from dqo.commands.base import dqo_command
from dqo.config.options import dump_options, load_options
from dqo.errors import UserError
from dqo.objectives import DQO, OBJECTIVES
from dqo.objectives.base import Objective
from dqo.objectives.registry import method_of, methods_table, objective_class, summary

ROOT = Path(__file__).parents[3]
CLASS = """
from dataclasses import dataclass
from typing import ClassVar
from dqo.objectives.base import Objective

@dataclass(frozen=True)
class Mine(Objective):
    '''Likelihood, times a factor.

    More words.'''
    factor: float = 2.0
    '''Factor of the loss.'''

    def __call__(self, stats, rows, cu_seqlens):
        return -self.factor * stats.logprobs.sum(), {}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module on Python's path; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def write(text):
        name = f"outside_{len(made)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        sys.modules.pop(name, None)
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_method_is_one_file_and_one_test_and_shows_its_equation(method):
    path = ROOT / "dqo" / "objectives" / f"{method}.py"
    text = ast.get_docstring(ast.parse(path.read_text()))
    first, *others = text.split("\n\n")
    assert first.endswith(".") and len(summary(OBJECTIVES[method])) < 150
    assert re.search(r"L(_\w+)? += ", "\n\n".join(others)), "its loss stands in the docstring"
    assert any(method in other.stem for other in (ROOT / "tests" / "dqo" / "objectives").glob("test_*.py"))


def test_a_reader_of_dqo_sees_both_equations_and_where_they_are_computed():
    text = (ROOT / "dqo" / "objectives" / "dqo.py").read_text()
    documented, code = text.split("from __future__")
    for equation in ("4.6", "4.7"):
        assert f"eq. {equation}  " in documented and f"# eq. {equation}:" in code


# Where such a word is no method: data formats that are named after a trainer, the name of a model in an example, and the
# command that begins the demonstration, which compares four; and examples of a comparison's options, --METHOD.OPTION.
OTHERWISE = {"convert": "oreo kto", "commands": "oreo kto dpo", "data/forms.py": "oreo", "data/checks.py": "sft"}
OTHERWISE |= {"comparison": "dpo"}


def test_nobody_else_names_a_method():
    names = re.compile(rf"\b({'|'.join(sorted(set(OBJECTIVES) - {'dqo'}))})\b", re.I)
    for path in ROOT.glob("dqo/**/*.py"):
        place = path.relative_to(ROOT / "dqo").as_posix()
        if place.startswith(("objectives/", "demo/")):
            continue
        allowed = {word for where, words in OTHERWISE.items() if place.startswith(where) for word in words.split()}
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = set() if "built-in task" in line else {word.lower() for word in names.findall(line)} - allowed
            assert not found, f"{place}:{number} names {found}"
            assert not re.search(r"method['\"]?\s*(==|!=|: str = |, \(|=|in)\s*['\"(]+dqo", line), f"{place}:{number}"


def test_the_lists_of_methods_are_those_of_the_registry(capsys):
    with pytest.raises(SystemExit):
        load_options(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, cls in OBJECTIVES.items():
        assert f"{name}: {summary(cls)}" in shown and f"{name}: {summary(cls)}" in DQOConfig.__doc__
    assert methods_table().count("\n") + 1 == len(OBJECTIVES)


def test_a_class_of_another_package_is_a_method(module, tmp_path, capsys):
    name = f"{module(CLASS)}:Mine"
    options = load_options(["--method", name, "--factor", "3"])
    assert type(options.objective).__name__ == "Mine" and options.objective.factor == 3.0
    path = tmp_path / "c.yaml"
    path.write_text(dump_options(options))
    assert load_options(["--config", str(path)]).flat() == options.flat()
    assert DQOConfig(method=name, factor=3.0).options.flat() == options.flat()
    assert DQOConfig(method=type(options.objective), factor=3.0).options.flat() == options.flat()
    assert summary(type(options.objective)) == "Likelihood, times a factor."
    with pytest.raises(SystemExit):
        load_options(["--method", name, "--help"])
    assert "Factor of the loss." in capsys.readouterr().out
    rollouts = tmp_path / "r.jsonl"
    rollouts.write_text(
        '{"prompt": "a", "completion": "b", "reward": 1}\n{"prompt": "a", "completion": "c", "reward": 0}\n'
    )
    dqo_command(["check", str(rollouts), "--method", name])


def test_a_class_that_is_a_method_keeps_its_name():
    assert DQOConfig(method=DQO).method == "dqo" and method_of(DQO) == "dqo"


def test_a_class_within_a_function_is_refused():
    class Local(DQO):
        pass

    with pytest.raises(UserError, match="Local is defined within a function; define it at the top level of a module"):
        DQOConfig(method=Local)


FIELD = "    factor: float = 2.0"


@pytest.mark.parametrize(
    "text, name, message",
    [
        (CLASS, "Mne", r"the module outside_0 has no class Mne. Did you mean 'Mine'\?"),
        (CLASS, "", r"method must be one of .*, or package.module:Class, got 'outside_0:'"),
        (
            "import no_such_package",
            "Mine",
            "importing outside_0 fails: ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("1 +", "Mine", "importing outside_0 fails: SyntaxError"),
        ("raise RuntimeError('a\\nb')", "Mine", "importing outside_0 fails: RuntimeError: a b"),
        ("Mine = 3", "Mine", "Mine is not an Objective: make it a subclass of dqo.objectives.base.Objective"),
        ("class Mine: ...", "Mine", "Mine is not an Objective"),
        (CLASS.replace("__call__", "loss"), "Mine", "Mine has no __call__"),
        (CLASS.replace("@dataclass(frozen=True)", ""), "Mine", "Mine has factor, which is no field: put @dataclass"),
        (CLASS.replace("(frozen=True)", ""), "Mine", "cannot inherit non-frozen dataclass from a frozen one"),
        (CLASS.replace(FIELD, "    factor: float"), "Mine", "Mine has the field factor without a default"),
        (
            CLASS.replace(FIELD, "    factor: list[int] = ()"),
            "Mine",
            "Mine has the field factor of a type that no option has",
        ),
        (CLASS.replace(FIELD, "    factor: 'Nope' = 1"), "Mine", "Mine has a type that cannot be read: name 'Nope'"),
        (
            CLASS.replace(FIELD, "    factor: float = 2.0\n    seed: int = 0"),
            "Mine",
            "Mine has the field seed, which is an option of training",
        ),
        (
            CLASS.replace(FIELD, "    factor: float = 2.0\n    config: str = ''"),
            "Mine",
            "Mine has the field config, which is",
        ),
        (
            CLASS.replace(FIELD, FIELD + "\n    unit: ClassVar[str] = 'pair'"),
            "Mine",
            "the unit 'pair'; it is one of token, resp",
        ),
        (CLASS.replace(FIELD, "    factor: float = 'a'"), "Mine", "default: factor must be float, got 'a'"),
        (CLASS.replace(FIELD, "    factor: int = 0.5"), "Mine", "default: factor must be int, got 0.5"),
        (CLASS.replace(FIELD, "    factor: int = None"), "Mine", "default: factor must be int, got None"),
        (
            "from typing import Literal" + CLASS.replace(FIELD, "    factor: Literal['a', 'b'] = 'c'"),
            "Mine",
            r"default: factor must be Literal\['a', 'b'\], got 'c'",
        ),
        (
            "from dataclasses import field"
            + CLASS.replace(FIELD, "    factor: float = field(default=2.0, init=False)"),
            "Mine",
            "Mine has the field factor with init=False, which no option could set",
        ),
    ],
)
def test_what_is_no_objective_is_refused_in_one_line(module, text, name, message):
    method = f"{module(text)}:{name}"
    for attempt, source in (
        (lambda: load_options(["--method", method]), "--method"),
        (lambda: DQOConfig(method=method), "DQOConfig"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            attempt()
        assert len(str(caught.value).splitlines()) == 1 and f"(from {source})" in str(caught.value)


ANSWERS = [name for name in vars(Objective) if not name.startswith("_")]


@pytest.mark.parametrize("name", ANSWERS)
def test_no_field_takes_the_place_of_an_answer(module, name):
    assert len(ANSWERS) > 15
    text = CLASS.replace(FIELD, f"    {name}: str = 'token'")
    method = f"{module(text)}:Mine"
    with pytest.raises(UserError, match=f"Mine has the field {name}, which every objective answers itself; name it"):
        objective_class(method)


def test_a_module_that_is_nowhere_is_named_with_the_cure():
    with pytest.raises(
        UserError, match="method no_such.thing:X: Python finds no module no_such.thing; .* set PYTHONPATH"
    ):
        objective_class("no_such.thing:X")


def test_every_module_of_the_folder_is_an_objective_or_known_not_to_be_one():
    from dqo.objectives import registry

    stems = {path.stem for path in (ROOT / "dqo" / "objectives").glob("*.py")} - {"__init__"}
    assert stems == set(OBJECTIVES) | registry._HELPERS
    assert all(issubclass(cls, Objective) for cls in OBJECTIVES.values())

"""The help of every option of every command and objective is made of sentences that stand alone."""

import dataclasses
import re
import warnings

import pytest
from tyro.extras import get_parser

from dqo.config.options import TrainConfig
from dqo.demo.recipe import DemoConfig
from dqo.modules import modules_in
from dqo.objectives import OBJECTIVES


def config_classes():
    """The options of training, of the demonstration, of each command that has some, and of each objective."""
    found = {TrainConfig, DemoConfig, *OBJECTIVES.values()}
    for module in modules_in("dqo.commands"):
        found |= {x for x in vars(module).values() if dataclasses.is_dataclass(x) and x.__name__.endswith("Config")}
    return sorted(found, key=lambda cls: cls.__name__)


def helps(cls):
    """{option: its text as `--help` has it}, without the default that is shown after it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        actions = get_parser(cls, use_underscores=True)._actions
    texts = {action.dest: " ".join((action.help or "").split()) for action in actions if action.dest != "help"}
    return {name: re.sub(r" ?\((default: .*|required)\)$", "", text) for name, text in texts.items()}


def fault(text):
    """What keeps a help text from being sentences; "" for one that is."""
    sentences = re.split(r"(?<=[.]) (?=[A-Z\"`])", text)
    if not text.endswith("."):
        return "has no full stop at its end"
    if not re.match(r"[A-Z\"`]", text):
        return "does not begin with a capital, a quoted word or code"
    if len(sentences[0].split()) < 4:
        return "begins with fewer than four words, which are no sentence"
    if re.match(r"(Of|See|Their|Its)\b", text):
        return "needs another option's text to be understood"
    return ""


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_every_help_text_stands_alone(cls):
    found = helps(cls)
    assert found.keys() == {field.name for field in dataclasses.fields(cls)}
    assert {name: (why, text) for name, text in found.items() if (why := fault(text))} == {}


def test_the_options_of_every_command_are_looked_at():
    names = {cls.__name__ for cls in config_classes()}
    assert names >= {"TrainConfig", "DemoConfig", "CheckConfig", "ConvertConfig", "InitConfig", "DQO", "OREO"}


@pytest.mark.parametrize(
    "text",
    ["", "Of the policy.", "See reward_scale.", "KL temperature.", "the policy has this rate.", "It has this rate"],
)
def test_fragments_are_found(text):
    assert fault(text)

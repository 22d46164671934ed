"""Every option of every command: numbers are finite and in range, names are names, and the nearest option is suggested."""

import dataclasses
import math
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from dqo.api import DQOConfig, DQOTrainer
from dqo.commands.base import dqo_command
from dqo.commands.check import CheckConfig
from dqo.commands.convert import ConvertConfig
from dqo.commands.init import InitConfig
from dqo.config.flags import parse_flags
from dqo.config.options import TrainConfig, load_options
from dqo.config.values import SYNONYMS, brief, suggestion
from dqo.demo.recipe import DemoConfig
from dqo.errors import UserError
from dqo.objectives import OBJECTIVES

POSITIONAL = {CheckConfig: ["rollouts.jsonl"], ConvertConfig: ["oreo", "a.jsonl", "b.jsonl"]}
REQUIRED = {InitConfig: ["--dataset_name=a.jsonl", "--output_dir=b"]}
COMMANDS = [DemoConfig, CheckConfig, ConvertConfig, InitConfig]
ANY_NUMBER = {"process_coef", "reward_scale", "reward_shift", "reward_threshold", "is_cap", "is_floor"}  # of both signs


def fields_of(kind):
    """(dataclass, field, method that has it) of every option that may be of `kind`, float, int or str; one that several inherit
    is there once."""
    classes = [
        (TrainConfig, "dqo"),
        *((cls, method) for method, cls in OBJECTIVES.items()),
        *((c, None) for c in COMMANDS),
    ]
    found = {}
    for cls, method in classes:
        hints = get_type_hints(cls)
        for name in (field.name for field in dataclasses.fields(cls)):
            origin = next(c for c in cls.__mro__ if name in vars(c).get("__annotations__", {}))
            if kind in (hints[name], *get_args(hints[name])):
                found.setdefault((origin, name), pytest.param(cls, name, method, id=f"{cls.__name__}.{name}"))
    return list(found.values())


def refusal(cls, name, method, text):
    """The message for a flag's value."""
    with pytest.raises(UserError) as caught:
        if method is None:
            arguments = [a for a in REQUIRED.get(cls, []) if not a.startswith(f"--{name}=")]
            parse_flags(cls, [*POSITIONAL.get(cls, []), *arguments, f"--{name}={text}"], "dqo")
        else:
            load_options(["--method", method, f"--{name}={text}"])
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("cls, name, method", fields_of(float))
def test_no_number_is_infinite_or_none(cls, name, method):
    for text in ("nan", "inf", "-inf", "1e39"):
        line = refusal(cls, name, method, text)
        assert line.startswith(f"{name} must be a finite float32 number") and line.endswith(f"(from --{name})"), line
    if method is not None:
        for value in (math.nan, math.inf, np.float32("inf"), torch.tensor(math.nan), 10**400):
            with pytest.raises(UserError, match=f"{name} must be a finite float32 number.*from DQOConfig"):
                DQOConfig(method=method, **{name: value})


@pytest.mark.parametrize("cls, name, method", [*fields_of(float), *fields_of(int)])
def test_every_number_has_a_range(cls, name, method):
    if name in ANY_NUMBER:
        return
    least = "-3" if name == "max_steps" else "-1"
    assert refusal(cls, name, method, least).startswith(f"{name} must be ")


@pytest.mark.parametrize("cls, name, method", fields_of(int))
def test_integers_have_64_bits(cls, name, method):
    for text in (str(2**63), "9" * 200):
        assert refusal(cls, name, method, text).startswith(f"{name} must be an integer of 64 bits")


BAD_NAMES = {
    "NUL": ("a\0b", "has the control character"),
    "a new line": ("a\nb", "has the control character"),
    "an escape": ("a\x1b[31mb", "has the control character"),
    "half a surrogate pair": ("a\ud800b", "is not valid UTF-8"),
    "a byte of latin-1": ("caf\udce9", "is not valid UTF-8"),
    "5,000 characters": ("x" * 5000, "has 5,000 bytes"),
    "a long name": ("d/" + "x" * 256, "has 258 bytes, 256 between two slashes"),
    "a long path": ("d/" * 3000 + "x", "has 6,001 bytes"),
    "nothing": ("", "is empty"),
}


@pytest.mark.parametrize("text, message", BAD_NAMES.values(), ids=BAD_NAMES)
def test_names_that_no_file_can_have_are_refused_from_everywhere(text, message, tmp_path):
    for parameters in fields_of(str):
        cls, name, method = parameters.values
        flat = get_type_hints(cls)[name] in (str, str | None)
        if name == "preset":
            continue  # one of a few names, and no file's
        if method == "dqo" and flat:
            with pytest.raises(UserError, match=f"{name}.* {message}"):
                DQOConfig(**{name: text})
            assert message in refusal(cls, name, method, text)
        elif method is None and name not in ("format", "source", "destination"):
            assert message in refusal(cls, name, method, text)
    for command in (["convert", "oreo", text, "b.jsonl"], ["convert", "oreo", "a.jsonl", text], ["check", text]):
        with pytest.raises(UserError, match=message):
            dqo_command(command)
    with pytest.raises(UserError, match=message):
        load_options([f"--config={text}"] if text else ["--config", text])
    with pytest.raises(UserError, match=message):
        DQOTrainer(model=text, train_dataset="rollouts.jsonl")
    with pytest.raises(UserError, match=message):
        DQOTrainer(model="model", train_dataset=text)
    if text:
        with pytest.raises(UserError, match="^'--.* (has|is not) "):
            load_options([f"--{text}"])


RIGHT = {
    "a number of numpy": ({"beta": np.float64(0.25)}, {"beta": 0.25}),
    "a float32 of numpy": ({"beta": np.float32(0.25)}, {"beta": 0.25}),
    "an integer of numpy": ({"max_steps": np.int64(3)}, {"max_steps": 3}),
    "an integer for a float": ({"beta": 1}, {"beta": 1.0}),
    "an integer of numpy for a float": ({"beta": np.int32(1)}, {"beta": 1.0}),
    "a bool of numpy": ({"bf16": np.bool_(True)}, {"bf16": True}),
    "a tensor": ({"beta": torch.tensor(0.25)}, {"beta": 0.25}),
    "a path": ({"output_dir": Path("a/b")}, {"output_dir": "a/b"}),
    "a string of numpy": ({"run_name": np.str_("x")}, {"run_name": "x"}),
    "a tuple": ({"lora_target_modules": ("q", "v")}, {"lora_target_modules": ("q", "v")}),
    "a list": ({"lora_target_modules": ["q"]}, {"lora_target_modules": ("q",)}),
    "None": ({"is_cap": None}, {"is_cap": None}),
}


@pytest.mark.parametrize("values, expected", RIGHT.values(), ids=RIGHT)
def test_values_of_python_serve(values, expected):
    found = DQOConfig(**values)
    for name, value in expected.items():
        assert getattr(found, name) == value and type(getattr(found, name)) is type(value)


WRONG = {
    "a string for a number": ({"beta": "0.1"}, "beta must be float, got '0.1'"),
    "a string with an exponent": ({"learning_rate": "1e-6"}, "learning_rate must be float, got '1e-6'"),
    "a bool for an integer": ({"max_steps": True}, "max_steps must be int, got True"),
    "a bool of numpy for a float": ({"beta": np.bool_(True)}, "beta must be float, got True"),
    "a float for an integer": ({"seed": 3.0}, "seed must be int, got 3.0"),
    "an integer for a bool": ({"bf16": 1}, "bf16 must be bool, got 1"),
    "an array": ({"beta": np.ones(3)}, "beta must be float, got array"),
    "a list of numbers": ({"lora_target_modules": [1]}, "lora_target_modules must be"),
    "a word for a list": ({"lora_target_modules": "q"}, "lora_target_modules must be"),
    "an array for a word": ({"policy_target": np.ones(3)}, "policy_target must be"),
    "bytes": ({"run_name": b"x"}, "run_name must be str"),
    "a list for the method": ({"method": ["dqo"]}, "method must be one of"),
    "None for a number": ({"beta": None}, "beta must be float, got None"),
    "an option of another method": (
        {"method": "sft", "beta": 1.0},
        "unknown option 'beta'.*option of method adpo, curry_dpo, dapo, dpo, dqo",
    ),
    "a long one": ({"beta": ["x" * 500] * 500}, "beta must be float, got .* characters"),
}


@pytest.mark.parametrize("values, message", WRONG.values(), ids=WRONG)
def test_other_values_of_python_are_refused_in_one_line(values, message):
    with pytest.raises(UserError, match=message) as caught:
        DQOConfig(**values)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


def all_options():
    return {f.name for cls in (TrainConfig, *OBJECTIVES.values()) for f in dataclasses.fields(cls)} | {"config"}


def test_synonyms_lead_to_options_and_each_to_one_of_a_method():
    words = [word for words in SYNONYMS.values() for word in words.split()]
    assert all_options() >= SYNONYMS.keys()
    for cls in OBJECTIVES.values():
        of_method = {f.name for known in (TrainConfig, cls) for f in dataclasses.fields(known)}
        own = [word for option, words in SYNONYMS.items() if option in of_method for word in words.split()]
        assert len(own) == len(set(own))
    assert not set(words) & {f.name for f in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("method, option", [("dqo", "nll_coef"), ("dpo", "rpo_alpha")])
def test_a_likelihood_is_named_as_the_method_has_it(method, option):
    known = {f.name for f in dataclasses.fields(OBJECTIVES[method])}
    assert suggestion("sft_coef", known, prefix="--") == f" Did you mean '--{option}'?"


@pytest.mark.parametrize(
    "word, option",
    [
        ("lr", "learning_rate"),
        ("LR", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("batch-size", "per_device_train_batch_size"),
        ("model", "model_name_or_path"),
        ("dataset", "dataset_name"),
        ("data", "dataset_name"),
        ("output", "output_dir"),
        ("steps", "max_steps"),
        ("lambda", "lam"),
        ("max_seq_length", "max_length"),
        ("lerning_rate", "learning_rate"),
    ],
)
def test_the_option_that_was_meant_is_suggested_everywhere(word, option, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{word}: 1")
    for attempt in (
        lambda: load_options([f"--{word}", "1"]),
        lambda: load_options([f"--{word}=1"]),
        lambda: load_options(["--config", str(tmp_path / "c.yaml")]),
        lambda: DQOConfig(**{word: 1}),
    ):
        with pytest.raises(UserError, match=f"unknown option .*Did you mean '(--)?{option}'"):
            attempt()


def test_an_option_of_another_method_is_named_with_it():
    with pytest.raises(UserError, match="Did you mean '--beta'. kl_coef is an option of method dqo"):
        load_options(["--method", "dpo", "--kl_coef", "1"])


def test_nothing_is_suggested_where_nothing_is_near():
    assert suggestion("zzzzzz", ["beta"]) == ""


def test_other_commands_suggest_their_own_options():
    with pytest.raises(UserError, match="unknown option '--model'. Did you mean '--model_name_or_path'"):
        dqo_command(["check", "a.jsonl", "--model", "m"])


def test_any_value_is_shown_in_one_short_line():
    class Odd:
        def __repr__(self):
            raise RuntimeError

    for value in (Odd(), 10**6000, "a\nb", np.ones((100, 100)), "\ud800", {"a": 1}, "x" * 1000):
        assert len(brief(value).splitlines()) == 1 and len(brief(value)) < 120

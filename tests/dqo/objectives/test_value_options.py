import dataclasses

import pytest

from dqo.objectives import DQO, DRO, OBJECTIVES, OREO
from dqo.objectives.base import VALUE_KINDS
from dqo.objectives.value_options import ValueOptions

OPTIONS = ["value_coef", "value_loss", "value_model", "implicit_beta"]
WITH_VALUES = [cls for cls in OBJECTIVES.values() if issubclass(cls, ValueOptions)]


def names_of(cls):
    return [f.name for f in dataclasses.fields(cls)]


def test_whatever_fits_a_value_model_has_the_same_options_of_it():
    assert {DQO, DRO, OREO} <= set(WITH_VALUES)
    for cls in WITH_VALUES:
        assert set(cls.value_kinds) <= set(VALUE_KINDS)
        own = {
            name for base in cls.__mro__ if base is not ValueOptions for name in vars(base).get("__annotations__", {})
        }
        again = [name for name in own & set(OPTIONS) if getattr(cls, name) == getattr(ValueOptions, name)]
        assert not again, f"{cls.__name__} says again what ValueOptions says"
        assert [name for name in names_of(cls) if name in OPTIONS] == OPTIONS


@pytest.mark.parametrize(
    ("cls", "before", "behind"),
    [
        (DQO, "policy_scale", ["kl_coef", "target_ema", "nll_coef", "nll_on"]),
        (DRO, "value_states", []),
        (OREO, "level", []),
    ],
)
def test_stored_options_keep_their_order(cls, before, behind):
    names = names_of(cls)
    assert names[0] == "beta"
    assert names[names.index(before) + 1 :] == [*OPTIONS, *behind]


@pytest.mark.parametrize("cls", WITH_VALUES)
def test_values_out_of_range_are_named(cls, tmp_path):
    wrong = {"value_coef": -1.0, "implicit_beta": 0.0, "value_model": "heads"}
    assert {name for name, _ in dataclasses.replace(cls(), **wrong).problems()} == set(wrong)
    assert dataclasses.replace(cls(), value_model=str(tmp_path)).problems() == []  # looked into elsewhere
    for kind in VALUE_KINDS:
        found = [name for name, _ in dataclasses.replace(cls(), value_model=kind).problems()]
        assert found == ([] if kind in cls.value_kinds else ["value_model"])

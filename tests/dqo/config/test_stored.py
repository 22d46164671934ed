"""A run's config.yaml, read again: what training refuses is refused with its line, what it takes is taken."""

import dataclasses
import logging

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dqo.config.options import TrainConfig, dump_options, load_options, options_of
from dqo.config.stored import stored_options_of
from dqo.errors import UserError
from dqo.objectives.registry import OBJECTIVES

METHODS = sorted(OBJECTIVES)


def read(tmp_path, told):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    return stored_options_of(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_wrote_is_read_as_it_was(method, tmp_path):
    options = load_options(["--method", method, "--max_steps", "3", "--lora_target_modules", "q_proj", "v_proj"])
    (tmp_path / "config.yaml").write_text(dump_options(options))
    found = stored_options_of(str(tmp_path / "config.yaml"))
    kept = {name: value for name, value in options.flat().items() if name != "num_train_epochs"}
    assert found == kept


_ODD = st.one_of(
    st.booleans(), st.integers(-3, 3), st.floats(-3, 3), st.just(float("nan")), st.sampled_from(["odd", "none", "auto"]),
    st.lists(st.sampled_from(["a"]), max_size=1), st.none(),
)  # fmt: skip
_NAMES = {m: sorted({f.name for cls in (TrainConfig, OBJECTIVES[m]) for f in dataclasses.fields(cls)}) for m in METHODS}
_FILES = {
    "value_model",
    "preset",
    "max_steps",
    "num_train_epochs",
    "method",
}  # files may be gone; the rest is of commands


@given(st.data())
def test_one_altered_option_is_refused_where_training_refuses_it(tmp_path_factory, data):
    method = data.draw(st.sampled_from(METHODS))
    name = data.draw(st.sampled_from([n for n in _NAMES[method] if n not in _FILES]))
    told = {"method": method, name: data.draw(_ODD)}
    folder = tmp_path_factory.mktemp("stored")
    try:
        expected = options_of(told, "the file").flat()[name]
    except UserError:
        with pytest.raises(UserError) as caught:
            read(folder, told)
        message = str(caught.value)
        assert "\n" not in message and "config.yaml" in message and "; write what the run was trained with" in message
    else:
        assert read(folder, told) == {"method": method, name: expected}


def test_a_value_model_that_was_moved_and_a_class_that_is_not_here_are_no_faults(tmp_path, caplog):
    told = {"method": "dqo", "value_model": "gone/critic"}
    assert read(tmp_path, told) == told
    told = {"method": "gone.package:Mine", "beta": 0.3, "own": 1}
    assert read(tmp_path, told) == {"method": "gone.package:Mine", "beta": 0.3}
    for name, value in (("beta", -1.0), ("gamma", 2.0), ("discount", "odd"), ("process_reward", "odd")):
        with pytest.raises(UserError, match=rf"config.yaml:[23]: {name} must be"):
            read(
                tmp_path,
                told | {"beta": 0.1} | {"own": 1} | {name: value}
                if name == "beta"
                else {"method": told["method"], "own": 1, name: value},
            )


def test_an_option_of_another_version_is_named_and_passed_over(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, {"method": "sft", "beta": 0.1, "seed": 3}) == {"method": "sft", "seed": 3}
    assert "config.yaml:2: there is no option 'beta' now; it is passed over" in caplog.text


@pytest.mark.parametrize("method", ["dqq", 3, None, ["dqo"], ""])
def test_a_method_that_is_none_is_named(method, tmp_path):
    with pytest.raises(UserError, match="config.yaml:1: method must be one of .*dpo, .*, got .*; write what"):
        read(tmp_path, {"method": method})

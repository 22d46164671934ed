"""Presets lie between the defaults and whatever is given."""

import dataclasses

import pytest

from dqo import DQOConfig
from dqo.config.options import dump_options, load_options
from dqo.config.presets import PRESETS
from dqo.errors import UserError
from dqo.objectives import DQO
from dqo.train.resume import default_values

PAPER = PRESETS["paper"]
UNTOLD = {"beta", "implicit_beta"}  # the paper does not tell the first, and has no use for the second


@dataclasses.dataclass(frozen=True)
class Later(DQO):
    """The method with other defaults."""

    lam: float = 0.9
    is_cap: float | None = None
    value_model: str = "none"
    beta: float = 0.2


def test_the_preset_decides_every_option_of_the_method_that_the_paper_tells():
    assert {f.name for f in dataclasses.fields(DQO)} - PAPER.keys() == UNTOLD
    flat = load_options(["--preset", "paper"]).flat()
    assert {name: flat[name] for name in PAPER} == PAPER


def test_soft_is_the_papers_without_a_value_model_and_without_weights():
    soft = load_options(["--preset", "soft"]).objective
    assert not soft.needs_values and soft.weight_level == "none" and soft.problems() == []
    changed = {name for name, value in PRESETS["soft"].items() if PAPER[name] != value}
    assert changed == {"value_model", "is_level"} and PRESETS["soft"].keys() == PAPER.keys()


def test_reasoning_keeps_correct_responses_likely_and_has_no_value_model_of_its_own():
    found = load_options(["--preset", "reasoning"])
    assert found.objective.nll_coef > 0 and found.objective.value_model == "head" and found.objective.problems() == []
    changed = {name for name, value in PRESETS["reasoning"].items() if name not in PAPER or PAPER[name] != value}
    assert changed == {"beta", "value_model", "is_level", "nll_coef", "value_warmup_steps"}
    assert load_options(["--preset", "reasoning", "--beta", "0.1"]).objective.beta == 0.1


def test_it_is_the_papers_whatever_the_defaults_are(monkeypatch):
    monkeypatch.setattr("dqo.config.options.objective_class", lambda *_: Later)
    assert load_options([]).objective.lam == 0.9
    found = load_options(["--preset=paper"])
    assert {name: found.flat()[name] for name in PAPER} == PAPER and found.objective.beta == 0.2
    assert default_values(found)["lam"] == 0.9


def test_flags_files_and_keywords_win_over_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("preset: paper\nlam: 0.5\nbeta: 0.2\n")
    options = load_options(["--config", str(path), "--is_cap", "2"])
    assert (options.objective.lam, options.objective.beta, options.objective.is_cap) == (0.5, 0.2, 2.0)
    assert options.sources["lam"].endswith("c.yaml:2") and options.sources["is_level"] == "preset paper"
    assert DQOConfig(preset="paper", lam=0.5).lam == 0.5 and DQOConfig(preset="paper").is_level == "trajectory"
    again = tmp_path / "again.yaml"
    again.write_text(dump_options(options))
    assert load_options(["--config", str(again)]).flat() == options.flat()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--preset", "papr"],
            r"preset must be paper, soft, reasoning, got 'papr' \(from --preset\). Did you mean 'paper'\?",
        ),
        (
            ["--preset=paper", "--method", "dpo"],
            r"preset paper \(from --preset\) is of method dqo, and method is dpo \(from",
        ),
    ],
)
def test_a_preset_that_is_none_or_of_another_method_is_refused(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        load_options(arguments)
    assert len(str(caught.value).splitlines()) == 1
    values = dict(zip(["preset", "method"], [a for a in " ".join(arguments).replace("=", " ").split() if a[0] != "-"]))
    with pytest.raises(UserError, match=message.split(r"\(from")[0]):
        DQOConfig(**values)

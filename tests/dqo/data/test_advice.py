"""Warnings of rows, the same for `dqo check` and training: where they are due, and that they are not given elsewhere."""

import logging
from types import SimpleNamespace

import pytest

from dqo.commands.base import dqo_command
from dqo.data.advice import row_warnings
from dqo.data.mixed import open_data
from dqo.data.rows import read_rows, write_rows
from dqo.errors import UserError
from dqo.objectives import OBJECTIVES

STEPS = {"steps": [[0, 1], [1, 2]], "completion": "ab"}


def row(**changes):
    return {"prompt": "p", "completion": "c", "reward": 1.0} | changes


def settings(**changes):
    usual = {"method": None, "truncation": "terminal", "process_reward": None, "process_coef": 1.0}
    return SimpleNamespace(**(usual | {"reward_scale": 1.0, "reward_shift": 0.0} | changes))


def warned(rows, **changes):
    method = changes.get("method")
    objective = OBJECTIVES[method](**changes.get("options", {})) if method else None
    return "\n".join(row_warnings(read_rows(rows), settings(**changes), objective))


WRONG = row(completion="d", reward=0.0)
BY_STEPS = {"method": "rft", "options": {"imitate": "steps"}}


@pytest.mark.parametrize(
    "rows, changes, part",
    [
        ([row(), row(prompt="q")], {}, "every reward is 1.0: nothing to learn"),
        ([row(), row(prompt="q", reward=0.0)], {}, "no prompt has responses with different rewards"),
        ([row(), row(prompt="q", reward=0.0)], {"method": "dpo"}, "no prompt has responses with different rewards"),
        ([row(reward=0.7), row(completion="d")], {}, "no prompt has both a correct and a wrong response"),
        ([row(), row(), WRONG], {"method": "sft"}, "1 of 3 rows repeat another row's prompt and completion"),
        ([row(finish_reason="length"), WRONG], {"method": "rft"}, "50.0% of the responses did not end"),
        ([row(), WRONG, row(prompt="q", reward=0)], {"method": "sft"}, "on the 2 wrong ones of 3 too; --method rft"),
        (
            [row(**STEPS, step_rewards=[0, 0]), WRONG],
            {"process_reward": "additive"},
            "every step reward is 0: --process_reward additive pays nothing",
        ),
        (
            [row(**STEPS, step_rewards=[-1, 0.5]), WRONG],
            {"process_reward": "potential"},
            "1 of 2 step rewards are outside of [0, 1]",
        ),
        (
            [row(reward=100), row(completion="d", reward=-100)],
            {"method": "dqo"},
            "a response is paid up to 100, which with beta 0.1 asks for log(pi/ref) of 1,000 nats, more than a policy can move; "
            "scale the rewards (--reward_scale 0.01) or raise --beta",
        ),
        ([row(reward=100), row(completion="d", reward=101)], {"method": "dro"}, "paid up to 101"),  # V begins at 0
        ([row(), WRONG], {"method": "dqo", "reward_shift": -50.0}, "paid up to 50"),
        ([row(), WRONG], {"method": "oreo", "options": {"beta": 0.001}}, "1,000 nats"),
        (
            [row(**STEPS, step_rewards=[20, 20]), WRONG],
            {"method": "dqo", "process_reward": "additive"},
            "paid up to 41",
        ),
        (
            [row(reward=200), row(completion="d", reward=-100)],
            {"method": "dqo", "normalize_rewards": True, "options": {"beta": 0.001}},
            "a response is paid up to 1, which with beta 0.001 asks for log(pi/ref) of 1,000 nats, more than a policy can move; "
            "raise --beta",
        ),
        ([row(label=False), WRONG | {"label": True}], {}, "count as correct have a mean reward of 0, and the others 1"),
        (
            [row(**STEPS, step_rewards=[1, 0]), WRONG],
            {"process_reward": "additive"},
            "pays every step that is not wrong",
        ),
        ([row(), WRONG], BY_STEPS, "no step is marked as wrong: imitate steps takes whole correct responses"),
        ([row(**STEPS, step_rewards=[0.5, 0.0]), WRONG], BY_STEPS, "step rewards are pass rates: imitate steps takes"),
        (
            [row(**STEPS, step_rewards=[0, 1]), row(**STEPS, prompt="q", reward=0.0, step_rewards=[0, 0])],
            BY_STEPS,
            "turned over?",
        ),
        (
            [
                row(**STEPS, step_rewards=[1, 0]),
                row(**STEPS, step_rewards=[1, 1]),
                row(**STEPS, step_rewards=[1, 0]),
                WRONG,
            ],
            BY_STEPS,
            "equal responses have different first wrong steps, 1 in all: labels are not certain",
        ),
    ],
)
def test_warnings(rows, changes, part):
    assert part in warned(rows, **changes)


def test_data_sets_that_mark_wrong_steps_in_two_ways_are_named(tmp_path):
    for name, labels in (("below", [0, -1]), ("zeros", [1, 0])):
        rows = read_rows([row(**STEPS, prompt=name, step_rewards=labels), row(prompt=name, completion="d", reward=0.0)])
        write_rows(tmp_path / f"{name}.jsonl", rows)
    together = open_data(f"{tmp_path}/below.jsonl,{tmp_path}/zeros.jsonl")
    (warning,) = row_warnings(together, settings(), OBJECTIVES["rft"](imitate="steps"))
    assert "zeros.jsonl marks a wrong step by 0" in warning and "Write -1 and 0" in warning
    assert row_warnings(together, settings(), OBJECTIVES["rft"]()) == []


@pytest.mark.parametrize(
    "rows, changes",
    [
        ([row(), WRONG], {}),
        *(([row(), WRONG], {"method": method}) for method in sorted(set(OBJECTIVES) - {"sft"})),
        ([row(), row(prompt="q")], {"method": "sft"}),
        ([row(), row(prompt="q")], {"method": "rft"}),
        ([row(reward=0.7), row(completion="d")], {"method": "dpo"}),
        ([row(finish_reason="length"), WRONG], {"truncation": "bootstrap"}),
        ([row(reward=100), WRONG], {}),
        ([row(reward=100), WRONG], {"method": "dpo"}),
        ([row(reward=100), WRONG], {"method": "kto"}),
        ([row(reward=100), WRONG], {"method": "dqo", "reward_scale": 0.01}),
        ([row(), WRONG], {"method": "dqo", "options": {"beta": 0.01}}),
        ([row(**STEPS, step_rewards=[20, 20]), WRONG], {"method": "dqo", "process_reward": "none"}),
        ([row(**STEPS, step_rewards=[1, 0]), WRONG], BY_STEPS),
        ([row(**STEPS, step_rewards=[0.5, 0.0]), WRONG], {"method": "rft"}),
        ([row(**STEPS, step_rewards=[0, -1]), WRONG], {"process_reward": "additive"}),
    ],
)
def test_rows_with_nothing_odd_have_no_warning(rows, changes):
    assert warned(rows, **changes) == ""


@pytest.mark.parametrize("method", [name for name, cls in OBJECTIVES.items() if cls.needs_contrast])
def test_nothing_to_learn_is_refused_where_the_method_is_known_to_need_it(method):
    with pytest.raises(UserError, match="nothing to learn"):
        warned([row(), row(prompt="q")], method=method)


@pytest.mark.parametrize("method", [name for name, cls in OBJECTIVES.items() if cls.wants_process_reward is None])
def test_training_and_check_give_the_same_warnings(method, tmp_path, caplog, capsys):
    rows = [row(reward=90.0), row(reward=90.0), row(completion="d", reward=0.0, finish_reason="length")]
    path = tmp_path / "rollouts.jsonl"
    write_rows(path, read_rows(rows))
    with caplog.at_level(logging.WARNING):
        named = [f"--{name}=m" for name in OBJECTIVES[method].reads_models]
        dqo_command(
            ["train", "--method", method, "--dataset_name", str(path), "--model_name_or_path", "m", "--dry_run", *named]
        )
    trained = [record.message for record in caplog.records]
    capsys.readouterr()
    dqo_command(["check", str(path), "--method", method])
    printed = capsys.readouterr().out.splitlines()
    checked = [line.split("warning  ")[1] for line in printed if line.lstrip().startswith("warning  ")]
    assert trained == checked and len(checked) >= 2

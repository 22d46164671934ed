import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dqo import DQOConfig, DQOTrainer
from dqo.config.options import load_options
from dqo.data.control import with_shuffled_rewards
from dqo.data.rows import Row, read_rows
from dqo.errors import UserError
from dqo.train.inputs import load_rows
from tests.dqo.helpers import arguments

ROWS = [
    Row(prompt=f"{i // 4}=", completion="ab" * (i % 3 + 1), reward=float(i), label=i % 2 == 1, steps=[(0, 1)] * (i % 3))
    for i in range(24)
]
STEPS = [
    Row(
        **{"prompt": r.prompt, "completion": r.completion, "reward": r.reward, "label": r.label},
        step_rewards=[r.reward] * n,
    )
    for r in ROWS
    for n in [len(r.steps) + 1]
]


def bundles(rows):
    return Counter((row.reward, row.label) for row in rows)


def rest(rows):
    return [(row.prompt, row.completion) for row in rows]


def test_rewards_and_labels_move_together_between_all_rows():
    found, said = with_shuffled_rewards(ROWS, 1, False)
    assert (
        rest(found) == rest(ROWS)
        and bundles(found) == bundles(ROWS)
        and all(row.label == row.reward % 2 for row in found)
    )
    moved = sum(row.reward != other.reward for row, other in zip(found, ROWS))
    assert (
        moved > 18 and f"CONTROL (shuffle_rewards): {moved} of 24 rows have a reward that is not theirs. What" in said
    )
    assert any(row.prompt != ROWS[int(row.reward)].prompt for row in found)  # across prompts


def test_the_seed_decides():
    assert with_shuffled_rewards(ROWS, 1, False) == with_shuffled_rewards(ROWS, 1, False)
    assert with_shuffled_rewards(ROWS, 1, False)[0] != with_shuffled_rewards(ROWS, 2, False)[0]


def test_step_rewards_that_are_used_move_with_them_between_rows_of_as_many_steps():
    alone = Row(prompt="9=", completion="x", reward=99.0, label=True, step_rewards=[99.0] * 7)
    found, said = with_shuffled_rewards([*STEPS, alone], 1, True)
    assert [len(row.step_rewards) for row in found] == [len(row.step_rewards) for row in [*STEPS, alone]]
    assert all(set(row.step_rewards) == {row.reward} for row in found) and bundles(found) == bundles([*STEPS, alone])
    assert found[-1] == alone and "1 rows keep theirs, as no other has so many steps or turns" in said
    unused, _ = with_shuffled_rewards(STEPS, 1, False)
    assert [row.step_rewards for row in unused] == [row.step_rewards for row in STEPS]


def test_turn_rewards_that_are_used_move_with_them_between_rows_of_as_many_turns():
    turns = [replace(row, step_rewards=None, turn_rewards=row.step_rewards) for row in STEPS]
    found, _ = with_shuffled_rewards([*turns, *STEPS], 1, True)
    assert all(set(row.process_rewards) == {row.reward} for row in found) and bundles(found) == bundles(
        [*turns, *STEPS]
    )
    assert [len(row.turn_rewards or ()) for row in found[:24]] == [len(row.turn_rewards) for row in turns]
    assert all(row.turn_rewards is None for row in found[24:])
    assert [row.turn_rewards for row in found[:24]] != [row.turn_rewards for row in turns]
    unused, _ = with_shuffled_rewards(turns, 1, False)
    assert [row.turn_rewards for row in unused] == [row.turn_rewards for row in turns]


@pytest.mark.parametrize("rows, used", [(ROWS[:1], False), ([STEPS[0], STEPS[1]], True)])
def test_what_would_be_no_control_is_refused(rows, used):
    with pytest.raises(
        UserError, match="shuffle_rewards changes no row's reward: there are too few rows, or no two with"
    ):
        with_shuffled_rewards(rows, 1, used)


def test_rows_that_are_trained_on_change_and_held_out_ones_do_not(files, caplog):
    plain = load_rows(load_options(arguments(files, eval_fraction=0.5)))
    options = load_options([*arguments(files, eval_fraction=0.5), "--shuffle_rewards"])
    train, held_out = load_rows(options)
    assert held_out == plain[1] and rest(train) == rest(plain[0]) and train != plain[0]
    assert bundles(train) == bundles(plain[0]) and "CONTROL (shuffle_rewards): " in caplog.text


@pytest.mark.parametrize("method", [["rft", "--imitate", "steps"], ["dqo", "--nll_on", "steps"], ["rft"]])
def test_marks_of_steps_move_too_where_a_method_goes_by_them(method, tmp_path):
    rows = [
        {
            "prompt": f"{i}=",
            "completion": "ab",
            "reward": float(i % 2),
            "steps": [[0, 1], [1, 2]],
            "step_rewards": [0, -(i % 3)],
        }
        for i in range(12)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--method", *method, "--dataset_name", str(path), "--model_name_or_path", "m", "--output_dir", "out"]
    train, _ = load_rows(
        load_options([*given, "--process_reward", "none", "--eval_fraction", "0", "--shuffle_rewards"])
    )
    stayed = [row.step_rewards for row in train] == [[0, -(i % 3)] for i in range(12)]
    assert stayed == (method == ["rft"])


def gain(files, shuffled):
    """How much more likely a policy made the right one of two responses to the prompts that it has seen, in nats."""
    settings = {
        "method": "dqo",
        "value_model": "none",
        "beta": 0.2,
        "eval_fraction": 0.0,
        "max_steps": 25,
        "max_length": 64,
    }
    settings |= {"learning_rate": 5e-3, "output_dir": str(files / f"out-{shuffled}"), "per_device_train_batch_size": 32}
    args = DQOConfig(shuffle_rewards=shuffled, **settings)
    trainer = DQOTrainer(str(files / "model"), args, str(files / "pairs.jsonl"))
    trainer.train()
    found = trainer.predict(str(files / "pairs.jsonl")).predictions
    ratio = found["logps"] - found["ref_logps"]
    return float(ratio[0::2].mean() - ratio[1::2].mean())


@pytest.mark.slow
def test_a_run_with_shuffled_rewards_loses_its_gain_and_says_what_it_is(files, capsys):
    random = np.random.default_rng(0)
    rows = []
    for prompt in dict.fromkeys(
        f"{random.integers(10)}-{random.integers(10)}-{random.integers(10)}=" for _ in range(150)
    ):
        rows += [
            {"prompt": prompt, "completion": f"#{digit}", "reward": reward}
            for digit, reward in (("1", 1.0), ("2", 0.0))
        ]
    (files / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(read_rows(files / "pairs.jsonl")) > 200
    true, control = gain(files, False), gain(files, True)
    assert true > 1.0 and abs(control) < 0.2 * true
    logged = [json.loads(line) for line in (files / "out-True" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["control/shuffle_rewards"] == 1.0 for row in logged)
    assert "control" not in (files / "out-False" / "metrics.jsonl").read_text()
    assert "with shuffled rewards, a control" in (files / "out-True" / "report.html").read_text()
    assert "shuffle_rewards: true" in (files / "out-True" / "config.yaml").read_text()

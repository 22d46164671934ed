"""Bad data, given to the real commands: each is refused before a model is loaded, with file, line, field and cure.

`dqo check` must refuse what `dqo train` refuses, in the same words: both are asked.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from dqo.commands.base import dqo_command
from dqo.errors import UserError
from dqo.models.new import save
from tests.dqo.helpers import policy, tokenizer
from tests.dqo.row_cases import says

RIGHT = {"prompt": "1+2=", "completion": "1+2=3\n#3", "reward": 1.0}
WRONG = {"prompt": "1+2=", "completion": "#4", "reward": 0.0}
MESSAGES = {
    "prompt": [{"role": "user", "content": "1+2"}],
    "completion": [{"role": "assistant", "content": "3"}],
    "reward": 1.0,
}
SAMPLED = {"prompt_ids": [4, 5], "completion_ids": [6, 7, 2], "logprobs": [-0.1, -0.2, -0.3]}


def lines(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


# name -> (content of the file, parts of the message). Every file begins with two good rows, so the bad one is on line 3.
ROWS = {
    "no JSON": ('{"prompt": "1+1=', "rollouts.jsonl:3: not valid JSON (unterminated string at column 12)"),
    "no object": ("[1]", "rollouts.jsonl:3: is a list; expected an object"),
    "prompts of two kinds": (MESSAGES, "rollouts.jsonl:3: prompt is a list of messages but most rows have a string"),
    "reward null": (RIGHT | {"reward": None}, "rollouts.jsonl:3: reward is null; expected a number, or drop the row"),
    "reward NaN": (RIGHT | {"reward": float("nan")}, "rollouts.jsonl:3: reward is NaN; expected a finite number"),
    "reward infinite": (RIGHT | {"reward": float("inf")}, "rollouts.jsonl:3: reward is Infinity; expected a finite"),
    "reward a string": (RIGHT | {"reward": "1"}, 'rollouts.jsonl:3: reward is "1", a string ... cast it with float()'),
    "reward a bool": (RIGHT | {"reward": True}, "rollouts.jsonl:3: reward is true, a bool ... 1.0, or use the label"),
    "label a number": (RIGHT | {"label": 0.3}, "rollouts.jsonl:3: label is 0.3; labels are true or false. For graded"),
    "empty completion": (RIGHT | {"completion": ""}, "rollouts.jsonl:3: completion is empty or only whitespace"),
    "blank completion": (RIGHT | {"completion": " \n"}, "rollouts.jsonl:3: completion is empty or only whitespace"),
    "step rewards": (
        RIGHT | {"steps": [[0, 6], [6, 7], [7, 8]], "step_rewards": [1.0, 0.0, 0.0, 1.0]},
        "rollouts.jsonl:3: step_rewards has 4 values but steps has 3 spans; expected one for each step",
    ),
    "steps with a gap": (
        RIGHT | {"steps": [[0, 5], [6, 8]], "step_rewards": [1.0, 0.0]},
        "rollouts.jsonl:3: steps[1] begins at 6, expected 5: it leaves a gap",
    ),
    "steps that overlap": (
        RIGHT | {"steps": [[0, 6], [5, 8]], "step_rewards": [1.0, 0.0]},
        "rollouts.jsonl:3: steps[1] begins at 5, expected 6: it overlaps the step before it",
    ),
    "steps that end early": (
        RIGHT | {"steps": [[0, 6]], "step_rewards": [1.0]},
        "rollouts.jsonl:3: steps end at 6 but the completion has 8 characters",
    ),
    "logprobs alone": (RIGHT | {"logprobs": [-1.0]}, "rollouts.jsonl:3: logprobs without completion_ids"),
    "a misspelt column": (
        RIGHT | {"step_reward": [1.0, 0.0]},
        "rollouts.jsonl:3: unknown column 'step_reward' (in 1 of 3 rows). Did you mean 'step_rewards'?",
    ),
}

FILES = {
    "empty": ("", "rollouts.jsonl: is empty; expected one JSON object a line"),
    "no completion": (
        lines({"prompt": "1+1=", "reward": 1.0}),
        "rollouts.jsonl: no row has completion; needs the columns prompt, completion and reward (or label); found prompt, reward",
    ),
    "no reward": (
        lines({"prompt": "1+1=", "completion": "2"}),
        "no row has reward (or label) ... found prompt, completion. This looks like demonstrations",
    ),
    "preferences": (
        lines({"chosen": "1+1=2", "rejected": "1+1=3"}),
        "no row has prompt ... This looks like preference data: run `dqo convert trl-preference`",
    ),
    "PRM800K": (
        lines({"labeler": "a", "question": {}, "label": {}}),
        "This looks like PRM800K: run `dqo convert prm800k` on it",
    ),
    "Math-Shepherd": (lines({"input": "a", "label": "b", "task": "MATH"}), "run `dqo convert math-shepherd` on it"),
    "MATH-APS": (lines({"question": "a", "reasoning_steps": []}), "run `dqo convert math-aps` on it"),
    "open-r1": (lines({"problem": "a", "generations": []}), "run `dqo convert open-r1` on it"),
    "verl": (lines({"prompt": [], "data_source": "x", "reward_model": {}}), "run `dqo convert verl` on it"),
    "logprobs too few": (
        lines(RIGHT | SAMPLED, WRONG | SAMPLED | {"logprobs": [-0.1, -0.2]}),
        "rollouts.jsonl:2: logprobs: 2 logprobs for 3 completion_ids; expected one for each, EOS included",
    ),
    "logprobs above 0": (
        lines(RIGHT | SAMPLED, WRONG | SAMPLED | {"logprobs": [-0.1, 0.2, -0.3]}),
        "rollouts.jsonl:2: logprobs[1] is 0.2; expected log-probabilities, which are never above 0",
    ),
    "logprobs in some rows": (
        lines(RIGHT | SAMPLED, WRONG),
        "rollouts.jsonl:2: logprobs is missing, and other rows have it",
    ),
}

TOKENS = {
    "ids outside the vocabulary": (
        lines(RIGHT, WRONG | {"prompt_ids": [4], "completion_ids": [5, 151643]}),
        "rollouts.jsonl:2: token id 151643 >= vocabulary 19: sampled with a different tokenizer?",
    ),
    "no EOS and logprobs": (
        lines(*[row | SAMPLED | {"completion_ids": [6, 7, 8], "finish_reason": "stop"} for row in (RIGHT, WRONG)]),
        "rollouts.jsonl:1: completion_ids do not end in EOS (2) although finish_reason is not 'length'",
    ),
    "a prompt without room": (lines(RIGHT, WRONG | {"prompt": "1+" * 40}), "prompt has 80 tokens, max_length is 64"),
    "rows too long": (
        lines(RIGHT, WRONG | {"completion": "1+" * 40}),
        "50.0% of rows exceed max_length=64 (p99 = ... first: rollouts.jsonl:2). Raise --max_length, or pass --allow_truncation",
    ),
    "messages without a template": (
        lines(MESSAGES, MESSAGES | {"reward": 0.0}),
        "rollouts.jsonl:1: prompt is a list of messages but the tokenizer has no chat_template; use string prompts",
    ),
    "ids that are not the text's": (
        lines(RIGHT, WRONG | {"prompt_ids": [4], "completion_ids": [9, 9, 2], "step_rewards": [1.0]}),
        "rollouts.jsonl:2: steps are character spans, but completion_ids are the ids of another text",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tokenizer and a config without weights: whoever loads the model fails with another message."""
    folder = tmp_path_factory.mktemp("model")
    save(policy(), tokenizer(), folder)
    (folder / "model.safetensors").unlink()
    return folder


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        dqo_command([str(argument) for argument in arguments])
    return str(caught.value)


def both_refuse(folder, model, content, part, *options, both=True):
    path = folder / "rollouts.jsonl"
    path.write_text(content)
    shared = ("--model_name_or_path", model, "--max_length", 64, *options)
    trained = refusal("train", "--dataset_name", path, "--output_dir", folder / "out", "--eval_fraction", 0, *shared)
    says(trained, part)
    if both:
        says(refusal("check", path, *shared), part)
    assert not (folder / "out" / "config.yaml").exists()


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_refused_by_its_line(name, tmp_path, model):
    row, part = ROWS[name]
    both_refuse(tmp_path, model, lines(RIGHT, WRONG, row), part)


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_with_what_was_found(name, tmp_path, model):
    both_refuse(tmp_path, model, *FILES[name])


@pytest.mark.parametrize("name", TOKENS)
def test_what_does_not_fit_the_tokenizer_is_refused(name, tmp_path, model):
    content, part = TOKENS[name]
    options = ("--process_reward", "additive") if "step_rewards" in content else ()
    both_refuse(tmp_path, model, content, part, *options)


def test_files_that_are_none_are_refused(tmp_path, model):
    (tmp_path / "rollouts.csv").write_text("prompt,completion")
    for source, part in (
        (tmp_path / "rollout.jsonl", "rollout.jsonl: no such file"),
        (tmp_path / "rollouts.csv", "rollouts.csv: unknown kind of file '.csv'; expected .jsonl or .parquet"),
        (tmp_path, "is a folder; expected a .jsonl or .parquet file, or a folder that Dataset.save_to_disk wrote"),
    ):
        says(refusal("check", source), part)
        says(
            refusal("train", "--dataset_name", source, "--model_name_or_path", model, "--output_dir", tmp_path / "o"),
            part,
        )


def test_step_rewards_without_a_choice_are_refused_by_training_and_a_warning_of_check(tmp_path, model, capsys):
    content = lines(RIGHT | {"step_rewards": [1.0, 0.0]}, WRONG)
    part = "rollouts.jsonl has step_rewards; choose what they do: --process_reward additive ... potential ... none"
    both_refuse(tmp_path, model, content, part, both=False)
    dqo_command(["check", str(tmp_path / "rollouts.jsonl")])
    assert "training wants to know what they do" in capsys.readouterr().out
    both_refuse(tmp_path, model, lines(RIGHT, WRONG), "has no step_rewards", "--process_reward", "potential")


@pytest.mark.parametrize("method", ["dqo", "dpo"])
def test_equal_rewards_are_refused_by_training_and_a_warning_of_check(method, tmp_path, model, capsys):
    part = "every reward is 1.0: nothing to learn. Check the grader"
    both_refuse(tmp_path, model, lines(RIGHT, RIGHT | {"prompt": "2+2="}), part, "--method", method, both=False)


def test_without_pairs_dpo_is_refused(tmp_path, model):
    part = "method dpo: no prompt has both a better and a worse response: 0 pairs"
    both_refuse(tmp_path, model, lines(RIGHT, WRONG | {"prompt": "2+2="}), part, "--method", "dpo", both=False)


def test_held_out_prompts_that_are_trained_on_are_refused(tmp_path, model):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(lines(RIGHT, WRONG | {"prompt": "3+3="}))
    part = "1 prompts of ... held_out.jsonl are in ... rollouts.jsonl too (the first: held_out.jsonl:1); take their rows out"
    both_refuse(tmp_path, model, lines(RIGHT, WRONG), part, "--eval_dataset_name", held_out, both=False)


WARNED = {
    "no prompt with both": (
        lines(RIGHT, WRONG | {"prompt": "2+2="}),
        "no prompt has responses with different rewards (2 responses, 2 prompts)",
    ),
    "duplicates": (lines(RIGHT, RIGHT, WRONG), "1 of 3 rows repeat another row's prompt and completion"),
    "unended": (lines(RIGHT | {"finish_reason": "length"}, WRONG), "50.0% of the responses did not end"),
    "large rewards": (lines(RIGHT | {"reward": 30}, WRONG), "asks for log(pi/ref) of 300 nats"),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_allowed_and_odd_is_warned_of(name, tmp_path, model, caplog, capsys):
    content, part = WARNED[name]
    path = tmp_path / "rollouts.jsonl"
    path.write_text(content)
    options = ("--model_name_or_path", str(model), "--eval_fraction", "0", "--dry_run")
    with caplog.at_level(logging.WARNING):
        dqo_command(["train", "--dataset_name", str(path), *options])
    assert part in caplog.text
    capsys.readouterr()
    dqo_command(["check", str(path), "--method", "dqo"])
    assert part in capsys.readouterr().out


def test_a_missing_eos_and_a_missing_pad_token_are_one_line_each(tmp_path, caplog):
    tok = tokenizer()
    tok.pad_token = None
    save(policy(), tok, tmp_path / "model")
    stored = {"prompt_ids": [4, 5], "completion_ids": [6, 7], "finish_reason": "stop"}
    path = tmp_path / "rollouts.jsonl"
    path.write_text(lines(RIGHT | stored, WRONG | stored))
    with caplog.at_level(logging.WARNING):
        dqo_command(["check", str(path), "--model_name_or_path", str(tmp_path / "model")])
    assert caplog.text.count('0 of 2 completions end in EOS (2) although finish_reason is "stop"') == 1
    assert caplog.text.count("has no pad token: EOS pads, and masks come from lengths") == 1


def test_many_offenders_are_listed_to_the_tenth_and_can_be_skipped(tmp_path, model):
    bad = [RIGHT | {"completion": " "}] * 37
    part = "37 of 39 rows do not fit: ... rollouts.jsonl:3: completion is empty ... (the same in 36 more: rollouts.jsonl:4, "
    part += "... --skip_bad_rows goes on"
    both_refuse(tmp_path, model, lines(RIGHT, WRONG, *bad), part)
    dqo_command(["check", str(tmp_path / "rollouts.jsonl"), "--skip_bad_rows"])


@pytest.mark.slow
@pytest.mark.parametrize("command", [("train", "--model_name_or_path", "none", "--dataset_name"), ("check",)])
def test_the_command_exits_with_2_and_no_traceback(command, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text(lines(RIGHT, WRONG | {"reward": "0"}))
    finished = subprocess.run(
        [sys.executable, "-m", "dqo", *command, str(path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: rollouts.jsonl:2: reward is") and "Traceback" not in finished.stderr

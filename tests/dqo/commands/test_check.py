"""`dqo check`: what it prints, what it warns of, and what it refuses as training does."""

import dataclasses
import json
import subprocess
import sys

import pytest

from dqo.commands.base import dqo_command
from dqo.commands.check import CheckConfig, check, histogram, summary
from dqo.config.options import TrainConfig, load_options
from dqo.data.rows import read_rows
from dqo.errors import UserError
from dqo.models.new import new_llama, save
from dqo.train.inputs import Given
from dqo.train.weighting import chosen, reference_name
from tests.dqo.helpers import policy, tokenizer

STEPPED = {"steps": [[0, 6], [6, 8]], "step_rewards": [0.25, 0.5]}
ROWS = [
    {"prompt": "1+2=", "completion": "1+2=3\n#3", "reward": 1.0, "answer": "3"} | STEPPED,
    {"prompt": "1+2=", "completion": "1+2=4\n#4", "reward": 0.0, "finish_reason": "length"} | STEPPED,
    {"prompt": "2+2=", "completion": "2+2=4\n#4", "reward": 1.0, "finish_reason": "stop"} | STEPPED,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save(policy(), tokenizer(), folder)
    return str(folder)


def written(folder, rows, name="rollouts.jsonl"):
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


def printed(capsys, *arguments):
    dqo_command(["check", *map(str, arguments)])
    return capsys.readouterr().out


def test_the_summary_of_rows():
    found = summary(read_rows(ROWS))
    assert found == {
        "rows": "3 of 2 prompts",
        "correct": "66.7% (2)",
        "rewards": "0 x 1, 1 x 2",
        "mixed prompts": "1 of 2 have responses with different rewards",
        "finish_reason": "not given 1, length 1, stop 1",
        "duplicates": "0",
        "steps": "2 a row, in 3 rows",
        "step rewards": "0.25 x 3, 0.5 x 3; mean 0.375",
        "wrong steps": "marked by a reward of 0, in 0 rows",
        "other fields": "answer 1",
    }
    many = [{"prompt": "p", "completion": str(i), "reward": i / 10} for i in range(11)]
    assert summary(read_rows(many))["rewards"] == "11 values, 0 to 1 (median 0.5)"


def test_no_class_of_models_is_imported(tmp_path, model):
    """They take seconds and 150 MB."""
    code = "import sys; from dqo.commands.base import dqo_command; dqo_command(sys.argv[1:]); "
    code += "assert 'transformers.modeling_utils' not in sys.modules"
    arguments = ["check", written(tmp_path, ROWS), "--model_name_or_path", model, "--process_reward", "none"]
    subprocess.run([sys.executable, "-c", code, *arguments, "--method", "dqo"], check=True, capture_output=True)


def test_the_importance_weights_are_those_of_training(tmp_path, model, capsys):
    def line(rows, *arguments):
        lines = printed(capsys, written(tmp_path, rows), "--process_reward", "none", *arguments).splitlines()
        return next((line for line in lines if line.startswith("importance weights: ")), None)

    config = load_options(["--dataset_name", "x", "--model_name_or_path", model])
    for sampling in (
        {"model": model, "temperature": 1.0},
        {"model": model, "temperature": 0.5},
        {"model": "other"},
        None,
    ):
        rows = [row | {"sampling": sampling} for row in ROWS]
        training = chosen(config, read_rows(written(tmp_path, rows)), reference_name(config, Given())).line
        assert line(rows, "--model_name_or_path", model) == training
        assert line(rows) is None and line(rows, "--model_name_or_path", model, "--method", "dpo") is None
    stored = [row | {"completion_ids": [3, 4], "logprobs": [-0.5, -0.5]} for row in ROWS]
    assert line(stored).startswith("importance weights: trajectory (is_level auto), because every row has the logprobs")


def test_turns_and_the_tokens_of_the_environment_are_counted(tmp_path, model, capsys):
    turns = {"prompt": "1+2=", "completion": "1+2=3", "turn_spans": [[0, 1], [4, 5]], "turn_rewards": [0.0, 0.5]}
    rows = [turns | {"reward": 1.0}, {"prompt": "1+2=", "completion": "4", "reward": 0.0}]
    found = summary(read_rows(rows))
    assert found["turns"] == "1 to 2 (median 1.5) a row, in 1 rows several"
    assert found["turn rewards"] == "0 x 1, 0.5 x 1; mean 0.25"
    shown = printed(capsys, written(tmp_path, rows), "--model_name_or_path", model, "--process_reward", "additive")
    assert "environment  3 of 8 tokens of responses are no actions" in shown
    assert "1║⟦+2=⟧3│<eos>{+1.5}║" in shown
    shown = printed(capsys, written(tmp_path, rows))
    assert "warning  there are step_rewards or turn_rewards: training wants to know what they do" in shown


def row(**changes):
    return {"prompt": "p", "completion": "c", "reward": 1.0} | changes


def test_a_method_brings_its_warnings(tmp_path, capsys):
    path = written(tmp_path, [row(reward=100.0), row(completion="d", reward=-100.0)])
    assert "nats" not in printed(capsys, path)
    assert "with beta 0.1 asks for log(pi/ref) of 1,000 nats" in printed(capsys, path, "--method", "dqo")
    assert "nats" not in printed(capsys, path, "--method", "dqo", "--beta", 1)
    assert "nats" not in printed(capsys, path, "--method", "dqo", "--reward_scale", 0.01)
    assert "on the 1 wrong ones of 2 too" in printed(capsys, path, "--method", "sft")
    with pytest.raises(UserError, match="every reward is 1.0: nothing to learn"):
        printed(capsys, written(tmp_path, [row(), row(prompt="q")]), "--method", "dpo")


@pytest.mark.parametrize(
    "options, said",
    [
        (("--beta", 0.1), "--beta is an option of a method; give --method too"),
        (("--method", "sft", "--beta", 0.1), "method sft has no beta; remove --beta"),
        (("--method", "dqo", "--beta", 0), "beta must be positive, got 0"),
    ],
)
def test_a_beta_that_does_not_fit_is_refused(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        dqo_command(["check", written(tmp_path, ROWS), *map(str, options)])


def test_without_a_model_neither_torch_nor_transformers_is_imported(tmp_path):
    path = written(tmp_path, ROWS)
    code = (
        "import sys; from dqo.commands.base import dqo_command; dqo_command(sys.argv[1:]); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code, "check", path], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "3 of 2 prompts" in finished.stdout and "--process_reward additive" in finished.stdout


def test_with_a_model_rows_are_shown_as_they_are_paid(tmp_path, model, capsys):
    path = written(tmp_path, ROWS)
    options = ("--model_name_or_path", model, "--process_reward", "additive", "--process_coef", 2, "--reward_scale", 3)
    out = printed(capsys, path, *options, "--reward_shift", -1)
    assert out.count("[response]") == 3
    assert "1│+│2│=│3│\\n{+0.5}║\n#│3{+1}║" in out and "{+2}" in out  # 3 * 1 - 1 on EOS
    assert "12 to 13 (median 13)" in out
    assert "\x1b[" not in out


def test_potentials_are_shown_with_their_discount(tmp_path, model, capsys):
    options = ("--model_name_or_path", model, "--process_reward", "potential", "--gamma", 0.5, "--rows", 1)
    out = printed(capsys, written(tmp_path, ROWS), *options)
    assert out.count("[response]") == 1
    assert "\\n{+0.125}║\n#{-0.125}│3║" in out  # 0.5 * 0.5 - 0.25 = 0 is not shown


def test_truncation_changes_what_is_paid_and_kept(tmp_path, model, capsys):
    path = written(tmp_path, ROWS)
    options = (path, "--model_name_or_path", model, "--process_reward", "none")
    assert "bootstrapped" in printed(capsys, *options, "--truncation", "bootstrap")
    assert printed(capsys, *options, "--truncation", "drop").count("[response]") == 2


def test_long_rows_are_counted_and_then_refused_or_cut(tmp_path, model, capsys):
    path = written(tmp_path, ROWS)
    options = (path, "--model_name_or_path", model, "--process_reward", "none", "--max_length", 12)
    with pytest.raises(UserError, match=r"66.7% of rows exceed max_length=12 .*Raise --max_length, or pass"):
        dqo_command(["check", *map(str, options)])
    out = capsys.readouterr().out
    assert "66.7% (2) have more than 12" in out
    assert "4 + 8 tokens, does not end" in printed(capsys, *options, "--allow_truncation")


def test_process_reward_is_asked_for_and_refused_without_steps(tmp_path, model, capsys):
    assert "training wants to know what they do" in printed(capsys, written(tmp_path, ROWS))
    plain = written(tmp_path, [row(), row(reward=0.0, completion="d")], "plain.jsonl")
    with pytest.raises(UserError, match="plain.jsonl has no step_rewards"):
        dqo_command(["check", plain, "--process_reward", "additive"])


def test_reward_threshold_and_skip_bad_rows(tmp_path, capsys):
    rows = [row(reward=0.4), row(reward=0.2, completion="d"), row(reward="1")]
    path = written(tmp_path, rows)
    with pytest.raises(UserError, match=r'rollouts.jsonl:3: reward is "1", a string'):
        dqo_command(["check", path])
    assert "0.0% (0)" in printed(capsys, path, "--skip_bad_rows")
    assert "50.0% (1)" in printed(capsys, path, "--skip_bad_rows", "--reward_threshold", 0.3)


def test_files_that_share_prompts_are_named(tmp_path, capsys):
    one, two = written(tmp_path, ROWS, "one.jsonl"), written(tmp_path, ROWS[2:], "two.jsonl")
    out = printed(capsys, one, two)
    assert f"1 prompts are in {one} too" in out
    with pytest.raises(UserError, match="no file to check"):
        dqo_command(["check"])


def test_stored_ids_without_eos_and_strings_for_a_chat_model_are_warned_of(tmp_path, capsys, caplog):
    chat = tokenizer()
    chat.chat_template = "{{ messages[0].content }}"
    save(policy(), chat, tmp_path / "chat")
    stored = {"prompt_ids": [4, 5], "completion_ids": [6, 7], "finish_reason": "stop"}
    path = written(
        tmp_path, [row(prompt="1", completion="2") | stored, row(prompt="1", completion="3", reward=0.0) | stored]
    )
    out = printed(capsys, path, "--model_name_or_path", tmp_path / "chat")
    assert '0 of 2 completions end in EOS (2) although finish_reason is "stop"' in caplog.text
    assert "has a chat template, and the prompts are strings" in out


def test_colours_are_for_terminals_that_want_them(tmp_path, model, capsys, monkeypatch):
    config = CheckConfig((written(tmp_path, ROWS),), model_name_or_path=model, process_reward="none")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    check(config)
    assert "\x1b[" not in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    check(config)
    assert "\x1b[" in capsys.readouterr().out


def test_the_histogram_counts_every_row_once():
    lines = histogram([1, 2, 9, 10, 10, 100]).splitlines()
    assert len(lines) == 10
    assert lines[0].split() == ["1-10", "#" * 40, "5"] and lines[-1].split() == ["91-100", "#" * 8, "1"]
    assert histogram([7]).splitlines()[-1].split() == ["7-7", "#" * 40, "1"]


def test_options_are_those_of_training():
    ours = {f.name: (f.type, f.default) for f in dataclasses.fields(CheckConfig)}
    theirs = {f.name: (f.type, f.default) for f in dataclasses.fields(TrainConfig)}
    theirs["method"] = "str | None", None  # here it may be left out, and has a help text of its own
    assert {name: ours[name] for name in ours.keys() & theirs.keys()} == {
        name: theirs[name] for name in ours.keys() & theirs.keys()
    }
    assert ours.keys() - theirs.keys() == {"data", "rows", "gamma", "discount", "beta"}


def test_the_end_that_is_trained_and_the_others_are_named(tmp_path, capsys):
    chat = tokenizer()
    chat.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    chat.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    model = new_llama(chat, hidden_size=16, layers=1, heads=2, max_length=64)
    model.generation_config.eos_token_id, model.generation_config._from_model_config = [1, 2], False
    save(model, chat, tmp_path / "chat")
    messages = [
        {"prompt": [{"role": "user", "content": "1"}], "completion": [{"role": "assistant", "content": text}]}
        for text in "23"
    ]
    path = written(tmp_path, [messages[0] | {"reward": 1.0}, messages[1] | {"reward": 0.0}])
    out = printed(capsys, path, "--model_name_or_path", tmp_path / "chat")
    assert "end  <|im_end|> (19) is trained; <bos> (1), <eos> (2) ends a response too\n" in out
    path = written(tmp_path, [row(prompt="1", completion="2"), row(prompt="1", completion="3", reward=0.0)])
    out = printed(capsys, path, "--model_name_or_path", tmp_path / "chat")
    assert "end  <eos> (2) is trained; <bos> (1), <|im_end|> (19) ends a response too\n" in out


LACKING = [
    ("dqo", "trained on  3 responses, as the defaults of dqo are"),
    ("curry_dpo", "trained on  1 pairs, as the defaults of curry_dpo are"),
    ("rank_dpo", "trained on  1 lists, as the defaults of rank_dpo are"),
    ("ppo", "warning  method ppo, as its defaults are: ppo reads the log-probabilities"),
    ("rto", "warning  method rto reads another model: training wants --dpo_model"),
    ("xpo", "warning  method xpo, as its defaults are: xpo finds no sample of the reference in 1 pairs"),
    (
        "dapo",
        "warning  method dapo reads step rewards in the sense of --process_reward potential: training wants it given",
    ),
]


@pytest.mark.parametrize("method, line", LACKING)
def test_a_method_tells_what_it_finds_or_lacks(method, line, model, tmp_path, capsys):
    out = printed(capsys, written(tmp_path, ROWS), "--model_name_or_path", model, "--method", method, "--rows", 0)
    assert line in out


def test_a_method_without_anything_to_train_on_says_so(model, tmp_path, capsys):
    rows = [row | {"reward": 1.0, "prompt": f"{i}+2="} for i, row in enumerate(ROWS)]
    rows[0]["reward"] = 0.0
    out = printed(capsys, written(tmp_path, rows), "--model_name_or_path", model, "--method", "rebel", "--rows", 0)
    assert "warning  method rebel: no prompt has two responses: 0 pairs. There are 3 responses" in out


def test_several_data_sets_are_told_with_rows_tokens_and_shares(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, ROWS[:2], "a.jsonl")
    written(tmp_path, ROWS[2:], "b.jsonl")
    options = ["--process_reward", "additive"]
    out = printed(capsys, "a.jsonl:0.75,b.jsonl:0.25", *options)
    assert "3 of 2 prompts" in out
    assert "data sets:\n             a.jsonl  75.0% of a run; 2 rows, each read 1.12 times an epoch\n" in out
    assert "             b.jsonl  25.0% of a run; 1 rows, each read 0.75 times an epoch\n" in out
    out = printed(capsys, "a.jsonl,b.jsonl", *options, "--model_name_or_path", model)
    tokens = len("1+2=1+2=3\n#3") + 1  # a token for each character, and EOS
    assert f"a.jsonl  66.7% of a run; 2 rows with {2 * tokens - 1} tokens\n" in out  # the second did not end
    assert f"b.jsonl  33.3% of a run; 1 rows with {tokens} tokens\n" in out
    assert "data sets:" not in printed(capsys, "a.jsonl", *options)


def test_shares_of_data_sets_are_told_of_what_a_method_trains_on(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": p, "completion": "x", "reward": r} for p, r in (("1", 1.0), ("1", 0.0), ("2", 1.0), ("2", 0.0))]
    written(tmp_path, rows, "a.jsonl")
    written(tmp_path, [row | {"prompt": "3"} for row in rows[:2]], "b.jsonl")
    written(tmp_path, [row | {"prompt": "4"} for row in rows[::2]], "c.jsonl")
    options = ["--model_name_or_path", model, "--method", "dpo", "--rows", 0]
    out = printed(capsys, "a.jsonl:0.6,b.jsonl:0.4", *options)
    assert "  40.0% of a run from b.jsonl: 1 of 3 pairs, each read 1.2 times an epoch\n" in out
    out = printed(capsys, "a.jsonl:0.6,c.jsonl:0.4", *options)
    assert "warning  method dpo, as its defaults are: c.jsonl has the weight 0.4, and the method finds nothing" in out

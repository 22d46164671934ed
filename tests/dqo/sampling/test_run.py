"""`dqo sample`: what it writes, that it goes on after any end, and what it refuses before any work."""

import pytest
import torch

from dqo import api
from dqo.commands.sample import sample_command
from dqo.data.rows import read_rows
from dqo.errors import UserError
from dqo.models.new import save
from dqo.models.policy import load_policy
from dqo.sampling import backends
from dqo.sampling.run import sample_rows
from tests.dqo.helpers import policy, tokenizer
from tests.dqo.sampling.runs import PROMPTS, TEMPLATE, options, rows_of, same_rows, write


def test_rows_hold_all_of_a_response_and_training_wants_nothing_but_a_reward(model, tmp_path):
    found = sample_rows(options(model, tmp_path), quiet=True)
    path, made = tmp_path / "rollouts.jsonl", tokenizer()
    assert (found.rows, found.new, found.prompts) == (18, 18, 6)
    rows = rows_of(path)
    assert found.tokens == sum(len(row["completion_ids"]) for row in rows)
    for row in rows:
        assert row["prompt_ids"] == made(row["prompt"])["input_ids"] and row["answer"] in (
            "5",
            "6",
            "7",
            "27",
            "28",
            "29",
        )
        ended = row["completion_ids"][-1] == 2
        assert row["finish_reason"] == ("stop" if ended else "length") and (ended or len(row["completion_ids"]) == 8)
        assert row["completion"] == made.decode(row["completion_ids"][: -1 if ended else None])
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        logits = policy()(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(row["completion_ids"])[:, None])[:, 0]
        assert row["logprobs"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["sampling"]["model"] == str(model) and row["sampling"]["temperature"] == 1.0
    with pytest.raises(UserError, match="nobody has graded: score them with `dqo score`"):
        read_rows(path)
    assert len(read_rows([{**row, "reward": 1.0} for row in rows])) == 18


@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_batch_size_changes_no_row(model, tmp_path, size):
    sample_rows(options(model, tmp_path), quiet=True)
    sample_rows(options(model, tmp_path, batch_size=size, output_file=str(tmp_path / "other.jsonl")), quiet=True)
    same_rows(tmp_path / "rollouts.jsonl", tmp_path / "other.jsonl")


def test_equal_prompts_get_responses_of_their_own_and_a_prompt_the_same_ones_in_any_file(model, tmp_path):
    sample_rows(options(model, tmp_path, rows=[PROMPTS[0], PROMPTS[1], PROMPTS[0]]), quiet=True)
    texts = [row["completion"] for row in rows_of(tmp_path / "rollouts.jsonl") if row["prompt"] == "1+4="]
    assert len(set(texts)) == 6
    other = options(model, tmp_path, rows=[PROMPTS[5], PROMPTS[0]], output_file=str(tmp_path / "other.jsonl"))
    sample_rows(other, quiet=True)
    again = {row["completion"] for row in rows_of(tmp_path / "other.jsonl") if row["prompt"] == "1+4="}
    assert again < set(texts) and len(again) == 3


def test_prompts_with_no_room_for_a_response_are_refused_before_the_model_is_loaded(tmp_path, model, monkeypatch):
    monkeypatch.setattr(backends, "load_policy", lambda *_: pytest.fail("loaded"))
    long = {"prompt": "1" * 64}
    with pytest.raises(
        UserError, match=r"prompts.jsonl:7: 64 tokens of prompt and 8 of the response .* has 64 positions.*; drop"
    ):
        sample_rows(options(model, tmp_path, rows=[*PROMPTS, long]), quiet=True)
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_a_model_that_never_stops_is_cut_and_named(model, tmp_path, caplog):
    save(policy(), tokenizer(), tmp_path / "model")
    endless = load_policy(str(tmp_path / "model"))
    head = torch.nn.Linear(16, 19)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[2] = -1e9
    endless.lm_head = head

    class Endless(backends.TransformersBackend):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.policy = endless

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "TransformersBackend", Endless)
        found = sample_rows(options(model, tmp_path), quiet=True)
    assert found.not_ended == found.rows == 18
    assert all(
        row["finish_reason"] == "length" and len(row["completion_ids"]) == 8
        for row in rows_of(tmp_path / "rollouts.jsonl")
    )
    assert (
        "18 of 18 responses (100%) did not end within max_completion_length 8" in caplog.text and "<eos>" in caplog.text
    )


def test_messages_go_through_the_template_with_the_tools_and_kwargs_of_each_prompt(tmp_path):
    made = tokenizer()
    made.chat_template = TEMPLATE
    save(policy(), made, tmp_path / "model")
    message = [{"role": "user", "content": "1+2"}]
    rows = [{"prompt": message, "tools": [{"name": "f"}]}, {"prompt": message, "chat_template_kwargs": {"plain": True}}]
    sample_rows(options(tmp_path / "model", tmp_path, rows=rows, num_generations=1), quiet=True)
    found = {made.decode(row["prompt_ids"]): row for row in rows_of(tmp_path / "rollouts.jsonl")}
    assert set(found) == {"1+21+", "1+2="}
    assert found["1+21+"]["tools"] == [{"name": "f"}] and found["1+2="]["chat_template_kwargs"] == {"plain": True}
    for row in found.values():
        (message,) = row["completion"]
        assert message["role"] == "assistant" and isinstance(message["content"], str)
    assert len(read_rows([{**row, "reward": 1.0} for row in found.values()])) == 2


def test_a_template_that_reads_the_clock_is_told_the_same_time_when_a_file_goes_on(tmp_path, monkeypatch):
    made = tokenizer()
    made.chat_template = "{{ strftime_now('%f') }}{% for m in messages %}{{ m.content }}{% endfor %}="
    save(policy(), made, tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": f"{i}"}]} for i in range(3)]
    sample_rows(options(tmp_path / "model", tmp_path, rows=rows), quiet=True)
    path = tmp_path / "rollouts.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert sample_rows(options(tmp_path / "model", tmp_path, rows=rows), quiet=True).new > 0
    assert len({tuple(row["prompt_ids"][:6]) for row in rows_of(path)}) == 1


def test_a_greedy_response_was_not_drawn_and_has_no_logprobs(model, tmp_path):
    sample_rows(options(model, tmp_path, temperature=0.0, num_generations=1), quiet=True)
    for row in rows_of(tmp_path / "rollouts.jsonl"):
        ids = list(row["prompt_ids"])
        for token in row["completion_ids"]:
            assert token == policy()(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)
        assert "logprobs" not in row


def test_a_prefix_may_have_its_text_and_its_ids(model, tmp_path):
    ids = tokenizer()("12", add_special_tokens=False)["input_ids"]
    rows = [{"prompt": "1+2=", "prefix": "12", "prefix_ids": ids}]
    sample_rows(options(model, tmp_path, prompts=None, prefixes=write(tmp_path / "p.jsonl", rows)), quiet=True)
    for row in rows_of(tmp_path / "rollouts.jsonl"):
        assert row["completion"].startswith("12") and row["completion_ids"][: len(ids)] == ids


def test_prefixes_are_continued(model, tmp_path):
    rows = [
        {"prompt": "1+2=", "prefix": "12"},
        {"prompt": "1+2=", "prefix_ids": [4, 5]},
        {"prompt": "1+2=", "prefix": "345"},
    ]
    given = options(model, tmp_path, prompts=None, prefixes=write(tmp_path / "prefixes.jsonl", rows))
    assert sample_rows(given, quiet=True).rows == 9
    made, found = tokenizer(), rows_of(tmp_path / "rollouts.jsonl")
    assert sorted({row["completion"][:2] for row in found}) == ["12", "34"]
    for row in found:
        count = row["sampling"]["prefix_tokens"]
        assert row["completion_ids"][:count] == made(row["completion"])["input_ids"][:count] and "logprobs" not in row
        assert count < len(row["completion_ids"]) <= count + 8
    assert len({row["completion"] for row in found}) == 9  # equal prefixes have streams of their own
    assert len(read_rows([{**row, "reward": 1.0} for row in found])) == 9


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "1="},
            "prefixes.jsonl:1: has no prefix and no prefix_ids, the beginning of a response; found prompt",
        ),
        (
            {"prompt": "1=", "prefix": ""},
            'prefixes.jsonl:1: prefix is ""; expected the text that a response begins with',
        ),
        (
            {"prompt": "1=", "prefix_ids": [4, 2]},
            "prefixes.jsonl:1: the prefix has the end token 2; it cannot be continued",
        ),
        (
            {"prompt": "1=", "prefix": "12", "prefix_ids": [4, 6]},
            'prefixes.jsonl:1: prefix is "12", and prefix_ids are the ids of ".*"; drop one of them',
        ),
        (
            {"prompt": "1=", "prefix_ids": [400]},
            "prefixes.jsonl:1: prefix_ids has 400, which is no token of the tokenizer",
        ),
    ],
)
def test_prefixes_that_do_not_fit_are_named(model, tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        sample_rows(
            options(model, tmp_path, prompts=None, prefixes=write(tmp_path / "prefixes.jsonl", [row])), quiet=True
        )


def test_the_policy_of_a_checkpoint_is_taken_and_a_run_without_a_model_names_one(model, tmp_path):
    run = tmp_path / "run"
    for step in (3, 12):
        save(policy(), tokenizer(), run / f"checkpoint-{step}")
    with pytest.raises(
        UserError, match="run: the run has not ended, and has no model yet; name one of its .*checkpoint-12"
    ):
        sample_rows(options(run, tmp_path), quiet=True)
    sample_rows(options(run / "checkpoint-12", tmp_path), quiet=True)
    sample_rows(options(model, tmp_path, output_file=str(tmp_path / "other.jsonl")), quiet=True)
    one, other = (
        sorted(row["completion"] for row in rows_of(tmp_path / f"{name}.jsonl")) for name in ("rollouts", "other")
    )
    assert one == other


def test_the_command_says_what_it_wrote_and_what_comes_next(model, tmp_path, capsys):
    config = options(model, tmp_path)
    names = ("model_name_or_path", "prompts", "output_file", "max_completion_length")
    sample_command([part for name in names for part in (f"--{name}", str(getattr(config, name)))])
    out = capsys.readouterr().out
    assert "48 (48 of them new) of 6 prompts" in out and "tokens/s" in out
    assert f"Next: dqo score {config.output_file}" in out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_name_or_path": None}, "model_name_or_path is missing: a model's directory or hub name"),
        ({"prompts": None}, "prompts is missing: a file with a prompt a line"),
        ({"prefixes": "a.jsonl"}, "prefixes stands in the place of prompts; give one of them"),
        ({"output_file": None}, "output_file is missing"),
        ({"output_file": "rows.parquet"}, "rows.parquet: rows are written as JSON Lines; name the file .jsonl"),
        ({"num_generations": 0}, "num_generations must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": 1e-42}, "temperature must be 0 or at least 1e-06, got 1e-42"),
        ({"temperature": 0.0}, "num_generations must be 1 at temperature 0, .*; got 3"),
        (
            {"temperature": 0.0, "num_generations": 1, "top_p": 0.9},
            "top_p has no effect at temperature 0; leave it out",
        ),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is an option of the backend vllm"),
        ({"backend": "vllm", "use_cpu": True}, "use_cpu is an option of the backend transformers; leave it out"),
        ({"backend": "sglang"}, r"backend must be Literal\['transformers', 'vllm'\], got 'sglang'"),
        ({"temprature": 0.5}, "unknown option 'temprature'. Did you mean 'temperature'"),
        ({"temperature": float("nan")}, "temperature must be a finite float32 number, got nan"),
        ({"prompts": "none.jsonl"}, "none.jsonl: no such file"),
        ({"model_name_or_path": "/nowhere"}, "'/nowhere' has no model config"),
    ],
)
def test_options_that_do_not_fit_are_refused_and_nothing_is_written(model, tmp_path, change, message):
    given = vars(options(model, tmp_path)) | change
    with pytest.raises(UserError, match=message):
        api.sample(quiet=True, **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"]


@pytest.mark.parametrize("rows", [[{"prompt": "1+2="}, {"prompt": "1<new>"}], [{"prompt": "1", "prefix": "<new>"}]])
def test_a_token_that_the_model_does_not_have_is_refused(tmp_path, rows):
    larger = tokenizer()
    larger.add_tokens(["<new>"])
    path = tmp_path / "model"
    save(policy(), larger, path)
    line, more = len(rows), {"prompts": None, "prefixes": write(tmp_path / "prompts.jsonl", rows)}
    with pytest.raises(
        UserError, match=f"prompts.jsonl:{line}: the tokenizer writes it with token 19, and the model has 19"
    ):
        sample_rows(options(path, tmp_path, rows, **(more if "prefix" in rows[0] else {})), quiet=True)
    assert not (tmp_path / "rollouts.jsonl").exists()

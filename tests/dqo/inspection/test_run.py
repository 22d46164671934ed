"""What an inspection finds out against the run's own scores; which rows and runs it takes, and which it refuses."""

import os

import numpy as np
import pytest

from dqo.credit.implied import CRITIC, OTHERS
from dqo.data.rows import read_rows
from dqo.data.stored import open_rows
from dqo.errors import UserError
from dqo.inspection.run import _row_cache, inspect
from dqo.models.new import character_tokenizer, save
from dqo.train.run_rows import episodes_of
from dqo.train.token_scores import load_run, token_scores
from tests.dqo.data.test_tokens import CHAT, IM_END, answer, user
from tests.dqo.helpers import gpt2, policy
from tests.dqo.inspection.stored import make_run, rows_with_steps, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    make_run(folder)
    write_rows(folder / "rows.jsonl", rows_with_steps())
    return folder


def test_each_response_has_the_scores_of_the_run_and_the_value_that_the_others_imply(place):
    found = inspect(place / "out", place / "rows.jsonl", rows=["1-3"])
    assert [r.source for r in found.responses] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    models = load_run(place / "out")
    episodes = episodes_of(models, read_rows(rows_with_steps()[:3]))
    names = ["logprobs", "ref_logprobs", "lse", "ref_lse", "kl", "values"]
    scores = token_scores(models, episodes, names)
    gains = [0.1 * (s["logprobs"] - s["ref_logprobs"]) for s in scores]
    returns = [e.reward - gain.sum() for e, gain in zip(episodes, gains)]
    for i, (response, gain, s) in enumerate(zip(found.responses, gains, scores)):
        np.testing.assert_allclose(response.scores["advantage"], gain, atol=1e-6)
        np.testing.assert_allclose(response.scores["soft_value"], 0.1 * (s["lse"] - s["ref_lse"]), atol=1e-6)
        np.testing.assert_allclose(response.scores["value"], s["values"], atol=1e-6)
        np.testing.assert_allclose(response.step_sums, [gain[:6].sum(), gain[6:].sum()], atol=1e-6)
        start = np.mean([x for j, x in enumerate(returns) if j != i])
        assert response.start.origin == OTHERS and response.start.responses == 2
        assert response.implied.values[0] == pytest.approx(start, abs=1e-6)
        assert response.implied.remainder == pytest.approx(start - returns[i], abs=1e-6)
        assert "".join(response.texts) == "1+2=3\n#6</s>"[:8] + response.texts[-1]
    assert [r.first_wrong_step for r in found.responses] == [None, 1, 0]
    assert set(found.scales) == {"advantage", "soft_value", "value", "kl"} and found.notes == []


def test_a_discount_and_the_pay_of_the_run_are_in_the_implied_value(place, tmp_path):
    make_run(tmp_path, gamma=0.9, process_reward="additive", process_coef=0.5, critic=False)
    (response,) = inspect(tmp_path / "out", place / "rows.jsonl", rows=["2"]).responses
    gain, values = response.scores["advantage"], response.implied.values
    assert response.rewards.tolist() == [0] * 7 + [-0.5, 0]
    np.testing.assert_allclose(0.9 * values[1:], values[:-1] + gain - response.rewards, atol=1e-6)
    make_run(tmp_path, gamma=0.0)
    (response,) = inspect(tmp_path / "out", place / "rows.jsonl", rows=["2"]).responses
    assert response.implied is None


def test_what_a_run_or_its_rows_lack_is_said_and_the_rest_is_shown(place, tmp_path):
    make_run(tmp_path, critic=False, method="rft", beta=None)
    plain = [{k: row[k] for k in ("prompt", "completion", "reward")} for row in rows_with_steps()]
    found = inspect(tmp_path / "out", plain, rows=[1])
    assert found.scales.keys() == {"advantage", "soft_value", "kl"} and found.beta == 1.0
    assert found.notes == [
        "Method rft has no beta: the advantage is log(pi/ref), with a factor of 1.",
        "The run has no value model.",
        "There are no sums of steps where the rows have no steps: dqo score --steps lines writes them.",
    ]
    alone = inspect(place / "out", write_rows(tmp_path / "alone.jsonl", plain[:1]))
    assert alone.responses[0].start.origin == CRITIC
    assert alone.responses[0].implied.values[0] == pytest.approx(alone.responses[0].scores["value"][0])
    make_run(tmp_path, method="dpo")
    assert "on no scale of rewards" in inspect(tmp_path / "out", place / "rows.jsonl", responses=1).notes[0]


def test_messages_turns_of_an_environment_and_stored_ids_are_shown_token_by_token(tmp_path):
    make_run(tmp_path, CHAT)
    tool = {"role": "tool", "content": "so four"}
    rows = [{"prompt": user("two plus two"), "completion": [*answer("ask"), tool, *answer("four")], "reward": 1.0}]
    (response,) = inspect(tmp_path / "out", rows).responses
    own = "".join(response.texts[i] for i in response.actions)
    assert own == "ask<|im_end|>four<|im_end|>" and "so four" in "".join(response.texts)
    assert response.action_of_text.count(None) == len(response.texts) - len(response.actions) > 0
    assert "two plus two" in response.prompt
    ids = CHAT("four")["input_ids"]
    stored = {"prompt": user("two"), "completion": answer("four"), "reward": 0.0}
    stored |= {"prompt_ids": CHAT("two")["input_ids"], "completion_ids": [*ids, IM_END]}
    (response,) = inspect(tmp_path / "out", [stored]).responses
    assert "".join(response.texts) == "four<|im_end|>" and response.prompt == "two"


def test_bad_input_is_one_line_with_its_cure(place, tmp_path):
    def refused(part, run=place / "out", rows=place / "rows.jsonl", **options):
        with pytest.raises(UserError) as caught:
            inspect(run, rows, **options)
        assert part in str(caught.value) and "\n" not in str(caught.value)

    (tmp_path / "empty.jsonl").write_text("")
    refused("is empty", rows=tmp_path / "empty.jsonl")
    refused("there is no such directory; name a run's output_dir", run=tmp_path / "none")
    refused(
        "no config.yaml of a training run that names its reference; give --ref_model_name_or_path", run=place / "base"
    )
    save(policy(), character_tokenizer("9876543210+-*=#\n"), tmp_path / "other")
    refused("has another tokenizer: token", ref_model_name_or_path=str(tmp_path / "other"))
    refused("responses must be at least 1, got 0", responses=0)
    (tmp_path / "page.html").write_text("mine")
    refused("page.html exists; choose another, or replace it with --overwrite", output_file=tmp_path / "page.html")
    refused("is a directory; name the page", output_file=tmp_path)
    assert (tmp_path / "page.html").read_text() == "mine"


def test_a_row_that_is_longer_than_the_model_is_named(tmp_path):
    tok = character_tokenizer("0123456789+-*=#\nx")  # 20 tokens, as the model has
    for name in ("base", "out"):
        save(gpt2(), tok, tmp_path / name)
    (tmp_path / "out" / "config.yaml").write_text(f"model_name_or_path: {tmp_path / 'base'}\n")
    rows = [{"prompt": "1+2=", "completion": "3" * n, "reward": float(n == 5)} for n in (5, 60)]
    with pytest.raises(
        UserError, match=r"row 2: 65 tokens .* the model has 32 positions \(1 of 2 .*; choose other rows"
    ):
        inspect(tmp_path / "out", rows)
    assert len(inspect(tmp_path / "out", rows[:1]).responses) == 1


def test_right_is_what_was_right_in_the_run(place, tmp_path):
    make_run(tmp_path, reward_threshold=0.2)
    rows = [{"prompt": "1+2+3=", "completion": "1+2=3\n#6", "reward": reward} for reward in (0.3, 0.1)]
    found = inspect(tmp_path / "out", rows, rows=[1, 2])
    assert [r.label for r in found.responses] == [True, False]


@pytest.mark.parametrize("process_reward", [None, "none", "additive", "potential"])
def test_labels_mark_the_wrong_step_whatever_they_were_paid_for(process_reward, tmp_path):
    make_run(tmp_path, critic=False, process_reward=process_reward)

    def first_wrong(*labels):
        rows = [{"prompt": f"{i}+2+3=", "completions": ["1+2=3", "#6"], "labels": of} for i, of in enumerate(labels)]
        return inspect(tmp_path / "out", rows, rows=[1]).responses[0].first_wrong_step

    assert first_wrong([True, False]) == first_wrong([1, 0], [1, 1]) == first_wrong([1, -1]) == 1
    assert first_wrong([1, 0], [-1, 1]) is None  # by another row 0 is neutral here
    assert first_wrong([1, 1], [0, 1]) is None


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("beta", -0.1, "beta must be positive, got -0.1"),
        ("process_reward", "odd", "process_reward must be .*, got 'odd'"),
        ("method", "dqq", "method must be one of .*, or package.module:Class, got 'dqq'"),
    ],
)
def test_a_run_whose_options_were_altered_is_refused(option, value, said, place, tmp_path):
    make_run(tmp_path, critic=False, **{option: value})
    with pytest.raises(UserError, match=f"config.yaml:\\d+: {said}; write what the run was trained with"):
        inspect(tmp_path / "out", place / "rows.jsonl", responses=1)


def test_rows_of_a_large_file_are_found_where_the_training_kept_them(place, tmp_path, monkeypatch):
    make_run(tmp_path)
    monkeypatch.setattr("dqo.data.stored.SHARED_FROM", 0)
    plain = inspect(tmp_path / "out", place / "rows.jsonl")
    assert not (tmp_path / "out" / "row_cache").exists()  # one look writes nothing
    (tmp_path / "out" / "row_cache").mkdir()
    open_rows(place / "rows.jsonl", root=tmp_path / "out" / "row_cache")
    monkeypatch.setattr("dqo.data.stored.checked_rows", None)
    again = inspect(tmp_path / "out", place / "rows.jsonl")
    assert [r.source for r in again.responses] == [r.source for r in plain.responses] and len(plain.responses) > 1


def test_rows_are_checked_again_where_the_run_may_not_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "row_cache").mkdir()
    assert _row_cache(tmp_path, {}) == _row_cache(tmp_path / "checkpoint-1", {}) == tmp_path / "row_cache"
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    assert _row_cache(tmp_path, {}) is None

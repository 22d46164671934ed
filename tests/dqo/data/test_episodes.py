import pytest
from transformers import AutoTokenizer  # noqa: F401  (fails early and clearly where transformers is missing)

from dqo.data.episode import fingerprint
from dqo.data.episodes import make_episodes
from dqo.data.rows import read_rows
from dqo.errors import UserError
from dqo.models.new import bpe_tokenizer
from tests.dqo.helpers import tokenizer

CHARACTERS = tokenizer()
EOS = CHARACTERS.eos_token_id


def made(rows, tok=CHARACTERS, **options):
    settings = {"vocab_size": len(tok), "max_length": 64} | options
    return make_episodes(read_rows(rows), tok, **settings)


def row(**changes):
    return {"prompt": "1+2=", "completion": "1+2=3\n#3", "reward": 1.0} | changes


def test_prompt_and_completion_are_tokenised_apart():
    tok = bpe_tokenizer(["abab abab", "ab", "abab"] * 10, 300)  # has a token that would straddle "a" + "b"
    (e,) = made([row(prompt="xa", completion="bx")], tok)
    assert e.prompt_ids == tok("xa")["input_ids"]
    assert e.completion_ids[:-1] == tok("bx", add_special_tokens=False)["input_ids"]


def test_a_finished_response_has_exactly_one_eos_and_it_carries_the_reward():
    (e,) = made([row(reward=0.75)])
    assert e.completion_ids.count(EOS) == 1 and e.completion_ids[-1] == EOS
    assert e.rewards[-1] == 0.75 and not e.rewards[:-1].any()


def test_stored_ids_are_not_tokenised_again():
    ids = [5, 4, 3, EOS]
    (e,) = made([row(prompt_ids=[7, 8], completion_ids=ids)])
    assert (e.prompt_ids, e.completion_ids) == ([7, 8], ids)


def test_a_response_cut_by_the_length_limit_gets_no_eos():
    (e,) = made([row(finish_reason="length")])
    assert EOS not in e.completion_ids
    assert e.terminated and e.rewards[-1] == 1.0  # truncation="terminal": paid as it is


def test_bootstrap_drops_the_outcome_reward_of_a_cut_response_and_keeps_its_step_rewards():
    steps = {"steps": [[0, 6], [6, 8]], "step_rewards": [0.5, 0.25]}
    (e,) = made([row(finish_reason="length", **steps)], truncation="bootstrap", process_reward="additive")
    assert not e.terminated
    assert e.rewards.sum() == 0.75


def test_drop_leaves_out_cut_responses():
    kept = made([row(), row(completion="#9", finish_reason="length")], truncation="drop")
    assert len(kept) == 1


def test_step_rewards_sit_on_the_last_token_of_their_step():
    (e,) = made([row(steps=[[0, 6], [6, 8]], step_rewards=[-1.0, 0.5])], process_reward="additive")
    # characters: 1 + 2 = 3 \n | # 3, then EOS: the steps end at tokens 5 and 7; the outcome is on token 8
    assert e.step_ends == [5, 7]
    assert e.rewards.tolist() == [0, 0, 0, 0, 0, -1.0, 0, 0.5, 1.0]


def test_steps_are_placed_right_when_tokens_are_longer_than_characters():
    text = "two plus two is four\nso four"
    tok = bpe_tokenizer([text] * 20, 400)
    (e,) = made(
        [row(completion=text, steps=[[0, 21], [21, 28]], step_rewards=[1.0, 2.0])], tok, process_reward="additive"
    )
    first = tok.decode(e.completion_ids[: e.step_ends[0] + 1])
    assert first == text[:21]
    assert e.rewards[e.step_ends[0]] == 1.0


def test_process_reward_none_ignores_step_rewards():
    (e,) = made([row(steps=[[0, 6], [6, 8]], step_rewards=[-1.0, 0.5])])
    assert e.first_wrong_step == 0  # it is known all the same
    assert e.rewards.sum() == 1.0


def test_rewards_are_scaled_and_shifted():
    (e,) = made([row(reward=0.0)], reward_scale=2.0, reward_shift=-1.0)
    assert e.rewards[-1] == -1.0


def test_long_rows_are_refused_with_the_share_and_the_cure():
    with pytest.raises(UserError, match=r"50\.0% of rows exceed max_length=8 .*row 2.*--allow_truncation"):
        made([row(completion="#3"), row()], max_length=8)


def test_an_allowed_cut_loses_eos_and_the_steps_beyond_it():
    steps = {"steps": [[0, 6], [6, 8]], "step_rewards": [-1.0, 0.5]}
    (e,) = made([row(**steps)], max_length=11, allow_truncation=True, process_reward="additive")
    assert len(e.completion_ids) == 7 and EOS not in e.completion_ids
    assert e.step_ends == [5] and e.step_rewards == [-1.0] and e.first_wrong_step == 0


def test_ids_of_another_tokenizer_are_refused():
    with pytest.raises(UserError, match="row 1: token id 999 >= vocabulary 19"):
        made([row(prompt_ids=[1], completion_ids=[999])])


def test_messages_need_a_chat_template():
    message = row(prompt=[{"role": "user", "content": "1+2="}], completion=[{"role": "assistant", "content": "3"}])
    with pytest.raises(UserError, match="no chat_template"):
        made([message])


def test_the_chat_template_renders_the_prompt_only():
    tok = tokenizer()
    tok.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    message = row(prompt=[{"role": "user", "content": "1+2"}], completion=[{"role": "assistant", "content": "#3"}])
    (e,) = made([message], tok)
    assert tok.decode(e.prompt_ids) == "1+2="
    assert tok.decode(e.completion_ids[:-1]) == "#3"


def test_logprobs_need_stored_ids_that_end_in_eos():
    with pytest.raises(UserError, match="row 1: completion_ids do not end in EOS"):
        made([row(prompt_ids=[4], completion_ids=[5, 6], logprobs=[-1.0, -2.0])])


def test_a_prompt_as_long_as_max_length_is_refused():
    with pytest.raises(UserError, match="row 1: prompt has 4 tokens, max_length is 4"):
        made([row()], max_length=4)


def test_rows_of_one_prompt_share_its_index():
    indices = [e.prompt_index for e in made([row(), row(prompt="3+3="), row(completion="#1", reward=0.0)])]
    assert indices == [0, 1, 0]


@pytest.mark.parametrize("change", [{"reward": 0.5}, {"completion": "#4"}, {"prompt": "1+3="}])
def test_the_fingerprint_changes_with_what_is_trained_on(change):
    assert fingerprint(made([row(), row(reward=0.0)])) != fingerprint(made([row(**change), row(reward=0.0)]))


@pytest.mark.parametrize(
    "factors",
    [
        {"reward_scale": 1e20},
        {"reward_shift": 3.4e38, "reward_scale": 3e18},
        {"process_reward": "additive", "process_coef": 1e20},
        {"process_reward": "potential", "process_coef": -1e20},
    ],
    ids=str,
)
def test_rewards_that_float32_cannot_hold_are_refused_with_the_row(factors):
    rows = [
        {"prompt": "1+1=", "completion": "2\n#2", "reward": 1e20, "step_rewards": [1e20, -1e20]},
        {"prompt": "1+1=", "completion": "3", "reward": 0.0, "step_rewards": [0.0]},
    ]
    with pytest.raises(UserError, match=r"row 1: the reward of token \d is .*float32 holds at most 3.4e\+38"):
        made(rows, **factors)

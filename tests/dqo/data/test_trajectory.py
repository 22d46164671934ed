"""Completions of several turns on tokens: which are actions, where turns end, what is cut off."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqo.data.episode import fingerprint
from dqo.errors import UserError
from tests.dqo.data.test_ends import CHATML
from tests.dqo.data.test_tokens import BYTES, CHARACTERS, CHAT, EOS, IM_END, PAD, REASONING, answer, chatml, made, user

TOOL = {"role": "tool", "content": "so four"}
MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}GEN_END"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = {  # whether the marks hold the end token, leave it out, or hold the line end after it too
    "inside": MARKS.replace("GEN_END", "<|im_end|>{% endgeneration %}\n"),
    "outside": MARKS.replace("GEN_END", "{% endgeneration %}<|im_end|>\n"),
    "beyond": MARKS.replace("GEN_END", "<|im_end|>\n{% endgeneration %}"),
}


def with_template(template):
    tok = chatml()
    tok.chat_template = template
    return tok


def turns_text(episode, tok):
    """The text of each run of actions."""
    runs, position = [], 0
    for end in episode.turn_ends:
        runs.append(tok.decode(episode.action_ids[position : end + 1]))
        position = end + 1
    return runs


def conversation(*turns):
    """Assistant and tool in turn."""
    roles = ("assistant", "tool")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


visible = st.text(min_size=1, max_size=12).filter(lambda text: text.strip() and "<" not in text)


@settings(max_examples=60, deadline=None)
@given(st.lists(visible, min_size=2, max_size=6), st.sampled_from([None, *MARKED]))
def test_every_turn_has_the_ids_that_a_sampler_would_have_seen_and_written(texts, marks):
    tok = CHAT if marks is None else with_template(MARKED[marks])
    prompt, completion = user("two"), conversation(*texts)
    (e,) = made([{"prompt": prompt, "completion": completion}], tok)
    ids, mask = list(e.prompt_ids), []
    for i, message in enumerate(completion):
        if message["role"] == "assistant":
            head = tok.apply_chat_template([*prompt, *completion[:i]], add_generation_prompt=True, tokenize=False)
            between = head[len(tok.decode(ids)) :]
            read = tok(between, add_special_tokens=False)["input_ids"]
            written = [*tok(message["content"], add_special_tokens=False)["input_ids"], IM_END]
            mask += [False] * len(read) + [True] * len(written)
            ids += read + written
    assert e.prompt_ids + e.completion_ids == ids and e.env_mask.tolist() == mask
    assert turns_text(e, tok) == [f"{text}<|im_end|>" for text in texts[::2]]
    assert e.rewards[-1] == 1.0 and len(e.rewards) == sum(mask) and e.terminated


@pytest.mark.parametrize("last", ["four", "four \n"])
def test_a_template_without_an_end_token_adds_no_white_space_to_turns(last):
    roles = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tok = with_template(roles + "{% if add_generation_prompt %}assistant: {% endif %}")
    completions = conversation("plus", "so", last), conversation(last)
    several, alone = (made([{"prompt": user("two"), "completion": completion}], tok)[0] for completion in completions)
    first, second = turns_text(several, tok)
    assert first == "plus" and second == turns_text(alone, tok)[0] == last + tok.eos_token
    assert "plus\ntool: so\nassistant: four" in tok.decode(several.completion_ids)
    tok.chat_template = tok.chat_template.replace("m.content }}", "m.content | trim }}")
    (e,) = made([{"prompt": user("two"), "completion": conversation("plus \n", "so", "four")}], tok)
    assert turns_text(e, tok)[0] == "plus"


def test_what_follows_the_last_turn_is_cut_with_a_count_and_no_end_is_missing(caplog):
    rows = [{"prompt": user("two"), "completion": conversation("plus", "so", "is", "four")}]
    (e,) = made(rows, CHAT)
    assert turns_text(e, CHAT) == ["plus<|im_end|>", "is<|im_end|>"]
    assert "cut off: what the environment wrote after the last turn of the model (1 rows)" in caplog.text
    (e,) = made([{"prompt": "1+", "completion": "12=3+", "turn_spans": [[1, 2], [3, 4]]}], CHARACTERS)
    assert CHARACTERS.decode(e.completion_ids) == "12=3"  # the environment ended it, not an end token
    assert e.env_mask.tolist() == [False, True, False, True] and e.terminated


def test_spans_of_a_string_are_tokenised_apart_and_the_last_turn_ends(caplog):
    text = "two plus two is four"
    (e,) = made([{"prompt": "so ", "completion": text, "turn_spans": [[0, 6], [8, len(text)]]}], BYTES)
    pieces = [BYTES(part, add_special_tokens=False)["input_ids"] for part in (text[:6], text[6:8], text[8:])]
    assert e.completion_ids == [*pieces[0], *pieces[1], *pieces[2], EOS]
    assert turns_text(e, BYTES) == [text[:6], text[8:] + BYTES.decode([EOS])]
    assert "cut off" not in caplog.text
    cut = {"prompt": "so ", "completion": text, "turn_spans": [[0, 6], [8, len(text)]], "finish_reason": "length"}
    (e,) = made([cut], BYTES)
    assert e.completion_ids[-1] != EOS and e.truncated
    assert e.turn_ends == [len(pieces[0]) - 1]  # the second turn did not come to its end


def test_a_conversation_that_was_cut_within_a_turn_has_no_end_token_there():
    row = {"prompt": user("two"), "completion": conversation("plus", "so", "is"), "finish_reason": "length"}
    (e,) = made([row], CHAT)
    assert CHAT.decode(e.action_ids) == "plus<|im_end|>is" and e.truncated and len(e.turn_ends) == 1
    (e,) = made([row | {"completion": conversation("plus", "so")}], CHAT)  # between turns: the turn was whole
    assert CHAT.decode(e.action_ids) == "plus<|im_end|>" and e.truncated and len(e.turn_ends) == 1


def stored(ids, mask, **more):
    return {"prompt": "1+", "completion": "2", "prompt_ids": [5, 6], "completion_ids": ids, "env_mask": mask} | more


def test_stored_ids_are_used_as_they_are_with_their_log_probabilities():
    logprobs = [-1.0, -2.0, None, None, -3.0, -4.0]
    (e,) = made([stored([3, EOS, EOS, 7, 4, EOS], [1, 1, 0, 0, 1, 1], logprobs=logprobs)], CHARACTERS)
    assert e.completion_ids == [3, EOS, EOS, 7, 4, EOS] and e.action_ids == [3, EOS, 4, EOS]
    assert e.behavior_logprobs.tolist() == [-1.0, -2.0, -3.0, -4.0] and e.turn_ends == [1, 3]
    (e,) = made([stored([7, 3, 8, 4], [0, 1, 0, 1])], CHARACTERS)  # the environment begins; the end is added
    assert e.completion_ids == [7, 3, 8, 4, EOS] and e.action_ids == [3, 4, EOS] and e.turn_ends == [0, 2]


def test_padding_and_what_the_environment_wrote_last_are_cut_from_stored_ids(caplog):
    (e,) = made([stored([3, 7, 4, EOS, PAD, PAD], [1, 0, 1, 1, 0, 0])], CHARACTERS)
    assert e.completion_ids == [3, 7, 4, EOS]
    (e,) = made([stored([3, 7, 4, EOS, PAD, PAD], [1, 0, 1, 1, 1, 1])], CHARACTERS)
    assert e.completion_ids == [3, 7, 4, EOS] and len(e.env_mask) == 4
    assert "what follows the end of completion_ids (1 rows)" in caplog.text
    (e,) = made([stored([3, 7, 4, 8, 9], [1, 0, 1, 0, 0], logprobs=[-1.0] * 5)], CHARACTERS)
    assert e.completion_ids == [3, 7, 4] and e.behavior_logprobs.tolist() == [-1.0, -1.0]
    assert "what the environment wrote after the last turn of the model (1 rows)" in caplog.text


def test_ids_that_make_no_turns_are_refused():
    with pytest.raises(
        UserError, match="row 1: completion_ids has the end token 2 at position 1, and the turn goes on"
    ):
        made([stored([3, EOS, 4, 7, 4], [1, 1, 1, 0, 1])], CHARACTERS)
    with pytest.raises(
        UserError, match="row 1: completion_ids has the end token 2 at position 3, and goes on after it"
    ):
        made([stored([3, 7, 4, EOS, 4], [1, 0, 1, 1, 1])], CHARACTERS)
    with pytest.raises(UserError, match="row 1: the last turn that env_mask marks in completion_ids is padding alone"):
        made([stored([3, 7, PAD, PAD], [1, 0, 1, 1])], CHARACTERS)
    with pytest.raises(UserError, match="row 1: completion_ids do not end in EOS .2. although finish_reason is not"):
        made([stored([3, 7, 4], [1, 0, 1], logprobs=[-1.0] * 3)], CHARACTERS)


def test_a_tag_that_ends_the_prompt_is_cut_from_the_first_turn():
    think = CHAT.convert_tokens_to_ids("<think>")
    row = stored(
        [think, 9, 7, 4, IM_END], [1, 1, 0, 1, 1], prompt_ids=[5, think], logprobs=[-1.0, -2.0, None, -3.0, -4.0]
    )
    (e,) = made([row], CHAT)
    assert e.completion_ids == [9, 7, 4, IM_END] and e.turn_ends == [0, 2]
    assert e.behavior_logprobs.tolist() == [-2.0, -3.0, -4.0]


FORGETS = (  # earlier thoughts are left out, as Qwen3's template does
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_writes_earlier_turns_otherwise_is_refused_with_the_cure():
    completion = [{"role": "assistant", "content": "two", "reasoning_content": "so"}, TOOL, *answer("four")]
    row = {"prompt": user("two"), "completion": completion}
    with pytest.raises(
        UserError,
        match="^row 1: turn 1 of the assistant: what the chat template writes up to it is not the beginning of what it writes "
        "for the whole .* store the ids that the sampler saw: prompt_ids, completion_ids and env_mask$",
    ):
        made([row], with_template(FORGETS))
    (e,) = made([row | {"prompt_ids": [5], "completion_ids": [3, 7, 4], "env_mask": [1, 0, 1]}], with_template(FORGETS))
    assert e.action_ids == [3, 4, IM_END]


@pytest.mark.parametrize("template", [CHATML, MARKED["inside"]], ids=["rendered", "marked"])
def test_a_template_that_leaves_out_a_part_of_a_turn_is_refused(template):
    tok = with_template(
        template.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    )  # as DeepSeek-R1's
    row = {"prompt": user("two"), "completion": conversation("plus", "so", "<think>is</think>four")}
    with pytest.raises(
        UserError, match="^row 1: the chat template changes the content of turn 2 of the assistant; store the ids"
    ):
        made([row], tok)


def test_marks_that_do_not_fit_the_turns_are_refused():
    row = {"prompt": user("two"), "completion": conversation("plus", "so", "is")}
    twice = MARKED["inside"].replace(
        "{{ m.content }}<|im_end|>{%", "{{ m.content }}{% endgeneration %}.{% generation %}<|im_end|>{%"
    )
    with pytest.raises(
        UserError, match="row 1: the chat template marks 4 pieces .* has 2 messages of assistant; store the"
    ):
        made([row], with_template(twice))
    with pytest.raises(
        UserError, match="row 1: prompt ends in a message of assistant, and completion has several messages"
    ):
        made([row | {"prompt": [*user("two"), *answer("plus")]}], CHAT)
    refuses = with_template("{{ raise_exception('no tools') if messages[-1].role == 'assistant' }}" + MARKED["inside"])
    with pytest.raises(UserError, match="^row 1: the chat template refuses the messages: no tools$"):
        made([row], refuses)


def test_tools_and_calls_of_earlier_turns_are_written_by_the_template():
    tok = with_template(REASONING)
    call = {"type": "function", "function": {"name": "plus", "arguments": {"a": 2}}}
    completion = [{"role": "assistant", "content": "so", "tool_calls": [call]}, TOOL, *answer("four")]
    (e,) = made([{"prompt": user("two"), "completion": completion, "tools": [{"name": "plus"}]}], tok)
    assert turns_text(e, tok) == ["so<call>plus<|im_end|>", "four<|im_end|>"]
    assert tok.decode(e.prompt_ids).startswith("[plus]")


PAID = {
    "prompt": user("two"),
    "completion": conversation("plus", "so", "is", "so", "four"),
    "turn_rewards": [0.25, 0.5, 1.0],
}


def test_turn_rewards_are_paid_on_the_last_token_of_their_turn():
    (e,) = made([PAID], CHAT, process_reward="additive", process_coef=2.0)
    expected = np.zeros(len(e.action_ids))
    expected[e.turn_ends] = [0.5, 1.0, 2.0 + 1.0]
    assert e.rewards.tolist() == expected.tolist() and [e.action_ids[i] for i in e.turn_ends] == [IM_END] * 3
    (none,) = made([PAID], CHAT, process_reward="none")
    assert none.rewards.sum() == 1.0


def test_potentials_of_turns_are_discounted_where_the_discount_acts():
    (e,) = made([PAID], CHAT, process_reward="potential", gamma=0.5, discount="turns")
    expected = np.zeros(len(e.action_ids))  # nothing is paid within a turn: there gamma is 1
    expected[e.turn_ends] = [0.5 * 0.25, 0.5 * 0.5 - 0.25, -0.5 + 1.0]
    np.testing.assert_allclose(e.rewards, expected)
    (tokens,) = made([PAID], CHAT, process_reward="potential", gamma=0.5)
    assert tokens.rewards[e.turn_ends[0] + 1] == -0.125  # within the second turn: 0.5 * 0.25 - 0.25


def test_a_cut_keeps_whole_turns_and_ends_with_an_action():
    (whole,) = made([PAID], CHAT, process_reward="additive")
    first_turns = int(whole.actions[whole.turn_ends[1]]) + 1  # tokens of the first two turns and what lies between
    for more in (0, 1, 3):  # the cut is in the environment's reply: nothing of it is left
        (e,) = made(
            [PAID],
            CHAT,
            process_reward="additive",
            allow_truncation=True,
            max_length=len(whole.prompt_ids) + first_turns + more,
        )
        assert e.completion_ids == whole.completion_ids[:first_turns] and e.truncated
        assert e.turn_ends == whole.turn_ends[:2] and e.rewards[e.turn_ends].tolist() == [0.25, 0.5 + 1.0]
    within = first_turns - 1
    (e,) = made(
        [PAID], CHAT, process_reward="additive", allow_truncation=True, max_length=len(whole.prompt_ids) + within
    )
    assert e.turn_ends == whole.turn_ends[:1] and e.step_rewards == [0.25] and e.env_mask[-1]


def test_a_row_whose_first_action_lies_beyond_max_length_is_refused():
    with pytest.raises(UserError, match="row 1: the model's first token comes after 4 others, max_length is 4; raise"):
        made([stored([7, 8, 3, 9], [0, 0, 1, 0])], CHARACTERS, max_length=4)


def test_the_fingerprint_knows_which_tokens_are_actions():
    one, other = (made([stored([3, 7, 8, 4, EOS], mask)], CHARACTERS) for mask in ([1, 0, 0, 1, 1], [0, 1, 0, 1, 1]))
    assert one[0].completion_ids == other[0].completion_ids and one[0].turn_ends == other[0].turn_ends
    assert fingerprint(one) != fingerprint(other)


def test_a_single_turn_has_the_ids_and_the_fingerprint_that_it_had():
    row = {"prompt": user("two"), "completion": answer("four")}
    (e,) = made([row], CHAT)
    assert e.env_mask is None and e.turn_ends == [len(e.completion_ids) - 1] and CHAT.chat_template == CHATML
    assert made([row | {"turn_rewards": [0.5]}], CHAT, process_reward="additive")[0].rewards.tolist()[-1] == 1.5

"""What a row becomes on tokens: ends, padding, templates, tags and boundaries."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dqo.data.episodes import make_episodes
from dqo.data.rows import Row, read_rows
from dqo.data.tokens import decoded_spans
from dqo.errors import UserError
from dqo.models.new import bpe_tokenizer
from tests.dqo.data.test_ends import CHATML
from tests.dqo.helpers import tokenizer

BYTES = bpe_tokenizer(["two plus two is four\nso <b>four</b> ", "ab abab élan"] * 20, 400)
BYTE_IDS = {byte: BYTES.convert_tokens_to_ids(letter) for byte, letter in bytes_to_unicode().items()}
CHARACTERS = tokenizer()
PAD, BOS, EOS = 0, 1, 2


def chatml():
    tok = bpe_tokenizer(["two plus two is four\nuser assistant system tool think"] * 20, 400)
    tok.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tok.add_tokens(["<think>", "</think>"])
    tok.chat_template = CHATML
    return tok


CHAT = chatml()
IM_END = CHAT.convert_tokens_to_ids("<|im_end|>")


def made(rows, tok, **options):
    rows = [row if isinstance(row, Row) else {"reward": 1.0} | row for row in rows]
    return make_episodes(read_rows(rows), tok, **{"vocab_size": len(tok), "max_length": 4096} | options)


def user(text):
    return [{"role": "user", "content": text}]


def answer(text, **more):
    return [{"role": "assistant", "content": text, **more}]


def stored(completion, prompt=(5, 6), **more):
    row = {"prompt": "1+", "completion": "2", "prompt_ids": list(prompt), "completion_ids": list(completion)}
    return row | more


visible = st.text(min_size=1, max_size=30).filter(lambda text: text.strip() and "<" not in text)


@settings(max_examples=150, deadline=None)
@given(visible, visible)
def test_strings_and_plain_messages_have_the_ids_of_prompt_and_completion_tokenised_apart(prompt, completion):
    (e,) = made([{"prompt": prompt, "completion": completion}], BYTES)
    assert e.prompt_ids == BYTES(prompt)["input_ids"]
    plain = BYTES(completion, add_special_tokens=False)["input_ids"]
    assert e.completion_ids == [*plain, BYTES.eos_token_id]
    (e,) = made([{"prompt": user(prompt), "completion": answer(completion)}], CHAT)
    expected = CHAT.apply_chat_template(user(prompt), add_generation_prompt=True, return_dict=False)
    assert e.prompt_ids == expected
    assert e.completion_ids == [*CHAT(completion, add_special_tokens=False)["input_ids"], IM_END]


def test_strings_end_in_the_tokenizers_eos_even_with_a_template():
    (e,) = made([{"prompt": "two", "completion": "four"}], CHAT)
    assert e.completion_ids[-1] == CHAT.eos_token_id != IM_END


@pytest.mark.parametrize("end", [EOS, 7, 8])
def test_stored_ids_that_end_in_any_stop_id_get_no_second_end(end):
    (e,) = made([stored([3, 4, end], finish_reason="stop")], CHARACTERS, stop_ids=[7, 8])
    assert e.completion_ids == [3, 4, end] and not e.truncated


response = st.lists(st.integers(3, 15), min_size=1, max_size=6)
ends = st.sampled_from([EOS, 16])


@settings(max_examples=150, deadline=None)
@given(response, ends, st.lists(st.sampled_from([PAD, EOS, 16]), max_size=4), st.booleans())
def test_what_follows_the_first_end_is_cut_with_its_logprobs(ids, end, tail, logprobs):
    whole = [*ids, end, *tail]
    more = {"logprobs": [-float(i) for i in range(len(whole))]} if logprobs else {}
    (e,) = made([stored(whole, **more)], CHARACTERS, stop_ids=[16])
    assert e.completion_ids == [*ids, end] and e.rewards[-1] == 1.0
    if logprobs:
        assert e.behavior_logprobs.tolist() == [-float(i) for i in range(len(ids) + 1)]


@settings(max_examples=50, deadline=None)
@given(response, st.lists(st.just(PAD), max_size=4), st.integers(0, 4), st.booleans())
def test_padding_and_repeated_bos_are_taken_off(ids, pads, more_bos, with_bos):
    prompt = [*pads, *[BOS] * (with_bos + more_bos * with_bos), *ids]
    (e,) = made([stored([*ids, *pads], prompt, finish_reason="length")], CHARACTERS)
    assert e.completion_ids == ids and e.truncated
    assert e.prompt_ids == [BOS] * with_bos + ids


def test_cuts_are_counted_in_one_line(caplog):
    rows = [stored([3, EOS, EOS]), stored([3, EOS, PAD]), stored([3, EOS], [PAD, 5]), stored([3, EOS])]
    made(rows, CHARACTERS)
    assert [r.message for r in caplog.records if "cut off" in r.message] == [
        "cut off: padding of prompt_ids (1 rows), what follows the end of completion_ids (2 rows)"
    ]


def test_a_response_that_goes_on_after_an_end_is_refused_with_its_row():
    with pytest.raises(UserError, match=r"row 2: completion_ids has the end token 2 at position 1, and goes on after"):
        made([stored([3, EOS]), stored([3, EOS, 4, EOS])], CHARACTERS)


def test_a_pad_token_that_is_the_bos_or_the_eos_leaves_one_at_the_beginning():
    tok = tokenizer()
    tok.pad_token = tok.bos_token
    (e,) = made([stored([3, EOS], [BOS, BOS, BOS, 5])], tok)
    assert e.prompt_ids == [BOS, 5]
    tok.pad_token = tok.eos_token
    (e,) = made([stored([3, EOS, EOS], [EOS, EOS, 5])], tok)
    assert (e.prompt_ids, e.completion_ids) == ([5], [3, EOS])


def with_specials(single):
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return tok


def test_a_tokenizers_own_end_and_a_second_bos_of_a_string_are_cut(caplog):
    plain = CHARACTERS("1+2=")["input_ids"]
    (e,) = made([{"prompt": "1+2=", "completion": "3"}], with_specials("$A <eos>"))
    assert e.prompt_ids == plain
    assert "the EOS that the tokenizer appends to the prompt (1 rows)" in caplog.text
    (e,) = made([{"prompt": "<bos>1+2=", "completion": "3"}], with_specials("<bos> $A"))
    assert e.prompt_ids == [BOS, *plain]
    assert "a second BOS of the prompt (1 rows)" in caplog.text
    (e,) = made([{"prompt": "1+2=", "completion": "3"}], with_specials("<bos> $A"))
    assert e.prompt_ids == [BOS, *plain]  # one BOS is right
    (e,) = made([stored([BOS, 3, EOS], [BOS, 5])], with_specials("<bos> $A"))
    assert e.completion_ids == [3, EOS]


def test_a_prompt_that_ends_in_an_assistant_message_is_continued():
    prompt = [*user("two plus two"), {"role": "assistant", "content": "two plus"}]
    (e,) = made([{"prompt": prompt, "completion": answer(" two is four")}], CHAT)
    text = CHAT.decode(e.prompt_ids + e.completion_ids)
    assert text == ("<|im_start|>user\ntwo plus two<|im_end|>\n<|im_start|>assistant\ntwo plus two is four<|im_end|>")
    assert e.prompt_ids.count(IM_END) == 1


THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize("head", ["<think>", "<think>\n", "\n<think>\n"])
def test_a_tag_that_ends_the_prompt_is_not_repeated(head, caplog):
    tok = chatml()
    tok.chat_template = THINKING
    row = {"prompt": user("two"), "completion": answer(f"{head}plus\n</think>four")}
    (e,) = made([row], tok)
    text = tok.decode(e.prompt_ids + e.completion_ids)
    assert text.endswith("<|im_start|>assistant\n<think>\nplus\n</think>four<|im_end|>")
    assert "a tag that opens the reasoning and ends the prompt already (1 rows)" in caplog.text
    (e,) = made([{"prompt": "two<think>", "completion": f"{head}plus"}], tok)
    assert tok.decode(e.prompt_ids + e.completion_ids).count("<think>") == 1
    (e,) = made([{"prompt": "two", "completion": f"{head}plus"}], tok)
    assert tok.decode(e.completion_ids[:-1]) == f"{head}plus"


def test_steps_move_with_the_tag_that_is_cut():
    tok = chatml()
    tok.chat_template = THINKING
    completion, steps = "<think>\ntwo\nfour", [[0, 8], [8, 12], [12, 16]]
    row = {"prompt": user("two"), "completion": answer(completion), "steps": steps, "step_rewards": [0.25, 0.5, 1.0]}
    (e,) = made([row], tok, process_reward="additive")
    assert tok.decode(e.completion_ids[: e.step_ends[1] + 1]) == "two\n"
    assert tok.decode(e.completion_ids[: e.step_ends[2] + 1]) == "two\nfour"
    assert e.step_ends[0] == 0 and e.rewards[:-1].sum() == 1.75


def test_stored_ids_lose_the_tag_and_its_logprob_too():
    tok = chatml()
    tok.chat_template = THINKING
    think, four = tok.convert_tokens_to_ids("<think>"), tok("four", add_special_tokens=False)["input_ids"]
    ids = [think, *tok("\n", add_special_tokens=False)["input_ids"], *four, IM_END]
    row = {"prompt": user("two"), "completion": answer("<think>\nfour"), "completion_ids": ids}
    (e,) = made([row | {"logprobs": [-float(i) for i in range(len(ids))]}], tok)
    assert e.completion_ids == [*four, IM_END]
    assert e.behavior_logprobs.tolist() == [-float(i) for i in range(2, len(ids))]


REASONING = (
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% if quiet %}hush{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_template_options_reasoning_and_calls_reach_the_template(caplog):
    tok = chatml()
    tok.chat_template = REASONING
    call = {"type": "function", "function": {"name": "plus", "arguments": {"a": 2}}}
    row = {
        "prompt": user("two"),
        "completion": answer("four\nso", reasoning_content="is", tool_calls=[call], weight=1),
        "tools": [{"name": "plus"}],
        "chat_template_kwargs": {"quiet": True},
        "steps": [[0, 5], [5, 7]],
        "step_rewards": [0.5, 0.25],
    }
    (e,) = made([row], tok, process_reward="additive")
    assert tok.decode(e.prompt_ids) == "[plus]hush<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert tok.decode(e.completion_ids) == "<think>\nis\n</think>\nfour\nso<call>plus<|im_end|>"
    assert tok.decode(e.completion_ids[: e.step_ends[0] + 1]).endswith("</think>\nfour\n")
    assert "that the chat template does not read: 'weight' (1 rows)" in caplog.text
    caplog.clear()
    tok.chat_template = CHATML
    made([{**row, "completion": answer("four\nso")}], tok, process_reward="additive")
    assert "does not read: 'quiet' (1 rows), 'tools' (1 rows)" in caplog.text
    tok.chat_template = REASONING
    only_call = [{"role": "assistant", "tool_calls": [call]}]
    (e,) = made([{"prompt": user("two"), "completion": only_call}], tok)
    assert tok.decode(e.completion_ids).endswith("<call>plus<|im_end|>")


def test_a_completion_that_the_template_writes_elsewhere_is_refused():
    tok = chatml()
    tok.chat_template = REASONING.replace("assistant\n{% endif %}", "assistant\n<other>{% endif %}")
    row = {"prompt": user("two"), "completion": answer("four", reasoning_content="is")}
    with pytest.raises(UserError, match="row 1: the completion has reasoning_content, and the chat template does not"):
        made([row], tok)


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


def test_an_error_of_the_template_names_the_row_and_can_be_skipped(caplog):
    tok = chatml()
    tok.chat_template = NO_SYSTEM
    bad = {"prompt": [{"role": "system", "content": "four"}, *user("two")], "completion": answer("four")}
    good = {"prompt": user("two"), "completion": answer("four")}
    with pytest.raises(UserError, match="^row 2: the chat template refuses the messages: System role not supported$"):
        made([good, bad], tok)
    with pytest.raises(
        UserError, match="the data: 2 of 3 rows do not fit:\n  row 1: the chat template .*the same in 1 more: row 3"
    ):
        made([bad, good, bad], tok)
    assert len(made([good, bad], tok, skip_bad_rows=True)) == 1
    assert "row 2: the chat template refuses" in caplog.text and "They are dropped; 1 rows are left" in caplog.text
    tok.chat_template = None
    with pytest.raises(UserError) as caught:
        made([good] * 30, tok)
    assert str(caught.value).count("the tokenizer has no chat_template") == 1
    assert "30 of 30 rows do not fit" in str(caught.value) and "the same in 29 more: row 2, " in str(caught.value)
    tok.chat_template = {"rag": CHATML}
    with pytest.raises(UserError, match="row 1: the chat template refuses the messages: .*no default"):
        made([good], tok)


def test_empty_extras_and_words_within_words_are_nothing_that_the_template_reads(caplog):
    tok = chatml()
    tok.chat_template = REASONING
    row = {"prompt": user("two"), "completion": answer("four", reasoning_content="", tool_calls=[], unc=1)}
    (e,) = made([row], tok)
    assert tok.decode(e.completion_ids) == "four<|im_end|>"
    assert "does not read: 'unc' (1 rows)" in caplog.text  # a part of "function" is not the key


def test_stored_ids_of_messages_with_steps_need_no_template():
    row = {"prompt": user("1+"), "completion": answer("2"), "steps": [[0, 1]], "step_rewards": [0.5]}
    ids = CHARACTERS("2", add_special_tokens=False)["input_ids"]
    (e,) = made([row | {"prompt_ids": [4], "completion_ids": [*ids, EOS]}], CHARACTERS, process_reward="additive")
    assert e.rewards.tolist() == [0.5, 1.0]


@st.composite
def splits(draw):
    """A text and ids of it that a tokenizer would mostly not write: cut anywhere, also inside a character of several bytes."""
    text = draw(st.text(alphabet="two pslua\n\u00e9\u4e2d\U0001f600", min_size=1, max_size=30).filter(str.strip))
    cut = draw(st.sets(st.integers(1, max(1, len(text) - 1))))
    ids = []
    for start, end in zip([0, *sorted(cut)], [*sorted(cut), len(text)]):
        piece = text[start:end]
        units = piece.encode() if draw(st.booleans()) else [piece]
        for unit in units:
            ids += [BYTE_IDS[unit]] if isinstance(unit, int) else BYTES(unit)["input_ids"]
    return text, ids


@given(splits(), st.data())
@settings(max_examples=200, deadline=None)
def test_steps_are_placed_on_stored_ids_however_they_split_the_text(split, data):
    text, ids = split
    assert BYTES.decode(ids) == text
    spans = decoded_spans(BYTES, ids)
    assert len(spans) == len(ids) and spans[-1][1] == len(text)
    for start, end in dict.fromkeys(spans):
        within = [token for token, span in zip(ids, spans) if span == (start, end)]
        assert BYTES.decode(within) == text[start:end]
    end = data.draw(st.integers(1, len(text) - 1)) if len(text) > 1 else len(text)
    steps = [[0, end], [end, len(text)]] if end < len(text) else [[0, end]]
    row = {"prompt": "two", "completion": text, "steps": steps, "step_rewards": [0.5] * len(steps)}
    (episode,) = made([row | {"prompt_ids": [5], "completion_ids": [*ids, BYTES.eos_token_id]}], BYTES)
    assert BYTES.decode(ids[: episode.step_ends[0] + 1]).startswith(text[:end])  # the step's last character is inside


def test_padding_that_a_model_sampled_ends_the_last_step():
    row = {"prompt": "1+2=", "completion": "12\n3<pad>", "steps": [[0, 3], [3, 9]], "step_rewards": [0.5, 0.25]}
    row |= {"prompt_ids": [4], "completion_ids": [*CHARACTERS("12\n3")["input_ids"], PAD], "finish_reason": "length"}
    (episode,) = made([row], CHARACTERS)
    assert (len(episode.completion_ids), episode.step_ends) == (4, [2, 3])
    row["completion"] = "12\n4<pad>"
    with pytest.raises(UserError, match="steps are character spans, but completion_ids are the ids of another text"):
        made([row], CHARACTERS)

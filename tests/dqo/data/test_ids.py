"""Completions continue their prompts: no space of the tokenizer's own at the boundary."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dqo.data import ids
from dqo.data.episodes import make_episodes
from dqo.data.ids import Continuation
from dqo.data.rows import Row
from dqo.data.tokens import prompt_ids

CORPUS = ["ab ab abc cab", "a b c", "cab cab abc  bc"] * 10


def made(normalizer=None, pre_tokenizer=None):
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=60,
        special_tokens=["<s>", "</s>", "<tag>"],
        initial_alphabet=list("abc\u2581\u0120\u010a\n"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<s>", extra_special_tokens=["<tag>"]
    )


LEGACY = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
TOKENIZERS = {
    "always": made(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always")),
    "first": made(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
    "never": made(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never")),
    "llama 2": made(normalizer=LEGACY),
    "in a sequence": made(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
    ),
    "byte level": made(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "byte level, none": made(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
}
text = st.text("abc \n", min_size=1, max_size=8).filter(str.strip)


def ids_of(tokenizer, prompt, completion):
    row = Row(prompt, completion, reward=1.0, label=True, source="row 1")
    (e,) = make_episodes([row], tokenizer, vocab_size=len(tokenizer), max_length=99)
    return e.prompt_ids, e.completion_ids[:-1]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text, st.sampled_from(["", "<tag>"]), text)
def test_prompt_and_completion_have_together_the_pieces_of_one_text(name, prompt, tag, completion):
    tokenizer = TOKENIZERS[name]
    if tag and completion[0] == " " and name in ("always", "first", "in a sequence", "byte level"):
        completion = (
            completion.lstrip()
        )  # there the tokenizer's own space and the text's are one piece or two, by its kind
    prompt += tag
    before, after = ids_of(tokenizer, prompt, completion)
    whole = tokenizer(prompt + completion)["input_ids"]
    assert before == tokenizer(prompt)["input_ids"]
    assert "".join(tokenizer.convert_ids_to_tokens(before + after)) == "".join(tokenizer.convert_ids_to_tokens(whole))


@pytest.mark.parametrize("name", ["never", "byte level, none"])
def test_a_tokenizer_without_a_prefix_is_used_as_it_is(name):
    assert Continuation(TOKENIZERS[name]).backend is None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_spans_are_of_the_completion(name):
    (found,) = Continuation(TOKENIZERS[name])(["ab\ncab"], [None], offsets=True)
    ids, spans = found
    assert len(ids) == len(spans) and spans[0][0] == 0 and spans[-1][1] == 6
    assert "".join("ab\ncab"[a:b] for a, b in spans) == "ab\ncab"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_turns_continue_what_lies_before_them(name):
    tokenizer = TOKENIZERS[name]
    spans = [(0, 2), (4, 6)]
    row = Row("ab", "abcabcab", reward=1.0, label=True, turn_spans=spans, source="row 1")
    (e,) = make_episodes([row], tokenizer, vocab_size=len(tokenizer), max_length=99)
    ids = list(e.prompt_ids)
    for piece in ("ab", "ca", "bc"):
        ids += ids_of(tokenizer, "ab", piece)[1]
    assert e.prompt_ids + e.completion_ids == ids  # no piece begins with a space of the tokenizer's own
    tagged = Row("ab", "a<tag>b", reward=1.0, label=True, turn_spans=[(0, 1), (6, 7)], source="row 1")
    (e,) = make_episodes([tagged], tokenizer, vocab_size=len(tokenizer), max_length=99)
    assert e.action_ids[1:-1] == ids_of(tokenizer, "a<tag>", "b")[1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_tokenised_some_at_once_and_each_as_alone(name, monkeypatch):
    tokenizer, texts = TOKENIZERS[name], ["ab", " ab c", "cab\n", "b", "abc  bc", "<tag>a", "bc"]
    tag = tokenizer.convert_tokens_to_ids("<tag>")
    last = [None, tag, 3, 4, tag, 5, None]
    monkeypatch.setattr(ids, "AT_ONCE", 1)
    alone = [
        [Continuation(tokenizer)([text], [end], offsets)[0] for text, end in zip(texts, last)] for offsets in (0, 1)
    ]
    prompts = prompt_ids(tokenizer, texts, [text < "b" for text in texts])
    assert any(spans for _, spans in alone[1]) and not any(spans for _, spans in alone[0])
    assert [found for found, _ in alone[0]] == [found for found, _ in alone[1]]
    for size in (2, 512):
        monkeypatch.setattr(ids, "AT_ONCE", size)
        assert [Continuation(tokenizer)(texts, last, offsets) for offsets in (0, 1)] == alone
        assert prompt_ids(tokenizer, texts, [text < "b" for text in texts]) == prompts

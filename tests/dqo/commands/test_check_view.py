import re

import pytest

from dqo.commands.check_view import view
from dqo.data.episodes import make_episodes
from dqo.data.ids import token_texts
from dqo.data.rows import read_rows
from dqo.errors import printable
from dqo.models.new import bpe_tokenizer
from tests.dqo.helpers import tokenizer

STEPS = {"steps": [[0, 6], [6, 8]], "step_rewards": [-1.0, 0.5]}


def episode(tok=None, prompt="1+2=", completion="1+2=3\n#3", **changes):
    tok = tok or tokenizer()
    rows = read_rows([{"prompt": prompt, "completion": completion, "reward": 1.0} | changes])
    options = {"vocab_size": len(tok), "max_length": 4096, "process_reward": "additive"}
    return make_episodes(rows, tok, **options)[0]


def test_plain_text_shows_tokens_steps_rewards_and_eos():
    shown = view(episode(**STEPS), tokenizer(), colour=False).split("\n", 1)
    assert shown[0] == "row 1: right, reward 1, 4 + 9 tokens, ends in EOS; tokens are paid +0.5 together"
    eos = tokenizer().eos_token
    assert shown[1] == f"[prompt] 1+2=\n[response] 1│+│2│=│3│\\n{{-1}}║\n#│3{{+0.5}}║{eos}{{+1}}"


def test_colours_change_nothing_but_the_separators_of_tokens():
    plain, painted = (view(episode(**STEPS), tokenizer(), colour) for colour in (False, True))
    assert "\x1b[2m" in painted and "\x1b[7m" in painted and "\x1b[31;1m{-1}" in painted
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == plain.replace("│", "")
    assert not any(line.count("\x1b[0m") * 2 != line.count("\x1b[") for line in painted.split("\n"))


def test_a_response_that_was_cut_shows_no_eos():
    shown = view(episode(finish_reason="length"), tokenizer(), colour=False)
    assert "does not end" in shown and tokenizer().eos_token not in shown


def test_the_middle_of_a_long_response_and_the_beginning_of_a_long_prompt_are_left_out():
    steps = {"steps": [[0, 200], [200, 400]], "step_rewards": [0.25, 0.5]}
    shown = view(episode(prompt="2" * 90, completion="1" * 400, **steps), tokenizer(), colour=False)
    assert "... 201 tokens, paid +0.25 ..." in shown
    assert "[prompt] ... " + "2" * 60 + "\n" in shown
    assert shown.count("1│") + shown.count("1{") == 140 + 59


@pytest.mark.parametrize("text", ["two plus two is four\nso four", "½ of élan"])
def test_token_texts_keep_the_spaces_and_make_the_text(text):
    tok = bpe_tokenizer([text] * 20, 400)
    assert "".join(token_texts(tok, tok(text)["input_ids"])) == text


@pytest.mark.parametrize("text", ["\x1b[2J\x07", "a\rb", "\x9b31mred", "\x7f", "\u202egnp.exe"])
def test_control_characters_are_written_out(text):
    tok = bpe_tokenizer([text * 3] * 5, 400)
    shown = view(episode(tok, prompt=f"1{text}", completion=f"2{text}3", source=text), tok, colour=False)
    assert not set(shown) & {"\x1b", "\x07", "\r", "\x9b", "\x7f", "\u202e"}
    assert shown.replace("│", "").count(printable(text)) == 2


def test_the_end_that_is_not_eos_is_named():
    tok = tokenizer()
    tok.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    tok.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    chat = {"prompt": [{"role": "user", "content": "1"}], "completion": [{"role": "assistant", "content": "2"}]}
    shown = view(episode(tok, **chat), tok, colour=False)
    assert "1 + 2" not in shown and "ends in <|im_end|>" in shown and shown.endswith("2│<|im_end|>{+1}")


def test_what_the_environment_wrote_stands_in_brackets_and_is_paid_nothing():
    turns = {"turn_spans": [[0, 2], [5, 7]], "turn_rewards": [-1.0, 0.5]}
    plain = view(episode(completion="1+2=3\n#", **turns), tokenizer(), colour=False)
    header, _, shown = plain.partition("\n[prompt] 1+2=\n[response] ")
    assert header == (
        "row 1: right, reward 1, 4 + 8 tokens in 2 turns, 3 of them the environment's, ends in EOS; tokens are paid +0.5 together"
    )
    assert shown == f"1│+{{-1}}║⟦2=3⟧\\n│\n#│{tokenizer().eos_token}{{+1.5}}║"
    painted = view(episode(completion="1+2=3\n#", **turns), tokenizer(), colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == plain.replace("│", "")


def test_brackets_are_closed_where_the_middle_is_left_out():
    long = episode(completion="1" + "2" * 400 + "3", turn_spans=[[0, 1], [401, 402]])
    _, _, shown = view(long, tokenizer(), colour=False).partition("\n[response] ")
    head, middle, tail = shown.split("\n")
    assert head == f"1⟦{'2' * 139}⟧" and middle.startswith("... 203 tokens, ")
    assert tail.startswith(f"⟦{'2' * 58}⟧3│{tokenizer().eos_token}")

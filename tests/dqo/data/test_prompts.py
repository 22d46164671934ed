import json

import pytest

from dqo.data.chat import prompt_text
from dqo.data.ends import ends_of
from dqo.data.prompts import Prompt, prompt_token_ids, read_prompts
from dqo.data.rows import Row
from dqo.data.tokens import tokenize_rows
from dqo.errors import UserError
from tests.dqo.helpers import tokenizer

TEMPLATE = "{{ bos_token }}{% if tools %}{{ tools | length }}+{% endif %}{% if short %}1{% endif %}"
TEMPLATE += "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def chat_tokenizer():
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


def written(tmp_path, *rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_strings_and_messages_are_read_with_what_belongs_to_them(tmp_path):
    found = read_prompts(written(tmp_path, {"prompt": "1+2=", "answer": 3, "prompt_id": 7}, {"prompt": "4="}))
    assert found == [Prompt("1+2=", "3", "7", source="prompts.jsonl:1"), Prompt("4=", source="prompts.jsonl:2")]
    messages = [{"role": "user", "content": "1+2="}]
    row = {"prompt": messages, "tools": '[{"name": "f"}]', "chat_template_kwargs": {"short": True}}
    (found,) = read_prompts(written(tmp_path, row))
    assert (found.prompt, found.tools, found.chat_template_kwargs) == (messages, [{"name": "f"}], {"short": True})


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"question": "1+2="}], "prompts.jsonl:1: has no prompt; found question; rename question to prompt"),
        ([{"prompt": "1="}, {"prompt": None}], "prompts.jsonl:2: has no prompt; found nothing"),
        ([{"prompt": "1="}, {"prompt": 3}], "prompts.jsonl:2: prompt is 3; expected a string or a list of messages"),
        ([{"prompt": ""}], "prompts.jsonl:1: prompt is empty; the first token of a response needs something before it"),
        ([{"prompt": []}], "prompts.jsonl:1: prompt is empty"),
        ([{"prompt": "1="}, "{"], "prompts.jsonl:2: not valid JSON"),
        (
            [{"prompt": "1="}, {"prompt": [{"role": "user", "content": "1="}]}],
            "prompts.jsonl:2: prompt is a list of messages, and prompts.jsonl:1 has a string; one file holds one kind",
        ),
        (
            [{"prompt": "1=", "tools": [{}]}],
            "prompts.jsonl:1: has tools, which a chat template reads, and prompt is a string",
        ),
        (
            [{"prompt": [{"role": "user", "content": "1=", "name": "\ud83d"}]}],
            "prompts.jsonl:1: prompt is .*, which JSON cannot hold; mend it, or drop the row",
        ),
        (
            [{"prompt": [{"role": "user", "content": "1="}], "chat_template_kwargs": {"x": float("nan")}}],
            'prompts.jsonl:1: chat_template_kwargs is {"x": NaN}, which JSON cannot hold',
        ),
        ([{"prompt": "1=", "answer": ["3"]}], r'prompts.jsonl:1: answer is \["3"\]; expected a string'),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_prompts(written(tmp_path, *rows))


def test_answers_are_demanded_where_they_are_needed(tmp_path):
    path = written(tmp_path, {"prompt": "1=", "answer": "1"}, {"prompt": "2="})
    assert len(read_prompts(path)) == 2
    with pytest.raises(
        UserError, match="prompts.jsonl:2: has no answer; expected the string that a response is graded by"
    ):
        read_prompts(path, answers=True)


def test_columns_that_are_not_used_are_named(tmp_path, caplog):
    read_prompts(written(tmp_path, {"prompt": "1=", "level": 3}, {"prompt": "1="}))
    assert "columns that prompts do not have, and are not used: 'level' (in 1 rows)" in caplog.text


@pytest.mark.parametrize("messages", [False, True])
def test_the_ids_of_a_prompt_are_those_of_training(messages):
    made = chat_tokenizer()
    prompt = [{"role": "user", "content": "1+2"}] if messages else "1+2="
    more = {"tools": [{"name": "f"}], "chat_template_kwargs": {"short": True}} if messages else {}
    (ids,) = prompt_token_ids(made, [Prompt(prompt, **more)])
    row = Row(prompt, [{"role": "assistant", "content": "3"}] if messages else "3", 1.0, True, **more)
    (tokens,) = tokenize_rows([row], made, ends_of(made), 19, 64)
    assert ids == tokens.prompt
    assert (made.decode(ids).replace("<bos>", "") == "1+11+2=") == messages
    assert prompt_text(made, row) == prompt_text(made, Prompt(prompt, **more))


def test_prompts_that_the_template_refuses_and_those_without_tokens_are_named():
    made = chat_tokenizer()
    made.chat_template = "{{ raise_exception('no system role') }}"
    prompts = [Prompt([{"role": "user", "content": "1"}], source=f"prompts.jsonl:{i}") for i in (1, 2)]
    with pytest.raises(
        UserError, match="prompts.jsonl:1: the chat template refuses the messages: no system role .the same"
    ):
        prompt_token_ids(made, prompts)
    made.chat_template = "{{ '' }}"
    with pytest.raises(UserError, match="prompts.jsonl:1: prompt has no tokens"):
        prompt_token_ids(made, prompts[:1])

"""Problems that a model could not answer are refused before anything is trained."""

import json

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from dqo import DQOConfig, DQOTrainer
from dqo.commands.train import train_command
from dqo.data.prompts import Prompt
from dqo.errors import UserError
from dqo.evaluation.tasks import check_tasks, read_tasks, task_ids
from tests.dqo.helpers import arguments, tokenizer

PROMPT = "4-4-4-4="  # of the form of the rows that are trained on, and none of them


def short_model():
    """With learned positions, which end at 64."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer()), n_positions=64, n_embd=16, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    "prompt, length, message",
    [
        (
            PROMPT,
            256,
            rf"tasks.jsonl:1: {len(PROMPT)} tokens of prompt and 256 of .*--max_completion_length {64 - len(PROMPT)}$",
        ),
        ("1" * 64, 4, "tasks.jsonl:1: 64 tokens of prompt and 4.*64 positions; drop the prompts"),
        ("", 4, "tasks.jsonl:1: prompt is empty"),
    ],
)
@pytest.mark.parametrize("as_object", [False, True])
def test_tasks_that_do_not_fit_the_model_are_refused_before_training(files, prompt, length, message, as_object):
    (files / "tasks.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "3"}))
    options = {"eval_tasks": str(files / "tasks.jsonl"), "verifier": "gsm8k", "max_completion_length": length}
    with pytest.raises(UserError, match=message):
        if as_object:
            args = DQOConfig(output_dir=str(files / "out"), **options)
            DQOTrainer(short_model(), args, str(files / "rollouts.jsonl"), processing_class=tokenizer()).train()
        else:
            short_model().save_pretrained(files / "model")
            train_command(arguments(files, **options))
    assert not (files / "out").exists()


def test_tasks_beside_a_chat_template_are_said_to_go_without_it(files, caplog):
    chat = tokenizer()
    chat.chat_template = "{{ messages }}"
    options = DQOConfig(output_dir=str(files / "out"), max_completion_length=4).options
    check_tasks(options, short_model(), chat, [Prompt(PROMPT, "3", source="tasks.jsonl:1")])
    assert "the prompts of the problems are strings" in caplog.text


def test_tasks_of_messages_are_written_by_the_chat_template(files, caplog):
    chat = tokenizer()
    chat.chat_template = "{% for m in messages %}#{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": "3"} for text in ("1+2", "4-1")]
    (files / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = read_tasks(str(files / "tasks.jsonl"), "gsm8k")
    assert task_ids(tasks, chat, short_model().config, 4) == [
        chat(text, add_special_tokens=False)["input_ids"] for text in ("#1+2=", "#4-1=")
    ]
    assert not caplog.text
    with pytest.raises(UserError, match="tasks.jsonl:1.*no chat_template"):
        task_ids(tasks, tokenizer(), short_model().config, 4)


def test_a_token_that_the_model_does_not_have_is_refused():
    larger = tokenizer()
    larger.add_tokens(["<new>"])
    tasks = [Prompt("1+2=", "3", source="tasks.jsonl:1"), Prompt("1<new>", "3", source="tasks.jsonl:2")]
    with pytest.raises(UserError, match="tasks.jsonl:2: the tokenizer writes it with token 19, and the model has 19"):
        task_ids(tasks, larger, short_model().config, 4)

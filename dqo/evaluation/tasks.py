"""Problems of eval_tasks and of `dqo eval`: read and checked before anything is trained; read_tasks imports no torch."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from dqo.config.options import Options
from dqo.data.prompts import Prompt, prompt_token_ids, read_prompts
from dqo.grading.pool import check_answers

logger = logging.getLogger(__name__)


def read_tasks(path: str | None, verifier: str | None) -> list[Prompt]:
    """The rows of a file of problems, each with its answer, by which the verifier can grade; none without a path."""
    if path is None:
        return []
    assert verifier is not None  # options with eval_tasks and no verifier are refused
    tasks = read_prompts(path, answers=True)
    check_answers([asdict(task) for task in tasks], verifier)
    return tasks


def check_tasks(options: Options, model, tokenizer, tasks: list[Prompt]) -> None:
    """Refuses tasks that the model could not answer, before anything is trained. `model` and `tokenizer` are those that a Python
    caller gave; None: those of model_name_or_path.

    Raises:
        UserError: see `task_ids`.
    """
    from dqo.models.named import load_config, tokenizer_of

    config = options.train
    tokenizer = tokenizer_of(config.model_name_or_path, tokenizer)
    model_config = load_config(config.model_path) if model is None else model.config
    task_ids(tasks, tokenizer, model_config, config.max_completion_length)


def task_ids(tasks: list[Prompt], tokenizer, model_config: Any, max_completion_length: int) -> list[list[int]]:
    """The prompts on tokens, as training places them.

    Raises:
        UserError: for a prompt without tokens or that the chat template refuses, one with a token that the model does not have,
            or one whose answer would need more positions than the model has.
    """
    from dqo.models.limits import check_room, check_vocabulary

    found, sources = prompt_token_ids(tokenizer, tasks), [task.source for task in tasks]
    check_vocabulary(model_config, sources, found)
    check_room(model_config, sources, list(map(len, found)), max_completion_length)
    if tokenizer.chat_template is not None and isinstance(tasks[0].prompt, str):
        logger.warning(
            "the tokenizer has a chat template, and the prompts of the problems are strings: they are used as they are, without "
            'it; for a chat model write them as messages, [{"role": "user", "content": ...}]'
        )
    return found

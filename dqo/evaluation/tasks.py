"""Problems of eval_tasks: read and checked before anything is trained; read_tasks imports no torch."""

from __future__ import annotations

import logging

from dqo.config.options import Options
from dqo.data.sources import read_records
from dqo.errors import UserError
from dqo.grading.pool import check_answers

logger = logging.getLogger(__name__)


def read_tasks(path: str | None, verifier: str | None) -> list[dict]:
    """The rows of eval_tasks, each with the strings prompt and answer, and its source; the verifier can grade by all answers."""
    if path is None:
        return []
    assert verifier is not None  # options with eval_tasks and no verifier are refused
    _, records, problems = read_records(path)
    wrong = [problem.source for problem in problems]
    wrong += [
        record.source
        for record in records
        if not all(isinstance(record.values.get(name), str) for name in ("prompt", "answer"))
    ]
    if wrong:
        raise UserError(f"{', '.join(wrong[:10])}: a row of eval_tasks is an object with the strings prompt and answer")
    tasks = [{**record.values, "source": record.source} for record in records]
    check_answers(tasks, verifier)
    return tasks


def check_tasks(options: Options, model, tokenizer, tasks: list[dict]) -> None:
    """Refuses tasks that the model could not answer, before anything is trained. `model` and `tokenizer` are those that a Python
    caller gave; None: those of model_name_or_path.

    Raises:
        UserError: for a prompt without tokens, or one whose answer would need more positions than the model has.
    """
    from dqo.data.tokens import string_prompt_ids
    from dqo.models.fitness import position_limit
    from dqo.models.policy import load_config, tokenizer_of

    config = options.train
    tokenizer = tokenizer_of(config.model_name_or_path, tokenizer)
    model_config = load_config(config.model_path) if model is None else model.config
    lengths = [len(ids) for ids in string_prompt_ids(tokenizer, [task["prompt"] for task in tasks])]
    limit, hard = position_limit(model_config)
    for task, length in zip(tasks, lengths):
        if length == 0:
            raise UserError(f"{task['source']}: prompt has no tokens; an answer needs a state before it")
        if limit is not None and hard and length + config.max_completion_length > limit:
            left = limit - max(lengths)
            cure = f"--max_completion_length {left}" if left > 0 else "drop the rows whose prompts are as long as that"
            raise UserError(
                f"{task['source']}: {length:,} tokens of prompt and {config.max_completion_length:,} of the answer "
                f"(max_completion_length), and the model has {limit:,} positions; {cure}"
            )
    if tokenizer.chat_template is not None:
        logger.warning(
            "the tokenizer has a chat template, and the prompts of eval_tasks are strings: they are used as they are, without "
            "it; for a chat model write them as the template does"
        )

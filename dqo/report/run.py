"""The end of a training run: answers to eval_tasks, report.html, and what the terminal shows."""

from __future__ import annotations

import dataclasses
import datetime
import logging

from dqo.config.options import Options, TrainConfig, command_line
from dqo.data.tokens import string_prompt_ids
from dqo.errors import UserError
from dqo.evaluation.accuracy import Accuracy, Problem, evaluate
from dqo.grading.verifiers import graded_by
from dqo.models.fitness import position_limit
from dqo.models.policy import load_config, load_policy, ready, tokenizer_of
from dqo.report import findings
from dqo.report.page import console_table, write_report
from dqo.train.loop import Run
from dqo.train.metrics import peak_memory_gb

logger = logging.getLogger(__name__)


def problems_of(rows: list[dict], tokenizer, verifier: str) -> list[Problem]:
    ids = string_prompt_ids(tokenizer, [row["prompt"] for row in rows])
    return [Problem(row["prompt"], prompt, graded_by(verifier, row)) for row, prompt in zip(rows, ids)]


def check_tasks(options: Options, model, tokenizer, tasks: list[dict]) -> None:
    """Refuses tasks that the model could not answer, before anything is trained. `model` and `tokenizer` are those that a Python
    caller gave; None: those of model_name_or_path.

    Raises:
        UserError: for a prompt without tokens, or one whose answer would need more positions than the model has.
    """
    config = options.train
    tokenizer = tokenizer_of(config.model_name_or_path, tokenizer)
    model_config = load_config(config.model_name_or_path) if model is None else model.config
    lengths = [len(ids) for ids in string_prompt_ids(tokenizer, [task["prompt"] for task in tasks])]
    limit, hard = position_limit(model_config)
    for task, length in zip(tasks, lengths):
        if length == 0:
            raise UserError(f"{task['source']}: prompt has no tokens; an answer needs a state before it")
        if hard and length + config.max_completion_length > limit:
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


def changed_options(options: Options) -> dict:
    """The options that are not defaults."""
    defaults = dataclasses.asdict(TrainConfig()) | dataclasses.asdict(type(options.objective)())
    return {name: value for name, value in options.flat().items() if value != defaults[name]}


def answers(options: Options, model, tokenizer, tasks: list[dict], name: str) -> Accuracy:
    """Answers of `model` to eval_tasks, graded; greedy and sampled."""
    config = options.train
    settings = {"num_generations": config.num_generations, "max_new_tokens": config.max_completion_length}
    problems = problems_of(tasks, tokenizer, config.verifier)
    return evaluate(model, tokenizer, problems, seed=config.seed, description=name, batch_size=64, **settings)


def base_answers(options: Options, model, tokenizer, tasks: list[dict]) -> Accuracy:
    """Those of a model object before it is trained in place."""
    tokenizer = tokenizer_of(options.train.model_name_or_path, tokenizer)
    return answers(options, ready(model, model.device), tokenizer, tasks, "base")


def finish(options: Options, run: Run, tasks: list[dict], base: Accuracy | None = None) -> str:
    """Answers `tasks`, writes the report, and returns the text for the terminal. `base`: the answers of the model before
    training; None: it is loaded from model_name_or_path."""
    config = options.train
    lines = []
    methods = []
    if tasks:
        tokenizer = run.prepared.tokenizer
        if base is None:
            base = answers(options, load_policy(config.model_name_or_path), tokenizer, tasks, "base")
        trained = answers(options, run.prepared.learner.policy, tokenizer, tasks, config.method)
        for name, found in (("base", base), (config.method, trained)):
            methods.append({"name": name, "greedy": found.greedy, "sampling": found.sampling})
        lines.append(console_table(methods, "base"))
    report = {
        "title": f"{config.method.upper()} on {config.dataset_name or 'given rows'}",
        "command": command_line(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seed": config.seed,
        "wall_seconds": run.seconds,
        "options": changed_options(options),
        "methods": methods,
        "curves": findings.curves(config.method, run.output_dir / "metrics.jsonl"),
        "data": findings.data_findings(run.prepared.episodes()),
        **findings.machine(),
        **findings.value_findings(run),
    }
    if methods:
        report |= {"baseline": "base", "headline": config.method}
    path = write_report(run.output_dir, report)
    peak = peak_memory_gb()
    lines.append(f"{run.steps} steps, {run.tokens_per_second:,.0f} tokens/s, peak memory {peak:.2f} GB")
    shown = {n: v if isinstance(v, (str, type(None))) else f"{v:.4f}" for n, v in run.held_out.items()}
    lines += [f"{name:>36}  {value}" for name, value in shown.items()]
    lines.append(f"model: {run.output_dir}    report: {path}")
    return "\n".join(lines)

"""The end of a training run: answers to eval_tasks, report.html, and what the terminal shows."""

from __future__ import annotations

import dataclasses
import datetime

from dqo import findings
from dqo.config import Options, TrainConfig, command_line
from dqo.evaluate import Accuracy, Problem, evaluate
from dqo.metrics import peak_memory_gb
from dqo.models import load_policy, load_tokenizer, ready
from dqo.report import console_table, write_report
from dqo.row_tokens import string_prompt_ids
from dqo.train import Run
from dqo.verifiers import graded_by


def problems_of(rows: list[dict], tokenizer, verifier: str) -> list[Problem]:
    ids = string_prompt_ids(tokenizer, [row["prompt"] for row in rows])
    return [Problem(row["prompt"], prompt, graded_by(verifier, row)) for row, prompt in zip(rows, ids)]


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
    tokenizer = tokenizer or load_tokenizer(options.train.model_name_or_path)
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

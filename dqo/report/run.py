"""The end of a training run: what it keeps, report.html, and what the terminal shows."""

from __future__ import annotations

from dqo.data.prompts import Prompt
from dqo.evaluation.accuracy import Accuracy
from dqo.evaluation.unread import unread_lines
from dqo.models.memory import peak_gb
from dqo.report.build import report_of
from dqo.report.page import console_table, write_report
from dqo.report.runs import read_run
from dqo.report.store import store_results
from dqo.train.run import Run


def report_run(run: Run, tasks: list[Prompt], accuracies: dict[str, Accuracy]) -> str:
    """Writes the report, and returns the text for the terminal.

    Args:
        tasks: the problems of eval_tasks. accuracies: of the base and of the trained model, by name; {} without tasks.
    """
    store_results(run, [_text(task.prompt) for task in tasks], accuracies)
    stored = read_run(run.output_dir)
    report = report_of([stored])
    path = write_report(run.output_dir, report)
    lines = [console_table(report["methods"], report["baseline"])] if report["methods"] else []
    for name, found in accuracies.items():
        for kind, lost in found.unread().items():
            lines += unread_lines(name, str(stored.options.get("verifier")), kind, lost)
    peak = peak_gb()
    lines.append(f"{run.steps} steps, {run.tokens_per_second:,.0f} tokens/s, peak memory {peak:.2f} GB")
    shown = {n: v if isinstance(v, (str, type(None))) else f"{v:.4f}" for n, v in run.held_out.items()}
    lines += [f"{name:>36}  {value}" for name, value in shown.items()]
    lines.append(f"model: {run.output_dir}    report: {path}")
    return "\n".join(lines)


def _text(prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)

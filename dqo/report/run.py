"""The end of a training run: what it keeps, report.html, and what the terminal shows."""

from __future__ import annotations

from dqo.config.options import Options
from dqo.evaluation.accuracy import Accuracy
from dqo.evaluation.unread import unread_lines
from dqo.models.memory import peak_gb
from dqo.report.build import report_of
from dqo.report.comparison import compare
from dqo.report.page import console_table, write_report
from dqo.report.runs import read_run
from dqo.report.store import store_results
from dqo.report.worse import worse_lines
from dqo.train.run import Run


def report_run(options: Options, run: Run, accuracies: dict[str, Accuracy]) -> str:
    """Writes the report, and returns the text for the terminal. `accuracies`: of the base and of the trained model, by name; {}
    without eval_tasks."""
    store_results(run, accuracies)
    report = report_of([read_run(run.output_dir)])
    path = write_report(run.output_dir, report)
    lines = [console_table(report["methods"], report["baseline"])] if report["methods"] else []
    lines += [f"WARNING: {line}" for line in worse_lines(report, compare(report["methods"], report.get("baseline")))]
    for name, found in accuracies.items():
        for kind, lost in found.unread().items():
            lines += unread_lines(name, str(options.train.verifier), kind, lost)
    peak = peak_gb()
    lines.append(f"{run.steps} steps, {run.tokens_per_second:,.0f} tokens/s, peak memory {peak:.2f} GB")
    shown = {n: v if isinstance(v, (str, type(None))) else f"{v:.4f}" for n, v in run.held_out.items()}
    lines += [f"{name:>36}  {value}" for name, value in shown.items()]
    lines.append(f"model: {run.output_dir}    report: {path}")
    return "\n".join(lines)

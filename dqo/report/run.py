"""The end of a training run: report.html, and what the terminal shows."""

from __future__ import annotations

import dataclasses
import datetime

from dqo.config.options import Options, TrainConfig, command_line
from dqo.evaluation.accuracy import Accuracy
from dqo.models.memory import peak_gb
from dqo.report import findings
from dqo.report.page import console_table, write_report
from dqo.report.schema import Method, Report
from dqo.train.run import Run


def changed_options(options: Options) -> dict:
    """The options that are not defaults."""
    defaults = dataclasses.asdict(TrainConfig()) | dataclasses.asdict(type(options.objective)())
    return {name: value for name, value in options.flat().items() if value != defaults[name]}


def report_run(options: Options, run: Run, accuracies: dict[str, Accuracy]) -> str:
    """Writes the report, and returns the text for the terminal. `accuracies`: of the base and of the trained model, by name."""
    config = options.train
    methods: list[Method] = [
        {"name": name, "greedy": found.greedy, "sampling": found.sampling} for name, found in accuracies.items()
    ]
    lines = [console_table(methods, "base")] if methods else []
    control = " with shuffled rewards, a control" if config.shuffle_rewards else ""
    report: Report = {
        "title": f"{config.method.upper()} on {config.dataset_name or 'given rows'}{control}",
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
    peak = peak_gb()
    lines.append(f"{run.steps} steps, {run.tokens_per_second:,.0f} tokens/s, peak memory {peak:.2f} GB")
    shown = {n: v if isinstance(v, (str, type(None))) else f"{v:.4f}" for n, v in run.held_out.items()}
    lines += [f"{name:>36}  {value}" for name, value in shown.items()]
    lines.append(f"model: {run.output_dir}    report: {path}")
    return "\n".join(lines)
